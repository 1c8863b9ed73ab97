// The pixel-vectorised kernel for x86-64 processors whose AVX-512 multiplies pairs of bfloat16.
#include "kernels.h"

#ifdef SPP_HAS_BFLOAT16
#include "standard.h"

#define SPP_ISA avx512_bf16
#define SPP_LANES 16
#define SPP_BFLOAT16
#ifdef __clang__
#pragma clang attribute push(                                                                \
    __attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as in isa_avx512.cpp
#endif
#include "pixel_kernel.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

const spp::PairKernel spp::kAvx512Pairs = {"avx512_bf16", false, avx512_bf16::forward_pixels};
#endif
