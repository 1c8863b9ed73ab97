// The gradient of the kept columns.
//
// The gradient of the output is transposed, so that the filters of a pixel lie next to each other: a vector of
// filters times one pixel under each of some columns is added to sums in registers while the kernel runs over
// the pixels. All lanes have something to do, whatever the images' size.
#pragma once

#include "source_planes.h"
#include "transpose.h"

namespace spp {
namespace SPP_ISA {

// Columns and vectors of filters that are summed up together; few filters take more columns.
constexpr int kManyFilters = kLanes == 16 ? 4 : 2, kFewFilters = kManyFilters / 2;
constexpr int kFewColumns = 3, kManyColumns = 4;  // or a multiple of them
constexpr int64_t kTransposedFloats = 24 * 1024;  // of the gradient that is transposed at once

struct Rows {
  int count, width;
  int64_t source_pitch, transposed_pitch;
};

// sum[column][filter] += Σ_pixels transposed[pixel][filter] · source[column][pixel].
template <int kColumns, int kV>
inline void add_columns(const float* source, const int64_t* offset, int columns,
                        const float* transposed, const Rows& rows, float* sum) {
  Vector total[kColumns][kV];
#pragma GCC unroll 12
  for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) total[c][v] = Vector{};
  const float* from[kColumns];  // a column beyond the last one is the last one again
  for (int c = 0; c < kColumns; ++c) from[c] = source + offset[std::min(c, columns - 1)];
  for (int row = 0; row < rows.count; ++row) {
    const int64_t start = row * rows.source_pitch;
    for (int col = 0; col < rows.width; ++col, transposed += rows.transposed_pitch) {
      Vector dy[kV];
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) dy[v] = load(transposed + v * kLanes);
#pragma GCC unroll 12
      for (int c = 0; c < kColumns; ++c) {
        const float x = from[c][start + col];
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) total[c][v] += x * dy[v];
      }
    }
  }
#pragma GCC unroll 12
  for (int c = 0; c < kColumns; ++c) {
    if (c >= columns) break;
    float* out = sum + c * rows.transposed_pitch;
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) store(out + v * kLanes, load(out + v * kLanes) + total[c][v]);
  }
}

// All columns of a conv group with some vectors of its filters, for some rows; most of them with as many
// at once as fill the registers.
template <int kV, int kColumns, int kMost>
inline void add_filters(const float* source, const int64_t* offset, int columns,
                        const float* transposed, const Rows& rows, float* sum) {
  const auto add = [&](auto at_once, int k) {
    constexpr int kAtOnce = decltype(at_once)::value * kColumns;
    add_columns<kAtOnce, kV>(source, offset + k, std::min(kAtOnce, columns - k), transposed, rows,
                             sum + k * rows.transposed_pitch);
    return k + kAtOnce;
  };
  for (int k = 0; k < columns;) {
    const int left = columns - k;
    if (left > (kMost - 1) * kColumns) k = add(std::integral_constant<int, kMost>(), k);
    else if (left > kColumns) k = add(std::integral_constant<int, 2>(), k);
    else k = add(std::integral_constant<int, 1>(), k);
  }
}

inline void add_rows(const float* source, const int64_t* offset, int columns, const float* transposed,
                     const Rows& rows, float* sum) {
  const int vectors = static_cast<int>(rows.transposed_pitch / kLanes);
  for (int v = 0; v < vectors;) {
    const int left = vectors - v;
    const int take = left >= kManyFilters ? kManyFilters : left >= kFewFilters ? kFewFilters : 1;
    const auto add = take == kManyFilters  ? add_filters<kManyFilters, kFewColumns, 2>
                     : take == kFewFilters ? add_filters<kFewFilters, kManyColumns, 3>
                                           : add_filters<1, kManyColumns, 3>;
    add(source, offset, columns, transposed + v * kLanes, rows, sum + v * kLanes);
    v += take;
  }
}

// How the gradient of a layer is transposed.
struct Transposing {
  int64_t pitch;     // filters of a conv group, in whole vectors
  int rows_at_once;  // so that they stay in the cache

  Transposing(const Plan& plan, const KernelConfig& config) {
    pitch = (plan.group_filters() + kLanes - 1) / kLanes * static_cast<int64_t>(kLanes);
    const int64_t rows = kTransposedFloats / std::max<int64_t>(1, pitch * config.conv_width);
    rows_at_once = static_cast<int>(std::clamp<int64_t>(rows, 1, std::max(1, config.conv_height)));
  }
};

// Σ_pixels grad[filter, pixel] · source[column's offset + pixel], added to (columns, pitch) sums.
inline void add_weight_gradient(const BackwardPass& pass, const Shapes& s, const Transposing& how,
                                const int64_t* offset, const float* sources, const float* grad,
                                float* transposed, float* sum) {
  const Plan& plan = *pass.plan;
  const int filters = plan.group_filters(), width = pass.conv_width;
  const int64_t pitch = how.pitch;
  for (int group = 0; group < plan.geometry.groups; ++group) {
    const int first = plan.group_start[group], columns = plan.group_columns(group);
    if (columns == 0) continue;
    const float* planes = grad + group * filters * s.conv_plane;
    for (int row = 0; row < pass.conv_height; row += how.rows_at_once) {
      const int count = std::min(how.rows_at_once, pass.conv_height - row);
      transpose_planes(planes + static_cast<int64_t>(row) * width, s.conv_plane, filters,
                       count * width, pitch, transposed);
      add_rows(sources + static_cast<int64_t>(row) * s.width, offset + first, columns, transposed,
               {count, width, s.width, pitch}, sum + first * pitch);
    }
  }
}

}  // namespace SPP_ISA
}  // namespace spp
