// Winograd's minimal filtering of 3×3 kernels, F(4×4, 3×3): a tile of 4×4 outputs takes 36 products per
// channel and filter instead of 144 (Lavin and Gray, Fast algorithms for convolutional neural networks,
// 2016). Of a polynomial product's points, 0, ±5/8, ±3/2 and infinity lose the fewest digits: with 256
// channels, errors are some 2.5e-6 of the largest output instead of 3e-7.
#pragma once

#include "column_conv.h"

namespace spp {

constexpr int kTaps = 3;   // of a kernel, per side
constexpr int kSide = 4;   // outputs of a tile, per side
constexpr int kReach = 6;  // inputs under them
constexpr int kPlaces = kReach * kReach;  // products per channel and filter
constexpr float kNear = 0.625f, kFar = 1.5f;

// [place][chunk of filters][channel][filter of the chunk]
struct WinogradWeights {
  int channels;
  size_t chunk_stride, place_stride;
  AlignedFloats floats;
  std::vector<float> bias;  // [chunk][filter of the chunk]

  explicit WinogradWeights(const Plan& plan);
};

}  // namespace spp
