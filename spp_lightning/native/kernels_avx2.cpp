// The kernels for x86-64 processors with AVX2 and FMA.
#include "common.h"
#include "winograd.h"

#ifdef SPP_X86
#include <immintrin.h>

#define SPP_ISA avx2
#define SPP_LANES 8
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
const spp::Kernels spp::kAvx2Kernels = {avx2::forward, avx2::forward_winograd,
    avx2::make_sequence, avx2::linear_batch, avx2::backward};
#endif
