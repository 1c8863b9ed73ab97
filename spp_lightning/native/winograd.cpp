// The weights of Winograd's minimal filtering.
#include "winograd.h"

#include "common.h"

namespace spp {
namespace {

// What a row or column of three weights becomes: its polynomial's values at the points, shared out so
// that the inputs' factors stay simple.
struct WeightFactors {
  double rows[kReach][kTaps];

  WeightFactors() : rows{} {
    constexpr double a = kNear, b = kFar;
    const double points[] = {0, a, -a, b, -b};
    const double shares[] = {a * a * b * b, 2 * a * a * (a * a - b * b), 2 * a * a * (a * a - b * b),
                             2 * b * b * (b * b - a * a), 2 * b * b * (b * b - a * a)};
    for (int i = 0; i + 1 < kReach; ++i)
      for (int j = 0; j < kTaps; ++j) rows[i][j] = std::pow(points[i], j) / shares[i];
    rows[kReach - 1][kTaps - 1] = 1;  // at infinity
  }
};

}  // namespace

WinogradWeights::WinogradWeights(const Plan& plan)
    : channels(plan.geometry.channels),
      chunk_stride(static_cast<size_t>(channels) * kChunk),
      place_stride(plan.group_chunks() * chunk_stride),
      floats(aligned_floats(kPlaces * place_stride)) {
  static const WeightFactors factors;
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
      double half[kReach][kTaps][kChunk] = {};
      for (int i = 0; i < kReach; ++i)
        for (int n = 0; n < kTaps; ++n)
          for (int j = 0; j < kTaps; ++j)
            for (int f = 0; f < kChunk; ++f) half[i][j][f] += factors.rows[i][n] * weight[n][j][f];
      float* out = floats.get() + chunk * chunk_stride + static_cast<size_t>(channel) * kChunk;
      for (int i = 0; i < kReach; ++i)
        for (int j = 0; j < kReach; ++j) {
          double sum[kChunk] = {};
          for (int n = 0; n < kTaps; ++n)
            for (int f = 0; f < kChunk; ++f) sum[f] += factors.rows[j][n] * half[i][n][f];
          for (int f = 0; f < kChunk; ++f)
            out[(i * kReach + j) * place_stride + f] = static_cast<float>(sum[f]);
        }
    }
  }
}

std::shared_ptr<const WinogradWeights> Plan::winograd_weights() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!winograd_weights_) winograd_weights_ = std::make_shared<const WinogradWeights>(*this);
  return winograd_weights_;
}

}  // namespace spp
