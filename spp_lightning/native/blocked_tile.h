// The channel-blocked micro-kernels: vectors along the filters.
//
// A tile is some pixels of a row by one or two channel blocks of filters, or by one block of a depthwise layer.
#pragma once

#include <utility>

#include "plan.h"
#include "vectors.h"

namespace spp {
namespace SPP_ISA {

constexpr int kBlockVectors = kChannelBlock / kLanes;
constexpr int kBlocksAtOnce = kLanes == 16 ? 2 : 1;
constexpr int kMostPixels = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 2;  // that fit into the registers
// A column that lies inside the image.
struct Tap {
  int64_t pixel;   // under the first output of a tile
  int64_t weight;  // of the first filter of a block
};

struct BlockedTile {
  const float* weight;
  size_t weight_stride;  // floats from one block's weights to the next
  const Tap* taps;
  int count;
  const float* pixels;
  int64_t step;  // depthwise: floats from the pixel under an output to the one under the next output
  const float* bias;
  bool from_below, from_above;  // whether the sums are clamped
  float low, high;
  float* out;  // [block][pixel][filter]
  int64_t out_stride;
};

// Clamps the sums and stores them.
template <int kRows, int kPixels>
inline __attribute__((always_inline)) void store_tile(Vector (&sum)[kRows][kPixels], const BlockedTile& tile) {
  // All registers at once: a limit is loaded once.
  const auto every = [&](const auto& change) {
#pragma GCC unroll 4
    for (int v = 0; v < kRows; ++v)
#pragma GCC unroll 14
      for (int p = 0; p < kPixels; ++p) sum[v][p] = change(sum[v][p]);
  };
  if (tile.from_below) every([low = tile.low](Vector x) { return not_below(x, low); });
  if (tile.from_above) every([high = tile.high](Vector x) { return not_above(x, high); });
#pragma GCC unroll 4
  for (int v = 0; v < kRows; ++v) {
    float* out = tile.out + v / kBlockVectors * tile.out_stride + v % kBlockVectors * kLanes;
#pragma GCC unroll 14
    for (int p = 0; p < kPixels; ++p) store(out + p * kChannelBlock, sum[v][p]);
  }
}

template <int kRows, int kPixels>
inline __attribute__((always_inline)) void start_sums(const BlockedTile& tile, Vector (&sum)[kRows][kPixels]) {
#pragma GCC unroll 4
  for (int v = 0; v < kRows; ++v)
#pragma GCC unroll 14
    for (int p = 0; p < kPixels; ++p) sum[v][p] = load(tile.bias + v * kLanes);
}

// The input's pixels are kPitch floats apart.
template <int kPitch, int kBlocks, int kPixels>
void blocked_tile(const BlockedTile& tile) {
  constexpr int kRows = kBlocks * kBlockVectors;
  Vector sum[kRows][kPixels];
  start_sums<kRows, kPixels>(tile, sum);
  for (int k = 0; k < tile.count; ++k) {
    const Tap tap = tile.taps[k];
    const float *x = tile.pixels + tap.pixel, *weight = tile.weight + tap.weight;
    Vector w[kRows];
#pragma GCC unroll 4
    for (int v = 0; v < kRows; ++v)
      w[v] = load(weight + v / kBlockVectors * tile.weight_stride + v % kBlockVectors * kLanes);
#pragma GCC unroll 14
    for (int p = 0; p < kPixels; ++p) {
      const Vector pixel = broadcast(x[p * kPitch]);
#pragma GCC unroll 4
      for (int v = 0; v < kRows; ++v) sum[v][p] += w[v] * pixel;
    }
  }
  store_tile<kRows, kPixels>(sum, tile);
}

// Of a depthwise layer, whose channels are read like its weights, a vector at a time. kStride is the stride along
// the rows, or 0 for that of the tile's step.
template <int kStride, int kPixels>
void depthwise_tile(const BlockedTile& tile) {
  const int64_t step = kStride > 0 ? kStride * kChannelBlock : tile.step;
  Vector sum[kBlockVectors][kPixels];
  start_sums<kBlockVectors, kPixels>(tile, sum);
  for (int k = 0; k < tile.count; ++k) {
    const Tap tap = tile.taps[k];
    const float *x = tile.pixels + tap.pixel, *weight = tile.weight + tap.weight;
    Vector w[kBlockVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) w[v] = load(weight + v * kLanes);
#pragma GCC unroll 14
    for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v) sum[v][p] += w[v] * load(x + p * step + v * kLanes);
  }
  store_tile<kBlockVectors, kPixels>(sum, tile);
}

using TileKernel = void (*)(const BlockedTile&);

template <int kPitch, int kBlocks, int... kIndex>
inline const TileKernel* tile_kernels_of(std::integer_sequence<int, kIndex...>) {
  static constexpr TileKernel kKernels[] = {blocked_tile<kPitch, kBlocks, kIndex + 1>...};
  return kKernels;
}

// Those of one pixel, of two, and so on.
template <int kPitch>
inline const TileKernel* tile_kernels(bool one_block) {
  const auto sizes = std::make_integer_sequence<int, kMostPixels>();
  return one_block ? tile_kernels_of<kPitch, 1>(sizes) : tile_kernels_of<kPitch, kBlocksAtOnce>(sizes);
}

template <int kStride, int... kIndex>
inline const TileKernel* depthwise_kernels_of(std::integer_sequence<int, kIndex...>) {
  static constexpr TileKernel kKernels[] = {depthwise_tile<kStride, kIndex + 1>...};
  return kKernels;
}

inline const TileKernel* depthwise_kernels(int stride) {
  const auto sizes = std::make_integer_sequence<int, kMostPixels>();
  return stride == 1   ? depthwise_kernels_of<1>(sizes)
         : stride == 2 ? depthwise_kernels_of<2>(sizes)
                       : depthwise_kernels_of<0>(sizes);
}

// The next tile of `left` pixels, which are split into tiles as equal as can be.
inline int tile_pixels(int left) {
  const int tiles = (left + kMostPixels - 1) / kMostPixels;
  return (left + tiles - 1) / tiles;
}

}  // namespace SPP_ISA
}  // namespace spp
