// The forward kernel for x86-64 processors whose AVX-512 multiplies pairs of bfloat16.
#include "common.h"

#ifdef SPP_HAS_BFLOAT16
#include <immintrin.h>

#define SPP_ISA avx512_bf16
#define SPP_LANES 16
#define SPP_BFLOAT16
#ifdef __clang__
#pragma clang attribute push(                                                                \
    __attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as in kernels_avx512.cpp
#endif
#include "vectors.inc"

#include "products.inc"

#include "pool.inc"

#include "norm.inc"

#include "post.inc"

#include "forward.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
void spp::forward_bfloat16(const Pass& pass) { avx512_bf16::forward(pass); }
#endif
