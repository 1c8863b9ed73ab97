// Whether AMX may be used: its instructions are there, and the system gives their registers to this process.
#pragma once

// Linux on x86-64, and a compiler that knows the instructions.
#if defined(SPP_X86) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define SPP_HAS_AMX
#endif

namespace spp {

bool has_amx_int8();

}  // namespace spp
