// From NCHW planes to the channel-blocked layout, in which the channels of a pixel lie next to each other, and
// back.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace spp {
namespace SPP_ISA {

// Rows become columns.
inline __attribute__((always_inline)) void transpose(Vector (&block)[kLanes]) {
  Vector next[kLanes];
  // Every round interleaves the two halves, as one shuffles a deck of cards.
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i)
      interleave(block[i], block[i + kLanes / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = next[i];
  }
}

// The first `count` channels at kLanes pixels from `in` on, pixel by pixel; zeros for the other channels.
inline void transpose_tile(const float* in, int64_t plane, int count, int pixels, int64_t pitch,
                           float* out) {
  Vector block[kLanes];
  for (int c = 0; c < kLanes; ++c)
    block[c] = c >= count ? Vector{}
               : pixels < kLanes ? load_lanes(in + c * plane, 0, pixels) : load(in + c * plane);
  transpose(block);
  for (int p = 0; p < pixels; ++p) store(out + p * pitch, block[p]);
}

// Planes of `channels`, `pixels` of each, to (pixels, pitch).
inline void transpose_planes(const float* in, int64_t plane, int channels, int pixels, int64_t pitch,
                             float* out) {
  for (int c = 0; c < channels; c += kLanes)
    for (int p = 0; p < pixels; p += kLanes)
      transpose_tile(in + c * plane + p, plane, std::min(kLanes, channels - c),
                     std::min(kLanes, pixels - p), pitch, out + p * pitch + c);
}

// The way back. A tile of kLanes pixels is read whole, also behind the last one. Non-temporal stores need planes
// of whole vectors, and the first pixels at an aligned address.
inline void transpose_back(const float* in, int64_t pitch, int channels, int pixels, int64_t plane,
                           float* out, bool non_temporal) {
  for (int c = 0; c < channels; c += kLanes)
    for (int p = 0; p < pixels; p += kLanes) {
      Vector block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(in + (p + i) * pitch + c);
      transpose(block);
      const int count = std::min(kLanes, channels - c);
      float* to = out + c * plane + p;
      if (p + kLanes <= pixels && count == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store_output(to + i * plane, block[i], non_temporal);
      } else {
        for (int i = 0; i < count; ++i) store_lanes(to + i * plane, block[i], pixels - p);
      }
    }
}

}  // namespace SPP_ISA
}  // namespace spp
