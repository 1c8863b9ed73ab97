// Panels of the pixel-vectorised kernel: the pixels of a tile under each kept column, one column after the
// other, so that they are read once for all filters and lie in the L1 cache.
//
// Where output and input have rows of one length, the pixels of a tile lie next to each other in the input
// itself, whatever the column: those beyond the borders are masked out. Other layers read source planes.
#pragma once

#include "source_planes.h"

namespace spp {
namespace SPP_ISA {

#ifdef SPP_BFLOAT16
constexpr bool kPairs = true;  // columns are multiplied in pairs of bfloat16
#else
constexpr bool kPairs = false;
#endif
constexpr int kColumnsAtOnce = kPairs ? 2 : 1;
constexpr int kPanelColumns = 256;  // or pairs; 24 KiB with 8 lanes, so that a panel stays in L1

// Some neighbouring pixels of the output, without regard to rows.
struct Tile {
  int begin, count;  // pixels
  // Runs of pixels that are neighbours in a source plane, too: where they begin there, and in the tile.
  int runs;
  int64_t from[kTile];
  int32_t to[kTile];

  int vectors() const { return (count + kLanes - 1) / kLanes; }
};

inline Tile tile_at(int begin, int conv_width, const Shapes& s) {
  Tile tile;
  tile.begin = begin;
  tile.count = std::min(kTile, static_cast<int>(s.conv_plane) - begin);
  tile.runs = 0;
  int row = begin / conv_width, col = begin % conv_width;
  for (int done = 0; done < tile.count; ++row, col = 0) {
    const int run = std::min(tile.count - done, conv_width - col);
    for (int i = 0; i < run; i += kLanes, ++tile.runs) {
      tile.from[tile.runs] = static_cast<int64_t>(row) * s.width + col + i;
      tile.to[tile.runs] = done + i;
    }
    done += run;
  }
  return tile;
}

// Which lanes of a tile lie inside the image, under each tap of the kernel.
struct Border {
  Bits* mask;   // [tap][vector]
  bool inside;  // all of them, under all taps
};

// Whether `at`, moved by a tap's distance, is in [0, size): all ones, or 0.
inline int32_t is_inside(int at, int distance, int size) {
  return -static_cast<int32_t>(static_cast<uint32_t>(at + distance) < static_cast<uint32_t>(size));
}

inline void find_border(const Geometry& g, int height, int width, int begin, Border& border) {
  int row = begin / width, col = begin % width;
  const int reach[2] = {(g.kernel[0] - 1) * g.dilation[0] - g.padding[0],
                        (g.kernel[1] - 1) * g.dilation[1] - g.padding[1]};
  border.inside = row >= g.padding[0] && col >= g.padding[1] && col + kTile + reach[1] <= width &&
                  row + reach[0] < height;
  if (border.inside) return;
  int32_t rows[kTile], cols[kTile], row_inside[kTile];
  for (int p = 0; p < kTile; ++row, col = 0) {
    const int end = std::min(kTile, p + width - col);
    for (; p < end; ++p) {
      rows[p] = row;
      cols[p] = col++;
    }
  }
  int32_t* mask = reinterpret_cast<int32_t*>(border.mask);
  for (int i = 0; i < g.kernel[0]; ++i) {
    const int down = i * g.dilation[0] - g.padding[0];
    for (int p = 0; p < kTile; ++p) row_inside[p] = is_inside(rows[p], down, height);
    for (int j = 0; j < g.kernel[1]; ++j, mask += kTile) {
      const int right = j * g.dilation[1] - g.padding[1];
      for (int p = 0; p < kTile; ++p) mask[p] = row_inside[p] & is_inside(cols[p], right, width);
    }
  }
}

// The columns that a panel holds.
struct PanelColumns {
  const Column* columns;
  const int64_t* offset;  // of each in the input, or in the source planes
  int count;
};

// From source planes. kRuns is the number of a tile's runs, or 0 for any.
template <int kRuns>
inline void pack_sources(const Tile& tile, const float* base, const PanelColumns& of, float* panel) {
  const int runs = kRuns > 0 ? kRuns : tile.runs;
  for (int k = 0; k < of.count; k += kColumnsAtOnce, panel += kTile) {
    const float* in = base + of.offset[k];
    const float* next = kPairs && k + 1 < of.count ? base + of.offset[k + 1] : nullptr;
#pragma GCC unroll 4
    for (int i = 0; i < runs; ++i) {
      Vector x = load(in + tile.from[i]);
      if constexpr (kPairs) x = pair_up(x, next ? load(next + tile.from[i]) : Vector{});
      store(panel + tile.to[i], x);
    }
  }
}

// The pixels of a tile under each column, in the input.
struct InputPixels {
  const float* in;  // the tile's first pixel
  PanelColumns of;
  const Bits* mask;  // [tap][vector]; null if all lanes lie inside the image
  int prefetched = kVectors;  // vectors of the next tile that are prefetched while this one is packed

  // What is prefetched of a vector of the next tile, for an offset of 0: its last pixel, since the first ones came
  // with the vector before it. GCC leaves out calls of functions that only prefetch, so this only says where.
  inline __attribute__((always_inline)) const float* ahead(int vector) const {
    return in + kTile + (vector + 1) * kLanes - 1;
  }

  // Loads those under column k and stores them in the panel.
  template <bool kMasked>
  inline __attribute__((always_inline)) void pack(int k, float* panel, Vector (&x)[kVectors]) const {
    const float* from = in + of.offset[k];
    const Bits* inside = kMasked ? mask + of.columns[k].tap * kVectors : nullptr;
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      x[v] = load(from + v * kLanes);
      if (kMasked) x[v] = masked(x[v], inside[v]);
      store(panel + static_cast<size_t>(k) * kTile + v * kLanes, x[v]);
      if (v < prefetched) __builtin_prefetch(ahead(v) + of.offset[k]);
    }
  }
};

template <bool kMasked>
inline void pack_input(const InputPixels& pixels, float* panel) {
  Vector x[kVectors];
  for (int k = 0; k < pixels.of.count; ++k) pixels.pack<kMasked>(k, panel, x);
}

// The same where vectors of some columns might reach beyond the ends of the tensor, [start, end).
inline void pack_edge(const float* start, const float* end, const InputPixels& pixels, float* panel) {
  for (int k = 0; k < pixels.of.count; ++k, panel += kTile) {
    const float* from = pixels.in + pixels.of.offset[k];
    if (from >= start && from + kTile <= end) {
      const InputPixels one{pixels.in, {pixels.of.columns + k, pixels.of.offset + k, 1}, pixels.mask};
      if (pixels.mask) pack_input<true>(one, panel);
      else pack_input<false>(one, panel);
      continue;
    }
    const auto* mask = reinterpret_cast<const int32_t*>(pixels.mask);
    if (mask) mask += pixels.of.columns[k].tap * kTile;
    for (int p = 0; p < kTile; ++p) {
      const bool known = from + p >= start && from + p < end && (!mask || mask[p]);
      panel[p] = known ? from[p] : 0.0f;
    }
  }
}

}  // namespace SPP_ISA
}  // namespace spp
