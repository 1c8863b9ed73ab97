// The int8 kernel for x86-64 processors with TDPBSUD of AMX.
#include "int8_kernels.h"

#ifdef SPP_HAS_AMX
#include "standard.h"

#define SPP_ISA int8_amx
#define SPP_LANES 16
#define SPP_INT8_VNNI
#define SPP_INT8_TILES
#define SPP_TILES
#ifdef __clang__
#pragma clang attribute push(                                                                               \
    __attribute__((target("avx2,avx512f,avx512vl,avx512dq,avx512bw,avx512vnni,amx-tile,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,avx512f,avx512vl,avx512dq,avx512bw,avx512vnni,amx-tile,amx-int8,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // as in isa_avx512.cpp
#endif
#include "int8_kernel.h"
#ifdef __clang__
#pragma clang attribute pop
#endif

const spp::Int8Kernel spp::kInt8Amx = int8_amx::int8_kernel("amx");
#endif
