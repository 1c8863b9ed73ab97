// AMX's tile registers: eight matrices of up to 16 rows of 64 bytes, and the instructions that multiply them.
//
// SPP_TILES says that the compiler's intrinsics are meant; else functions of the same names compute the same. Numbers of
// registers must be literals: the intrinsics of GCC are macros that paste them into assembly.
#pragma once

#include "isa.h"

#ifdef SPP_TILES
#include <immintrin.h>
#else
#include "tiles_emulated.h"
#endif

namespace spp {
namespace SPP_ISA {

constexpr int kTileSide = 16;                        // rows of a register, and words of a row
constexpr int kTileWords = kTileSide * kTileSide;    // of 32 bits
constexpr int kTileRow = kTileSide * sizeof(int32_t);  // bytes

// What LDTILECFG reads.
struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64, "LDTILECFG reads 64 bytes.");

// All registers are whole: tiles that aren't are filled with zeros. A constant, since GCC takes LDTILECFG to read 8 bytes.
constexpr uint8_t kSide = kTileSide;
constexpr TileShapes kWholeTiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64},
                                    {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide}};

// While it lives, the registers may be used in this thread. Released ones need not be saved when the thread is switched.
class TileRegisters {
 public:
  TileRegisters() { _tile_loadconfig(&kWholeTiles); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// What was stored before is in memory behind it: GCC's intrinsics don't say that a tile's load reads memory.
inline void finish_before_tiles() { __asm__ volatile("" ::: "memory"); }

}  // namespace SPP_ISA
}  // namespace spp
