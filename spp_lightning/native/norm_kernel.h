// A batch norm that no convolution takes in, its clamp, and the concatenation before it, in one pass.
#pragma once

#include <cmath>

#include "geometry.h"
#include "memory.h"
#include "threads.h"
#include "vectors.h"

namespace spp {
namespace SPP_ISA {

struct ChannelNorm {
  const float* in;
  float scale, shift;
};

inline void norm_plane(const ChannelNorm& of, float low, float high, int64_t pixels, float* out) {
  const auto norm = [&](Vector x) { return clamp(of.scale * x + of.shift, low, high); };
  int64_t i = 0;
  for (; i + kLanes <= pixels; i += kLanes) store(out + i, norm(load(of.in + i)));
  const int rest = static_cast<int>(pixels - i);
  if (rest > 0) store_lanes(out + i, norm(load_lanes(of.in + i, 0, rest)), rest);
}

// Of every channel of an image.
inline void channel_norms(const Norm& norm, const ConcatPart* parts, int count, int64_t image, int64_t pixels,
                          ChannelNorm* out) {
  int c = 0;
  for (int i = 0; i < count; ++i) {
    const float* in = parts[i].data + image * parts[i].channels * pixels;
    for (int64_t own = 0; own < parts[i].channels; ++own, ++c, in += pixels) {
      const float deviation = std::sqrt(norm.variance[c] + norm.eps);
      const float scale = (norm.weight ? norm.weight[c] : 1.0f) / deviation;
      out[c] = {in, scale, (norm.bias ? norm.bias[c] : 0.0f) - norm.mean[c] * scale};
    }
  }
}

// `read` tells which channels are wanted: 0 for one that is left as it is; null if all are.
inline void norm_parts(const Norm& norm, const ConcatPart* parts, int count, const uint8_t* read, int64_t batch,
                       int64_t pixels, int threads, float* out) {
  thread_local Buffer channels_buffer;
  ChannelNorm* channels = channels_buffer.get<ChannelNorm>(norm.channels);
  for (int64_t image = 0; image < batch; ++image, out += norm.channels * pixels) {
    channel_norms(norm, parts, count, image, pixels, channels);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int c = 0; c < norm.channels; ++c)
      if (!read || read[c]) norm_plane(channels[c], norm.low, norm.high, pixels, out + c * pixels);
  }
}

}  // namespace SPP_ISA
}  // namespace spp
