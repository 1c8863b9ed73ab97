// The int8 kernel for x86-64 processors with VPDPBUSD of AVX-512.
#include "int8_kernels.h"

#ifdef SPP_X86
#include "standard.h"

#define SPP_ISA int8_avx512_vnni
#define SPP_LANES 16
#define SPP_INT8_VNNI
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512vl,avx512dq,avx512bw,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,avx512f,avx512vl,avx512dq,avx512bw,avx512vnni,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as in isa_avx512.cpp
#endif
#include "int8_kernel.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

const spp::Int8Kernel spp::kInt8Avx512Vnni = int8_avx512_vnni::int8_kernel("avx512_vnni");
#endif
