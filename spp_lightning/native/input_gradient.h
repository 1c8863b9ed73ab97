// The gradient of the input.
//
// Tiles of pixels of the output's gradient, next to each other without regard to rows, by some columns stay in
// registers while the kernel runs over the filters. A column's sums are then added to where the column reads
// its source plane, row by row.
#pragma once

#include "pixel_kernel.h"

namespace spp {
namespace SPP_ISA {

// Pixels of a tile that lie next to each other in a source plane, too: a power of two of them.
struct Run {
  int32_t pixel, count;  // in the tile
  int64_t place;         // in the source plane
};

struct Runs {
  int count;
  bool whole;  // each a vector of the tile
  Run run[kTile];
};

inline Runs find_runs(int begin, int end, int conv_width, int source_width) {
  Runs runs;
  runs.count = 0;
  runs.whole = true;
  for (int pixel = begin; pixel < end;) {
    const int row = pixel / conv_width, col = pixel % conv_width;
    const int left = std::min({kLanes, conv_width - col, end - pixel});
    int count = 1;
    while (2 * count <= left) count *= 2;
    runs.run[runs.count++] = {pixel - begin, count, static_cast<int64_t>(row) * source_width + col};
    runs.whole = runs.whole && count == kLanes;
    pixel += count;
  }
  return runs;
}

template <int kCount>
inline void add_run(const float* sums, int64_t stride, const int64_t* offset, int columns,
                    float* sources) {
  for (int r = 0; r < columns; ++r, sums += stride) {
    float* out = sources + offset[r];
    for (int i = 0; i < kCount; ++i) out[i] += sums[i];
  }
}

// The pixels of each filter's plane, in place.
struct InPlace {
  static constexpr bool kPaired = false;
  const float* const* pixels;  // of each vector, in the first plane
  const int64_t* offset;       // of each plane

  template <int kV>
  inline __attribute__((always_inline)) void load_pixels(int filter, Vector (&x)[kV]) const {
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) x[v] = load(pixels[v] + offset[filter]);
  }
};

// Adds the tile's products with some columns to the source planes.
template <int kTiles, int kV>
void scatter_tile(const float* weight, int filters, const float* const* pixels,
                  const int64_t* filter_offset, const int64_t* column_offset, int columns,
                  const Runs& runs, float* sources) {
  constexpr int kRows = kTiles * kTileFilters;
  float part[kRows][kV * kLanes];
  Vector sum[kRows][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) sum[r][v] = Vector{};
  add_products<kTiles, kV>(weight, static_cast<size_t>(filters) * kTileFilters, filters,
                           InPlace{pixels, filter_offset}, sum);
  if (runs.whole && columns == kRows) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float* out = sources + column_offset[r];
#pragma GCC unroll 3
      for (int v = 0; v < kV; ++v) {
        float* at = out + runs.run[v].place;
        store(at, load(at) + sum[r][v]);
      }
    }
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) store(part[r] + v * kLanes, sum[r][v]);
  for (int i = 0; i < runs.count; ++i) {
    const Run& run = runs.run[i];
    const auto add = run.count == 16  ? add_run<16>
                     : run.count == 8 ? add_run<8>
                     : run.count == 4 ? add_run<4>
                     : run.count == 2 ? add_run<2>
                                      : add_run<1>;
    add(part[0] + run.pixel, kV * kLanes, column_offset, columns, sources + run.place);
  }
}

// The weights of all columns in the order in which the kernel reads them.
struct PackedColumns {
  std::vector<int> first_tile;         // of each conv group, and their number
  std::vector<int64_t> offset;         // of each column in the source planes
  std::vector<float> weight;           // [tile of columns][filter][column of the tile]
  std::vector<int64_t> filter_offset;  // of each of a group's filters in the gradient's planes
};

// Adds those of a conv group, in the order of their places in the source planes: neighbours then write to
// different planes, and an addition needn't wait for the one before it.
inline void pack_group(const Plan& plan, int group, const float* weight, const Shapes& s,
                       PackedColumns& packed) {
  const int filters = plan.group_filters(), begin = plan.group_start[group];
  const int count = plan.group_columns(group);
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = begin + i;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    const Column &x = plan.columns[a], &y = plan.columns[b];
    return x.row != y.row ? x.row < y.row : x.col < y.col;
  });
  const int tiles = (count + kTileFilters - 1) / kTileFilters;
  for (int first = 0; first < tiles * kTileFilters; first += kTileFilters) {
    for (int i = first; i < first + kTileFilters; ++i)
      packed.offset.push_back(offset_in_sources(i < count ? plan.columns[order[i]] : Column{}, s));
    for (int f = 0; f < filters; ++f)
      for (int i = first; i < first + kTileFilters; ++i)
        packed.weight.push_back(i < count ? weight[f * plan.columns.size() + order[i]] : 0.0f);
  }
  packed.first_tile.push_back(packed.first_tile.back() + tiles);
}

