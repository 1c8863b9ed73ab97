// The weights of Winograd's minimal filtering.
#include "winograd.h"

#include "common.h"

namespace spp {
namespace {

constexpr int kMostReach = reach_of(4);

// What a row or column of three weights becomes: its polynomial's values at the points, shared out so
// that the inputs' factors stay simple.
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

}  // namespace

WinogradWeights::WinogradWeights(const Plan& plan, int tile_side)
    : side(tile_side),
      channels(plan.geometry.channels),
      chunk_stride(static_cast<size_t>(channels) * kChunk),
      place_stride(plan.group_chunks() * chunk_stride),
      floats(aligned_floats(places_of(side) * place_stride)) {
  const WeightFactors factors(side);
  const int reach = reach_of(side);
  const size_t columns = plan.columns.size();
  const int filters = plan.geometry.filters;
  bias.assign(static_cast<size_t>(plan.group_chunks()) * kChunk, 0.0f);
  std::copy_n(plan.bias.data(), filters, bias.data());
  for (int chunk = 0; chunk < plan.group_chunks(); ++chunk) {
    const int blocks = std::min(kChunk / kBlock, plan.group_blocks() - chunk * (kChunk / kBlock));
    size_t k = 0;
    for (int channel = 0; channel < channels; ++channel) {
      double weight[kTaps][kTaps][kChunk] = {};  // zeros where a column is pruned
      for (; k < columns && plan.sources[plan.columns[k].source].channel == channel; ++k)
        for (int block = 0; block < blocks; ++block) {
          const size_t at = (chunk * (kChunk / kBlock) + block) * columns + k;
          const int tap = plan.columns[k].tap;
          for (int f = 0; f < kBlock; ++f)
            weight[tap / kTaps][tap % kTaps][block * kBlock + f] = plan.packed[at * kBlock + f];
        }
      double half[kMostReach][kTaps][kChunk] = {};
      for (int i = 0; i < reach; ++i)
        for (int n = 0; n < kTaps; ++n)
          for (int j = 0; j < kTaps; ++j)
            for (int f = 0; f < kChunk; ++f) half[i][j][f] += factors.rows[i][n] * weight[n][j][f];
      float* out = floats.get() + chunk * chunk_stride + static_cast<size_t>(channel) * kChunk;
      for (int i = 0; i < reach; ++i)
        for (int j = 0; j < reach; ++j) {
          double sum[kChunk] = {};
          for (int n = 0; n < kTaps; ++n)
            for (int f = 0; f < kChunk; ++f) sum[f] += factors.rows[j][n] * half[i][n][f];
          for (int f = 0; f < kChunk; ++f)
            out[(i * reach + j) * place_stride + f] = static_cast<float>(sum[f]);
        }
    }
  }
}

std::shared_ptr<const WinogradWeights> Plan::winograd_weights(int side) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& made = winograd_weights_[side == 4];
  if (!made) made = std::make_shared<const WinogradWeights>(*this, side);
  return made;
}

}  // namespace spp
