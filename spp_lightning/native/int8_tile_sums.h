// How the int8 kernel sums by the tiles of AMX.
#pragma once

#ifndef SPP_INT8_TILES
#define SPP_INT8_TILES  // where this header is opened alone
#endif

#include "int8_task.h"
#include "tile_sums.h"

namespace spp {
namespace SPP_ISA {

constexpr bool kAddsOffsetLast = true;  // the epilogue adds it: registers start with zeros

// What a thread needs while it computes.
using KernelRegisters = TileRegisters;

static_assert(kInt8TileFilters == kTileSide && kStepsOfGroup == kTileSide && kTile == kTilePixels);

// All filters of a task.
inline void sum_filters(const Int8Task& task) {
  const size_t tile_stride = static_cast<size_t>(padded(task.steps)) * kTileSide;
  sum_tiles({task.weight, tile_stride, task.panel, task.sums, task.filters, task.steps, task.pixels, task.first});
}

// The weights lack nothing: no product meets another one in int16.
inline void add_excess(const Int8Task&) {}

}  // namespace SPP_ISA
}  // namespace spp