inline PackedColumns pack_columns(const Plan& plan, const float* weight, const Shapes& s) {
  const int groups = plan.geometry.groups, filters = plan.group_filters();
  PackedColumns packed;
  packed.first_tile.push_back(0);
  for (int f = 0; f < filters; ++f) packed.filter_offset.push_back(f * s.conv_plane);
  packed.weight.reserve((plan.columns.size() + groups * static_cast<size_t>(kTileFilters)) * filters);
  for (int group = 0; group < groups; ++group) pack_group(plan, group, weight, s, packed);
  return packed;
}

// All columns of a conv group, given the gradient of its filters' planes.
inline void scatter_group(const BackwardPass& pass, const Shapes& s, const PackedColumns& packed,
                          int group, const float* planes, float* sources) {
  const Plan& plan = *pass.plan;
  const int filters = plan.group_filters(), pixels = static_cast<int>(s.conv_plane);
  for (int begin = 0; begin < pixels; begin += kTile) {
    const int end = std::min(begin + kTile, pixels), kept = (end - begin + kLanes - 1) / kLanes;
    const Runs runs = find_runs(begin, end, pass.conv_width, s.width);
    const float* from[kVectors];
    for (int v = 0; v < kept; ++v) from[v] = planes + begin + v * kLanes;
    int left = plan.group_columns(group);
    for (int tile = packed.first_tile[group], tiles; left > 0; tile += tiles) {
      const float* weight = packed.weight.data() + static_cast<size_t>(tile) * filters * kTileFilters;
      const int64_t* at = packed.offset.data() + static_cast<size_t>(tile) * kTileFilters;
      tiles = kLanes == 16 && left > kTileFilters ? 2 : 1;
      const int columns = std::min(left, tiles * kTileFilters);
      constexpr int kTwo = kLanes == 16 ? 2 : 1;
      const auto scatter = tiles == 2 ? (kept == 3   ? scatter_tile<kTwo, 3>
                                         : kept == 2 ? scatter_tile<kTwo, 2>
                                                     : scatter_tile<kTwo, 1>)
                                      : (kept == 3   ? scatter_tile<1, 3>
                                         : kept == 2 ? scatter_tile<1, 2>
                                                     : scatter_tile<1, 1>);
      scatter(weight, filters, from, packed.filter_offset.data(), at, columns, runs, sources);
      left -= columns;
    }
  }
}

// Writes a source plane's gradient to its channel: the way back of copy_plane.
inline void write_back(const Geometry& g, const SourcePlane& source, const float* in, int height,
                       int width, const Shapes& s, float* channel) {
  const int sw = g.stride[1], first_col = source.phase[1] - g.padding[1];
  const auto [begin, end] = Inside(g, source, width, s);
  for (int y = 0; y < s.height; ++y, in += s.width) {
    const int row = y * g.stride[0] + source.phase[0] - g.padding[0];
    if (row < 0 || row >= height) continue;
    float* out = channel + static_cast<int64_t>(row) * width + first_col;
    if (sw == 1) copy_row(out + begin, in + begin, end - begin);
    else
      for (int x = begin; x < end; ++x) out[static_cast<int64_t>(x) * sw] = in[x];
  }
}

// sources[column's offset + pixel] += Σ_filters weight · grad[filter, pixel], of one image, and that to
// its channels. There is room for a vector behind the gradient's planes.
inline void input_gradient(const BackwardPass& pass, const Shapes& s, const PackedColumns& packed,
                           const float* grad, float* sources, float* out) {
  const Plan& plan = *pass.plan;
  const Geometry& g = plan.geometry;
  const int filters = plan.group_filters();
  std::memset(sources, 0, sizeof(float) * plan.sources.size() * s.source_plane);
  for (int group = 0; group < g.groups; ++group)
    scatter_group(pass, s, packed, group, grad + group * filters * s.conv_plane, sources);
  std::memset(out, 0, sizeof(float) * g.channels * s.input_plane);
  for (size_t i = 0; i < plan.sources.size(); ++i)
    write_back(g, plan.sources[i], sources + i * s.source_plane, pass.height, pass.width, s,
               out + plan.sources[i].channel * s.input_plane);
}

}  // namespace SPP_ISA
}  // namespace spp
