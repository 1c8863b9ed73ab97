// Whether AMX may be used: its instructions are there, and the system gives their registers to this process.
#pragma once

#include <cstdint>

// Linux on x86-64, and a compiler that knows the instructions.
#if defined(SPP_X86) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define SPP_HAS_AMX
#endif

namespace spp {

bool has_amx_int8();
bool has_amx_bf16();

// Whether AMX needs fewer cycles than vectors for the sums of a conv group's filters at 16 pixels. A step is a word of 4
// columns of int8, or of 2 of bfloat16; vectors take `step_cycles` for one of a filter. An AMX product takes 16 cycles for
// 16 filters and 16 steps, and so does the store of its sums. These are Intel's numbers; the kernels weren't measured.
bool tiles_pay(int64_t filters, int64_t steps, double step_cycles);

}  // namespace spp
