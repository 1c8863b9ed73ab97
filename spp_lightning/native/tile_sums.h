// The micro-kernel of AMX, of int8 and of bfloat16: sums of 32 filters by 32 pixels stay in four tile registers.
//
// A product adds 16 steps of columns to the sums of 16 filters at 16 pixels; a step is a word of four bytes, or of two
// numbers of bfloat16. Its first factor is a tile of weights, its second one 16 rows of a panel as they are.
#pragma once

#include "tiles.h"

#ifdef SPP_BFLOAT16
#define SPP_TILE_PRODUCT _tile_dpbf16ps
#else
#define SPP_TILE_PRODUCT _tile_dpbsud
#endif

namespace spp {
namespace SPP_ISA {

constexpr int kTilePixels = 2 * kTileSide;  // of a panel's step, and of the sums of a filter

constexpr int groups_of(int steps) { return (steps + kTileSide - 1) / kTileSide; }
constexpr int padded_steps(int steps) { return groups_of(steps) * kTileSide; }

// Some filters at a panel. All are words of 32 bits.
struct TileSums {
  const void* weight;  // [tile of filters][group of steps][filter of the tile][step of the group]
  size_t tile_stride;  // words from one tile of filters to the next
  const void* panel;   // [step][pixel], of whole groups of steps
  void* sums;          // [filter][pixel]: over the columns so far, unless `first`
  int filters, steps, pixels;
  bool first;
};

// kFilters tiles of filters, from a tile on, at kPixels tiles of pixels. Registers 0 to 3 are the sums, 4 and 5 weights,
// 6 and 7 pixels.
template <int kFilters, int kPixels>
void sum_tiles(const TileSums& task, int tile) {
  constexpr bool kTwoFilters = kFilters == 2, kTwoPixels = kPixels == 2;
  constexpr int kRow = kTilePixels * sizeof(int32_t);  // bytes
  const int groups = groups_of(task.steps);
  const auto* weight = static_cast<const int32_t*>(task.weight) + tile * task.tile_stride;
  const int32_t* next_weight = weight + task.tile_stride;
  const auto* panel = static_cast<const int32_t*>(task.panel);
  auto* sums = static_cast<int32_t*>(task.sums) + tile * kTileSide * kTilePixels;
  int32_t* next_sums = sums + kTileSide * kTilePixels;
  if (task.first) {
    _tile_zero(0);
    if (kTwoPixels) _tile_zero(1);
    if (kTwoFilters) _tile_zero(2);
    if (kTwoFilters && kTwoPixels) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kRow);
    if (kTwoPixels) _tile_loadd(1, sums + kTileSide, kRow);
    if (kTwoFilters) _tile_loadd(2, next_sums, kRow);
    if (kTwoFilters && kTwoPixels) _tile_loadd(3, next_sums + kTileSide, kRow);
  }
  for (int i = 0; i < groups; ++i, weight += kTileWords, next_weight += kTileWords, panel += kTileSide * kTilePixels) {
    _tile_loadd(4, weight, kTileRow);
    _tile_loadd(6, panel, kRow);
    SPP_TILE_PRODUCT(0, 4, 6);
    if (kTwoPixels) _tile_loadd(7, panel + kTileSide, kRow);
    if (kTwoPixels) SPP_TILE_PRODUCT(1, 4, 7);
    if (kTwoFilters) _tile_loadd(5, next_weight, kTileRow);
    if (kTwoFilters) SPP_TILE_PRODUCT(2, 5, 6);
    if (kTwoFilters && kTwoPixels) SPP_TILE_PRODUCT(3, 5, 7);
  }
  _tile_stored(0, sums, kRow);
  if (kTwoPixels) _tile_stored(1, sums + kTileSide, kRow);
  if (kTwoFilters) _tile_stored(2, next_sums, kRow);
  if (kTwoFilters && kTwoPixels) _tile_stored(3, next_sums + kTileSide, kRow);
}

// All filters of a task. Those beyond the last one, and such pixels, are computed, too: nobody reads their sums.
inline void sum_tiles(const TileSums& task) {
  finish_before_tiles();
  const int tiles = (task.filters + kTileSide - 1) / kTileSide;
  const bool two_pixels = task.pixels > kTileSide;
  const auto two = two_pixels ? sum_tiles<2, 2> : sum_tiles<2, 1>;
  for (int tile = 0; tile + 2 <= tiles; tile += 2) two(task, tile);
  if (tiles % 2 != 0) (two_pixels ? sum_tiles<1, 2> : sum_tiles<1, 1>)(task, tiles - 1);
}

}  // namespace SPP_ISA
}  // namespace spp
