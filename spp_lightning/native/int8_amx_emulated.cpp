// The int8 kernel as it is compiled for AMX, with loops in the place of its instructions: for tests on processors that
// lack them. It computes the same bits.
#include "int8_kernels.h"
#include "standard.h"

#define SPP_ISA int8_amx_emulated
#define SPP_LANES 16
#define SPP_INT8_TILES
#define SPP_INT8_EMULATED
#pragma GCC diagnostic ignored "-Wpsabi"  // of vectors that no function hands on: all are inlined
#include "int8_kernel.h"

const spp::Int8Kernel spp::kInt8AmxEmulated = int8_amx_emulated::int8_kernel("amx_emulated");
