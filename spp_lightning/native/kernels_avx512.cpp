// The kernels for x86-64 processors with AVX-512.
#include "common.h"

#ifdef SPP_X86
#include <immintrin.h>

#define SPP_ISA avx512
#define SPP_LANES 16
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,prefer-vector-width=512")
#include "kernels.inc"
const spp::Kernels spp::kAvx512Kernels = {avx512::forward, avx512::backward_input, avx512::backward_weight};
#endif
