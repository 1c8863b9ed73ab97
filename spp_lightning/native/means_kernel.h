// The mean of every plane: a global average pool, or the first half of a gate.
//
// The order of a sum follows from the number of pixels alone.
#pragma once

#include "linear.h"
#include "threads.h"

namespace spp {
namespace SPP_ISA {

inline float mean_of_plane(const float* in, int64_t pixels) {
  Vector sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= pixels; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[v] += load(in + i + v * kLanes);
  for (; i + kLanes <= pixels; i += kLanes) sums[0] += load(in + i);
  float total = 0;
  for (; i < pixels; ++i) total += in[i];
  return (sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + total) / static_cast<float>(pixels);
}

inline void plane_means(const float* x, int64_t planes, int64_t pixels, int threads, float* out) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t plane = 0; plane < planes; ++plane) out[plane] = mean_of_plane(x + plane * pixels, pixels);
}

}  // namespace SPP_ISA
}  // namespace spp
