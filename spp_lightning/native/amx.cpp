#include "amx.h"

#ifdef SPP_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace spp {
namespace {

// Bits of EDX of CPUID's leaf 7.
constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;

bool has_instructions(unsigned bits) {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & bits) == bits;
}

// Asks once. Old kernels refuse, and so do those of processes with a signal stack that is too small for the registers.
bool may_use_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

}  // namespace

bool has_amx_int8() { return has_instructions(kTile | kInt8) && may_use_tiles(); }

}  // namespace spp
#else
bool spp::has_amx_int8() { return false; }
#endif
