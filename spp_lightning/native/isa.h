// The instruction set that the headers of kernels are compiled for: SPP_ISA is their namespace, SPP_LANES
// the numbers of a vector. isa_*.cpp define both; a header that is opened alone is compiled for any
// processor.
#pragma once

#ifndef SPP_ISA
#define SPP_ISA base
#define SPP_LANES 4
#endif

#if SPP_LANES > 4
#include <immintrin.h>
#endif
