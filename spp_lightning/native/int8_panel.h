// Panels of the int8 kernel: the pixels of a tile under the kept columns, in the order in which the products read
// them. A panel lies in the L1 cache and is read once per tile of filters.
#pragma once

#include "int8_plan.h"
#include "int8_vectors.h"
#include "shapes.h"

namespace spp {
namespace SPP_ISA {

// The sums of a part of a tile fill the registers: filters by vectors of pixels. A tile has one or two parts, so that
// filters are begun and finished less often.
#ifdef SPP_INT8_TILES
constexpr int kInt8TileFilters = 16, kVectors = 32 / SPP_LANES, kParts = 1;
#elif SPP_LANES == 16
constexpr int kInt8TileFilters = 8, kVectors = 3, kParts = 1;
#elif SPP_LANES == 8
constexpr int kInt8TileFilters = 6, kVectors = 2, kParts = 2;
#else
constexpr int kInt8TileFilters = 3, kVectors = 4, kParts = 2;
#endif
constexpr int kPart = kLanes * kVectors, kTile = kPart * kParts;  // pixels
static_assert(kTile % kPackPixels == 0, "A tile is finished by 16 pixels at a time.");
// Of the L1 cache. AMX's processors have 48 KiB, and sums that wait between two panels cost them more.
#ifdef SPP_INT8_TILES
constexpr int kPanelBytes = 32 << 10, kStepsOfGroup = 16;
#else
constexpr int kPanelBytes = 24 << 10, kStepsOfGroup = 1;
#endif
constexpr int kPanelSteps = kPanelBytes / (kTile * 4);
static_assert(kPanelSteps % 2 == 0, "Steps are multiplied in pairs.");
static_assert(kPanelSteps % kStepsOfGroup == 0, "A panel has whole groups of steps.");
constexpr int padded(int steps) { return (steps + kStepsOfGroup - 1) / kStepsOfGroup * kStepsOfGroup; }
constexpr int kRunSlack = kPackPixels;  // pixels that are read behind a run, and words that are written behind a panel

// Neighbouring pixels of the output, without regard to rows.
struct Tile {
  int begin, count;  // pixels
  // Runs of at most 16 pixels that are neighbours in what is read, too: where they begin there, and in the tile.
  int runs;
  int64_t from[kTile];
  int32_t to[kTile];
};

// Source planes have rows of `source_width` pixels, of which the output's are the first ones.
inline Tile tile_at(int begin, int64_t pixels, int width, int source_width) {
  Tile tile;
  tile.begin = begin;
  tile.count = static_cast<int>(std::min<int64_t>(kTile, pixels - begin));
  tile.runs = 0;
  int row = begin / width, col = begin % width;
  for (int done = 0; done < tile.count; ++row, col = 0) {
    const int run = std::min(tile.count - done, width - col);
    for (int i = 0; i < run; i += kPackPixels, ++tile.runs) {
      tile.from[tile.runs] = static_cast<int64_t>(row) * source_width + col + i;
      tile.to[tile.runs] = done + i;
    }
    done += run;
  }
  return tile;
}

// What a panel is packed of: `offset` says where each column's pixels begin, behind `base`.
struct PanelSource {
  const uint8_t *base, *end;  // nothing is read from `end` on
  const int64_t* offset;
  int steps;
};

// kRuns is the number of a tile's runs, or 0 for any. A run is written behind its last pixel, too, where the next run
// or step follows.
template <int kRuns>
void pack_panel(const Tile& tile, const PanelSource& of, int32_t* panel) {
  const int runs = kRuns > 0 ? kRuns : tile.runs;
  const int64_t* offset = of.offset;
  for (int step = 0; step < of.steps; ++step, offset += kColumnsOfStep, panel += kTile)
#pragma GCC unroll 3
    for (int r = 0; r < runs; ++r) {
      const uint8_t* at[kColumnsOfStep];
#pragma GCC unroll 4
      for (int i = 0; i < kColumnsOfStep; ++i) at[i] = of.base + offset[i] + tile.from[r];
      pack_words(at, panel + tile.to[r]);
    }
}

// The same where some runs might be read beyond the end.
inline void pack_edge(const Tile& tile, const PanelSource& of, int32_t* panel) {
  const int64_t* offset = of.offset;
  for (int step = 0; step < of.steps; ++step, offset += kColumnsOfStep, panel += kTile)
    for (int r = 0; r < tile.runs; ++r) {
      uint8_t pixels[kColumnsOfStep][kPackPixels] = {};
      const uint8_t* at[kColumnsOfStep];
      for (int i = 0; i < kColumnsOfStep; ++i) {
        at[i] = of.base + offset[i] + tile.from[r];
        if (of.end - at[i] >= kPackPixels) continue;
        std::memcpy(pixels[i], at[i], of.end - at[i]);
        at[i] = pixels[i];
      }
      pack_words(at, panel + tile.to[r]);
    }
}

inline void pack(const PanelSource& of, const Tile& tile, int32_t* panel) {
  if (of.steps == 0) return;
  const int64_t last = *std::max_element(of.offset, of.offset + of.steps * kColumnsOfStep) + tile.from[tile.runs - 1];
  if (of.end - of.base < last + kPackPixels) return pack_edge(tile, of, panel);
  const auto by_runs = tile.runs == 1   ? pack_panel<1>
                       : tile.runs == 2 ? pack_panel<2>
                       : tile.runs == 3 ? pack_panel<3>
                                        : pack_panel<0>;
  by_runs(tile, of, panel);
}

// ---- Source planes ----

// A plane of bytes, with the zero point beyond the image's borders.
inline void copy_plane(const Geometry& g, const SourcePlane& source, const uint8_t* input, int height, int width,
                       const Shapes& s, int zero, uint8_t* out) {
  const auto [begin, end] = Inside(g, source, width, s);
  const int step = g.stride[1];
  for (int y = 0; y < s.height; ++y, out += s.width) {
    const int row = y * g.stride[0] + source.phase[0] - g.padding[0];
    if (row < 0 || row >= height || begin >= end) {
      std::memset(out, zero, s.width);
      continue;
    }
    std::memset(out, zero, begin);
    std::memset(out + end, zero, s.width - end);
    const uint8_t* in = input + static_cast<int64_t>(row) * width + source.phase[1] - g.padding[1];
    if (step == 1) std::memcpy(out + begin, in + begin, end - begin);
    else if (step == 2)
      for (int x = begin; x < end; ++x) out[x] = in[2 * x];
    else
      for (int x = begin; x < end; ++x) out[x] = in[static_cast<int64_t>(x) * step];
  }
}

}  // namespace SPP_ISA
}  // namespace spp
