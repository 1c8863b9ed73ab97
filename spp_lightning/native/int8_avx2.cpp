// The int8 kernel for x86-64 processors with AVX2.
#include "int8_kernels.h"

#ifdef SPP_X86
#include "standard.h"

#define SPP_ISA int8_avx2
#define SPP_LANES 8
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#include "int8_kernel.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

const spp::Int8Kernel spp::kInt8Avx2 = int8_avx2::int8_kernel("avx2");
#endif
