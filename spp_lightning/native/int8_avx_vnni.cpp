// The int8 kernel for x86-64 processors with VPDPBUSD of AVX, without AVX-512.
#include "int8_kernels.h"

#ifdef SPP_HAS_AVX_VNNI
#include "standard.h"

#define SPP_ISA int8_avx_vnni
#define SPP_LANES 8
#define SPP_INT8_VNNI
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,avxvnni"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,avxvnni")
#endif
#include "int8_kernel.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

const spp::Int8Kernel spp::kInt8AvxVnni = int8_avx_vnni::int8_kernel("avx_vnni");
#endif
