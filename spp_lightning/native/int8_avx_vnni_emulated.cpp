// The int8 kernel as it is compiled for VPDPBUSD of AVX, with loops in the place of its instructions: for tests on
// processors that lack them. It computes the same bits.
#include "int8_kernels.h"
#include "standard.h"

#define SPP_ISA int8_avx_vnni_emulated
#define SPP_LANES 8
#define SPP_INT8_EMULATED
#pragma GCC diagnostic ignored "-Wpsabi"  // of vectors that no function hands on: all are inlined
#include "int8_kernel.h"

const spp::Int8Kernel spp::kInt8AvxVnniEmulated = int8_avx_vnni_emulated::int8_kernel("avx_vnni_emulated");
