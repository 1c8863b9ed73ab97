// The kernels for x86-64 processors with AVX-512.
#ifdef SPP_X86
#include "standard.h"

#define SPP_ISA avx512
#define SPP_LANES 16
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,prefer-vector-width=512")
// gcc's own header hands an undefined vector to the intrinsics without a mask.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "all_kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

const spp::Kernels spp::kAvx512Kernels = avx512::kAllKernels;
#endif
