// The int8 kernels of each instruction set.
#pragma once

#include "amx.h"
#include "int8_plan.h"

namespace spp {

extern const Int8Kernel kInt8Base;
// For tests.
extern const Int8Kernel kInt8AvxVnniEmulated, kInt8Avx512VnniEmulated, kInt8AmxEmulated;
#ifdef SPP_X86
extern const Int8Kernel kInt8Avx2, kInt8Avx512Vnni;
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define SPP_HAS_AVX_VNNI
extern const Int8Kernel kInt8AvxVnni;
#endif
#ifdef SPP_HAS_AMX
extern const Int8Kernel kInt8Amx;
#endif
#endif

}  // namespace spp
