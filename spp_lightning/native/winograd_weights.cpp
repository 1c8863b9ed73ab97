// The weights of Winograd's minimal filtering.
#include "winograd_weights.h"

#include <algorithm>
#include <cmath>

namespace spp {
namespace {

constexpr int kMostReach = reach_of(4);

// The matrix G: the values at the points of the polynomial that three weights are, scaled so that the inputs'
// factors stay simple.
struct WeightFactors {
  double rows[kMostReach][kTaps];

  explicit WeightFactors(int side) : rows{} {
    constexpr double a = kNear, b = kFar;
    const std::vector<double> points =
        side == 4 ? std::vector<double>{0, a, -a, b, -b} : std::vector<double>{0, 1, -1};
    for (size_t i = 0; i < points.size(); ++i) {
      double share = 1;
      for (size_t j = 0; j < points.size(); ++j)
        if (i != j) share *= points[i] - points[j];
      for (int n = 0; n < kTaps; ++n) rows[i][n] = std::pow(points[i], n) / share;
    }
    rows[points.size()][kTaps - 1] = 1;  // at infinity
  }
};

using BlockOfKernels = double[kTaps][kTaps][kChannelBlock];

// The weights of column k for a channel block of filters.
void unpack(const Plan& plan, int block, size_t k, BlockOfKernels& weight) {
  const int tap = plan.columns[k].tap, tiles_of_block = kChannelBlock / kTileFilters;
  const int tiles = std::min(tiles_of_block, plan.group_tiles() - block * tiles_of_block);
  for (int tile = 0; tile < tiles; ++tile) {
    const size_t at = (block * tiles_of_block + tile) * plan.columns.size() + k;
    for (int f = 0; f < kTileFilters; ++f)
      weight[tap / kTaps][tap % kTaps][tile * kTileFilters + f] = plan.weights.floats[at * kTileFilters + f];
  }
}

// U = G · weight · Gᵀ, to the places from `at` on.
void transform(const WeightFactors& factors, const BlockOfKernels& weight, WinogradWeights& to, size_t at) {
  const int reach = reach_of(to.side);
  double half[kMostReach][kTaps][kChannelBlock] = {};
  for (int i = 0; i < reach; ++i)
    for (int n = 0; n < kTaps; ++n)
      for (int j = 0; j < kTaps; ++j)
        for (int f = 0; f < kChannelBlock; ++f) half[i][j][f] += factors.rows[i][n] * weight[n][j][f];
  float* out = to.floats.get() + at;
  for (int i = 0; i < reach; ++i)
    for (int j = 0; j < reach; ++j) {
      double sum[kChannelBlock] = {};
      for (int n = 0; n < kTaps; ++n)
        for (int f = 0; f < kChannelBlock; ++f) sum[f] += factors.rows[j][n] * half[i][n][f];
      for (int f = 0; f < kChannelBlock; ++f)
        out[(i * reach + j) * to.place_stride + f] = static_cast<float>(sum[f]);
    }
}

}  // namespace

WinogradWeights::WinogradWeights(const Plan& plan, int tile_side)
    : side(tile_side),
      channels(plan.geometry.channels),
      block_stride(static_cast<size_t>(channels) * kChannelBlock),
      place_stride(plan.group_blocks() * block_stride),
      floats(aligned_floats(places_of(side) * place_stride)) {
  bias.assign(static_cast<size_t>(plan.group_blocks()) * kChannelBlock, 0.0f);
  std::copy_n(plan.bias.data(), plan.geometry.filters, bias.data());
  const WeightFactors factors(side);
  for (int block = 0; block < plan.group_blocks(); ++block) {
    size_t k = 0;
    for (int channel = 0; channel < channels; ++channel) {
      BlockOfKernels weight = {};  // zeros where a column is pruned
      for (; k < plan.columns.size() && plan.sources[plan.columns[k].source].channel == channel; ++k)
        unpack(plan, block, k, weight);
      transform(factors, weight, *this, block * block_stride + static_cast<size_t>(channel) * kChannelBlock);
    }
  }
}

}  // namespace spp
