// The micro-kernel of AMX: sums of 32 filters by 32 pixels stay in four tile registers.
//
// A product adds 16 steps of columns to the sums of 16 filters at 16 pixels. Its first factor is a tile of weights, its
// second one 16 rows of the panel as they are; the sums are stored as the epilogue reads them.
#pragma once

#ifndef SPP_INT8_TILES
#define SPP_INT8_TILES  // where this header is opened alone
#endif

#include "int8_task.h"
#include "tiles.h"

namespace spp {
namespace SPP_ISA {

constexpr bool kAddsOffsetLast = true;  // the epilogue adds it: registers start with zeros

// What a thread needs while it computes.
using KernelRegisters = TileRegisters;

static_assert(kInt8TileFilters == kTileSide && kStepsOfGroup == kTileSide && kPart == 2 * kTileSide && kParts == 1);

// kFilters tiles of filters at kPixels tiles of pixels. Registers 0 to 3 are the sums, 4 and 5 weights, 6 and 7 pixels.
template <int kFilters, int kPixels>
void sum_tiles(const Int8Task& task, int tile) {
  constexpr bool kTwoFilters = kFilters == 2, kTwoPixels = kPixels == 2;
  constexpr int kPanelRow = kTile * sizeof(int32_t);
  const int groups = groups_of(task.steps);
  const int32_t *weight = task.weight + tile * groups * kTileWords, *next_weight = weight + groups * kTileWords;
  const int32_t* panel = task.panel;
  int32_t *sums = task.sums + tile * kTileSide * kTile, *next_sums = sums + kTileSide * kTile;
  if (task.first) {
    _tile_zero(0);
    if (kTwoPixels) _tile_zero(1);
    if (kTwoFilters) _tile_zero(2);
    if (kTwoFilters && kTwoPixels) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kPanelRow);
    if (kTwoPixels) _tile_loadd(1, sums + kTileSide, kPanelRow);
    if (kTwoFilters) _tile_loadd(2, next_sums, kPanelRow);
    if (kTwoFilters && kTwoPixels) _tile_loadd(3, next_sums + kTileSide, kPanelRow);
  }
  for (int i = 0; i < groups; ++i) {
    _tile_loadd(4, weight + i * kTileWords, kTileRow);
    _tile_loadd(6, panel, kPanelRow);
    _tile_dpbsud(0, 4, 6);
    if (kTwoPixels) _tile_loadd(7, panel + kTileSide, kPanelRow);
    if (kTwoPixels) _tile_dpbsud(1, 4, 7);
    if (kTwoFilters) _tile_loadd(5, next_weight + i * kTileWords, kTileRow);
    if (kTwoFilters) _tile_dpbsud(2, 5, 6);
    if (kTwoFilters && kTwoPixels) _tile_dpbsud(3, 5, 7);
    panel += kTileSide * kTile;
  }
  _tile_stored(0, sums, kPanelRow);
  if (kTwoPixels) _tile_stored(1, sums + kTileSide, kPanelRow);
  if (kTwoFilters) _tile_stored(2, next_sums, kPanelRow);
  if (kTwoFilters && kTwoPixels) _tile_stored(3, next_sums + kTileSide, kPanelRow);
}

// All filters of a task. Those beyond the last one, and such pixels, are computed, too: their sums are never read.
inline void sum_filters(const Int8Task& task) {
  finish_before_tiles();
  const int tiles = (task.filters + kTileSide - 1) / kTileSide;
  const bool two_pixels = task.pixels > kTileSide;
  const auto two = two_pixels ? sum_tiles<2, 2> : sum_tiles<2, 1>;
  for (int tile = 0; tile + 2 <= tiles; tile += 2) two(task, tile);
  if (tiles % 2 != 0) (two_pixels ? sum_tiles<1, 2> : sum_tiles<1, 1>)(task, tiles - 1);
}

// The weights lack nothing: no product meets another one in int16.
inline void add_excess(const Int8Task&) {}

}  // namespace SPP_ISA
}  // namespace spp
