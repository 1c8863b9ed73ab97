// The int8 kernels of each instruction set.
#pragma once

#include "int8_plan.h"

namespace spp {

extern const Int8Kernel kInt8Base;
#ifdef SPP_X86
extern const Int8Kernel kInt8Avx2;
#endif

}  // namespace spp
