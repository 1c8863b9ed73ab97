// The linear layer behind a chain's last convolution. It isn't pruned; it is here so that a chain is one call.
//
// The terms of a sum are added lane by lane, then the lanes in pairs: the order depends on nothing else.
#pragma once

#include "standard.h"
#include "vectors.h"

namespace spp {
namespace SPP_ISA {

inline float sum_lanes(Vector v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

// Outputs [begin, end) of one image.
inline void linear_outputs(const Linear& layer, const float* x, int begin, int end, float* out) {
  constexpr int kAtOnce = 4;
  const int in = layer.in_features, whole = in / kLanes * kLanes;
  float rest[kLanes] = {};
  copy_few(rest, x + whole, in - whole);
  for (int o = begin; o < end; o += kAtOnce) {
    const int count = std::min(kAtOnce, end - o);
    const float* row[kAtOnce];
    for (int r = 0; r < kAtOnce; ++r)
      row[r] = layer.weight + static_cast<int64_t>(o + std::min(r, count - 1)) * in;
    Vector sum[kAtOnce] = {};
    for (int i = 0; i < whole; i += kLanes) {
      const Vector v = load(x + i);
#pragma GCC unroll 4
      for (int r = 0; r < kAtOnce; ++r) sum[r] += load(row[r] + i) * v;
    }
    for (int r = 0; r < count; ++r) {
      float weights[kLanes] = {};
      copy_few(weights, row[r] + whole, in - whole);
      sum[r] += load(weights) * load(rest);
      out[o + r] = sum_lanes(sum[r]) + (layer.bias ? layer.bias[o + r] : 0.0f);
    }
  }
}

inline void linear_batch(const Linear& layer, const float* x, int64_t batch, int threads, float* out) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch > 1)
  for (int64_t image = 0; image < batch; ++image)
    linear_outputs(layer, x + image * layer.in_features, 0, layer.out_features,
                   out + image * layer.out_features);
}

}  // namespace SPP_ISA
}  // namespace spp
