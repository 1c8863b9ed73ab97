// The kernels for x86-64 processors with AVX2 and FMA.
#include "common.h"

#ifdef SPP_X86
#include <immintrin.h>

#define SPP_ISA avx2
#define SPP_LANES 8
#pragma GCC target("avx2,fma")
#include "kernels.inc"
const spp::Kernels spp::kAvx2Kernels = {avx2::forward, avx2::backward_input, avx2::backward_weight};
#endif
