// AMX's tile instructions over arrays, by the names of the compiler's intrinsics, for tests on processors without them.
//
// They compute what Intel's manual says. What a processor would refuse ends the process: shapes beyond palette 1, and
// registers that were not configured or whose shapes don't fit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "isa.h"

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbf16ps

namespace spp {
namespace SPP_ISA {

struct EmulatedTile {
  int rows = 0, row_bytes = 0;  // 0: not configured
  alignas(64) uint8_t bytes[16][64];
};

inline void demand_of_tiles(bool holds, const char* rule) {
  if (holds) return;
  std::fprintf(stderr, "AMX: %s\n", rule);
  std::abort();
}

// A thread's registers.
inline EmulatedTile* tiles_of_thread() {
  thread_local EmulatedTile tiles[8];
  return tiles;
}

inline EmulatedTile& configured_tile(int number) {
  demand_of_tiles(number >= 0 && number < 8, "there are eight tiles.");
  EmulatedTile& tile = tiles_of_thread()[number];
  demand_of_tiles(tile.rows > 0 && tile.row_bytes > 0, "a tile must be configured.");
  return tile;
}

inline void _tile_release() {
  for (int i = 0; i < 8; ++i) tiles_of_thread()[i].rows = tiles_of_thread()[i].row_bytes = 0;
}

// Bytes 16 to 47 are the bytes of a row of each tile, bytes 48 to 63 its rows.
inline void _tile_loadconfig(const void* config) {
  uint8_t bytes[64];
  std::memcpy(bytes, config, sizeof bytes);
  demand_of_tiles(bytes[0] == 1, "the palette must be 1.");
  for (int i = 1; i < 16; ++i) demand_of_tiles(bytes[i] == 0, "no start row, and zeros where nothing is defined.");
  for (int i = 0; i < 16; ++i) {
    const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
    demand_of_tiles(i < 8 ? row_bytes <= 64 && rows <= 16 && (row_bytes == 0) == (rows == 0) : row_bytes + rows == 0,
                    "eight tiles of at most 16 rows of 64 bytes.");
    if (i >= 8) continue;
    EmulatedTile& tile = tiles_of_thread()[i];
    tile.rows = rows;
    tile.row_bytes = row_bytes;
    std::memset(tile.bytes, 0, sizeof tile.bytes);
  }
}

inline void _tile_zero(int number) {
  EmulatedTile& tile = configured_tile(number);
  std::memset(tile.bytes, 0, sizeof tile.bytes);
}

inline void _tile_loadd(int number, const void* from, size_t stride) {
  EmulatedTile& tile = configured_tile(number);
  std::memset(tile.bytes, 0, sizeof tile.bytes);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(tile.bytes[r], static_cast<const uint8_t*>(from) + r * stride, tile.row_bytes);
}

inline void _tile_stored(int number, void* to, size_t stride) {
  const EmulatedTile& tile = configured_tile(number);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, tile.bytes[r], tile.row_bytes);
}

// The tiles of sum += first · second, whose shapes must fit.
struct TileProduct {
  EmulatedTile &sum, &first, &second;
  int rows, words, steps;  // words of a row of the sum

  TileProduct(int sum_number, int first_number, int second_number)
      : sum(configured_tile(sum_number)), first(configured_tile(first_number)), second(configured_tile(second_number)),
        rows(sum.rows), words(sum.row_bytes / 4), steps(first.row_bytes / 4) {
    demand_of_tiles(sum_number != first_number && sum_number != second_number && first_number != second_number,
                    "the tiles of a product must be three.");
    demand_of_tiles(sum.row_bytes % 4 + first.row_bytes % 4 + second.row_bytes % 4 == 0, "rows of whole words.");
    demand_of_tiles(sum.rows == first.rows && sum.row_bytes == second.row_bytes && steps == second.rows,
                    "the shapes of a product must fit.");
  }
};

// Bytes with a sign times bytes without one, four of them per word. Sums wrap around.
inline void _tile_dpbsud(int sum_number, int first_number, int second_number) {
  const TileProduct p(sum_number, first_number, second_number);
  for (int m = 0; m < p.rows; ++m) {
    uint32_t sums[16];
    std::memcpy(sums, p.sum.bytes[m], sizeof sums);
    for (int k = 0; k < p.steps; ++k)
      for (int n = 0; n < p.words; ++n)
        for (int i = 0; i < 4; ++i) {
          const int32_t a = static_cast<int8_t>(p.first.bytes[m][4 * k + i]), b = p.second.bytes[k][4 * n + i];
          sums[n] += static_cast<uint32_t>(a * b);
        }
    std::memcpy(p.sum.bytes[m], sums, sizeof sums);
  }
}

// Numbers of bfloat16, two of them per word: fused products of the first ones and of the second ones, each added up from
// 0 on; then the sum of both is added. What is denormal counts as 0.
// Without a branch: memory that nobody wrote may be multiplied, where nobody reads the product.
inline float without_denormals(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  const uint32_t exponent = word & 0x7f800000u, is_normal = (exponent + 0x7f800000u) >> 31;
  word &= 0x80000000u | (0 - is_normal);
  std::memcpy(&x, &word, sizeof x);
  return x;
}

inline float bfloat16_at(const uint8_t* p) {
  const uint32_t word = static_cast<uint32_t>(p[0]) << 16 | static_cast<uint32_t>(p[1]) << 24;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return without_denormals(x);
}

inline void _tile_dpbf16ps(int sum_number, int first_number, int second_number) {
  const TileProduct p(sum_number, first_number, second_number);
  for (int m = 0; m < p.rows; ++m) {
    float sums[16], pairs[16][2] = {};
    std::memcpy(sums, p.sum.bytes[m], sizeof sums);
    for (int k = 0; k < p.steps; ++k)
      for (int n = 0; n < p.words; ++n)
        for (int i = 0; i < 2; ++i) {
          const float a = bfloat16_at(p.first.bytes[m] + 4 * k + 2 * i), b = bfloat16_at(p.second.bytes[k] + 4 * n + 2 * i);
          pairs[n][i] = without_denormals(std::fma(a, b, pairs[n][i]));
        }
    for (int n = 0; n < p.words; ++n) {
      const float both = without_denormals(pairs[n][0] + pairs[n][1]);
      sums[n] = without_denormals(without_denormals(sums[n]) + both);
    }
    std::memcpy(p.sum.bytes[m], sums, sizeof sums);
  }
}

}  // namespace SPP_ISA
}  // namespace spp
