// Winograd's minimal filtering of 3×3 kernels (Lavin and Gray, Fast algorithms for convolutional neural
// networks, 2016): a tile of 4×4 outputs takes 36 products per channel and filter instead of 144, one of
// 2×2 takes 16 instead of 36. Both are products of polynomials, known from their values at some points.
// Of those for tiles of 4×4, 0, ±5/8, ±3/2 and infinity lose the fewest digits: with 256 channels, errors
// are some 2.8e-6 of the largest output, where column after column gives 1.6e-6. Tiles of 2×2 take 0, ±1
// and infinity, and give 0.7e-6.
#pragma once

#include "plan.h"

namespace spp {

constexpr int kTaps = 3;  // of a kernel, per side
constexpr float kNear = 0.625f, kFar = 1.5f;

// The products of a tile of so many outputs per side are the values at so many places.
constexpr int reach_of(int side) { return side + kTaps - 1; }  // inputs under them, per side
constexpr int places_of(int side) { return reach_of(side) * reach_of(side); }

// [place][channel block of filters][channel][filter of the block]
struct WinogradWeights {
  int side, channels;
  size_t block_stride, place_stride;
  AlignedFloats floats;
  std::vector<float> bias;  // [channel block][filter of the block]

  WinogradWeights(const Plan& plan, int side);
};

}  // namespace spp
