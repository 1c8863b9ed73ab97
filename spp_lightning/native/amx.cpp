#include "amx.h"

#include "export.h"

#ifdef SPP_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace spp {
namespace {

// Bits of EDX of CPUID's leaf 7.
constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;

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
bool has_amx_bf16() { return has_instructions(kTile | kBfloat16) && may_use_tiles(); }

}  // namespace spp
#else
bool spp::has_amx_int8() { return false; }
bool spp::has_amx_bf16() { return false; }
#endif

bool spp::tiles_pay(int64_t filters, int64_t steps, double step_cycles) {
  const int64_t tiles = (filters + 15) / 16, products = (steps + 15) / 16;
  return static_cast<double>(tiles * 16 * (products + 1)) < filters * (steps * step_cycles + 1);
}

// For tests.
SPP_EXPORT int32_t spp_tiles_pay(int32_t filters, int32_t steps, double step_cycles) {
  return spp::tiles_pay(filters, steps, step_cycles);
}
