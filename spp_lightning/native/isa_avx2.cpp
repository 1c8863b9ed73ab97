// The kernels for x86-64 processors with AVX2 and FMA.
#ifdef SPP_X86
#include "standard.h"

#define SPP_ISA avx2
#define SPP_LANES 8
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "all_kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

const spp::Kernels spp::kAvx2Kernels = avx2::kAllKernels;
#endif
