#include "plan.h"

#include <algorithm>
#include <cstring>

#include "winograd_weights.h"

namespace spp {

Plan::Plan(const Geometry& g, const int32_t* numbers, int32_t num_columns, const float* weight,
           const float* biases, float least, float most, Activation function, const EpilogueOp* ops,
           int32_t num_ops, bool bfloat16, const PairKernel* by)
    : KeptColumns(g, numbers, num_columns), pair_kernel(by), low(least), high(most), activation(function),
      epilogue(ops, ops + num_ops) {
  bias.assign(g.filters + 2 * kTileFilters, 0.0f);  // tiles may reach beyond the last filter
  if (biases != nullptr) std::copy(biases, biases + g.filters, bias.begin());
  weights = pack(weight, {1, kTileFilters, 1});
  const bool is_tiled = pair_kernel != nullptr && pair_kernel->is_tiled;
  if (bfloat16) pairs = pack(weight, is_tiled ? TileLayout{2, 16, 16} : TileLayout{2, kTileFilters, 1});
  if (is_depthwise()) depthwise.assign(weight, weight + num_columns);
}

// Also finds the source planes that the columns read.
KeptColumns::KeptColumns(const Geometry& g, const int32_t* numbers, int32_t count) : geometry(g) {
  for (int d = 0; d < 2; ++d) margin[d] = (g.kernel[d] - 1) * g.dilation[d] / g.stride[d];
  const int taps = g.kernel[0] * g.kernel[1], group_channels = g.channels / g.groups;
  group_start.assign(g.groups + 1, 0);
  for (int32_t k = 0; k < count; ++k) {
    const int channel = numbers[k] / taps, tap = numbers[k] % taps;
    const int at[2] = {tap / g.kernel[1] * g.dilation[0], tap % g.kernel[1] * g.dilation[1]};
    const SourcePlane plane{channel, {at[0] % g.stride[0], at[1] % g.stride[1]}};
    // Columns are sorted by channel: a channel's source planes are the last ones.
    int index = static_cast<int>(sources.size()) - 1;
    const auto is_same = [&](const SourcePlane& s) {
      return s.phase[0] == plane.phase[0] && s.phase[1] == plane.phase[1];
    };
    while (index >= 0 && sources[index].channel == channel && !is_same(sources[index])) --index;
    if (index < 0 || sources[index].channel != channel) {
      index = static_cast<int>(sources.size());
      sources.push_back(plane);
    }
    columns.push_back({index, at[0] / g.stride[0], at[1] / g.stride[1], tap});
    ++group_start[channel / group_channels + 1];
  }
  for (int i = 0; i < g.groups; ++i) group_start[i + 1] += group_start[i];
}

// Of two columns of a step, each a bfloat16, the first one gets the lower half of the number.
TileWeights Plan::pack(const float* weight, const TileLayout& layout) const {
  const int rows = layout.filters, unit = layout.columns_of_step * layout.steps_of_group;
  const int filters = (group_filters() + rows - 1) / rows * rows;
  TileWeights packed;
  size_t floats = 0;
  for (int g = 0; g < geometry.groups; ++g) {
    packed.start.push_back(floats);
    floats += static_cast<size_t>(filters) * ((group_columns(g) + unit - 1) / unit) * layout.steps_of_group;
  }
  packed.floats = aligned_floats(floats + 2 * kTileFilters);
  float* out = packed.floats.get();
  for (int g = 0; g < geometry.groups; ++g)
    for (int first = 0; first < filters; first += rows)
      for (int begin = group_start[g]; begin < group_start[g + 1]; begin += unit)
        for (int filter = first; filter < first + rows; ++filter)
          for (int k = begin; k < begin + unit; k += layout.columns_of_step) {
            const int count = std::min(layout.columns_of_step, group_start[g + 1] - k);
            uint32_t words[2] = {};
            if (filter < group_filters() && count > 0)
              std::memcpy(words, weight + filter * columns.size() + k, sizeof(float) * count);
            if (layout.columns_of_step == 2) words[0] = words[0] >> 16 | (words[1] & 0xffff0000u);
            std::memcpy(out++, words, sizeof(float));
          }
  return packed;
}

std::shared_ptr<const BlockedWeights> Plan::blocked_weights() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (auto known = blocked_weights_.lock()) return known;
  auto made = std::make_shared<BlockedWeights>();
  const int filters = block_filters();
  const size_t group_bias = static_cast<size_t>(group_blocks()) * kChannelBlock;
  made->bias.assign(block_groups() * group_bias, 0.0f);
  for (int g = 0; g < block_groups(); ++g)
    std::copy_n(bias.data() + g * filters, filters, made->bias.data() + g * group_bias);
  if (is_depthwise()) pack_depthwise(*made);
  else pack_blocks(*made);
  blocked_weights_ = made;
  return made;
}

void Plan::pack_blocks(BlockedWeights& made) const {
  const size_t group_floats = static_cast<size_t>(group_blocks()) * kChannelBlock;
  const size_t floats = columns.size() * group_floats;
  made.floats = aligned_floats(floats);
  std::fill_n(made.floats.get(), floats, 0.0f);
  for (int g = 0; g < geometry.groups; ++g) {
    made.start.push_back(group_start[g] * group_floats);
    const size_t count = group_columns(g);
    const float* from = weights.of_group(g);
    for (int filter = 0; filter < group_filters(); filter += kTileFilters) {
      float* out = made.floats.get() + made.start[g] +
                   filter / kChannelBlock * count * kChannelBlock + filter % kChannelBlock;
      for (size_t k = 0; k < count; ++k, from += kTileFilters, out += kChannelBlock)
        std::copy_n(from, kTileFilters, out);
    }
  }
}

void Plan::pack_depthwise(BlockedWeights& made) const {
  const size_t block_floats = static_cast<size_t>(taps()) * kChannelBlock;
  made.floats = aligned_floats(group_blocks() * block_floats);
  std::fill_n(made.floats.get(), group_blocks() * block_floats, 0.0f);
  made.start = {0};
  for (int c = 0; c < geometry.channels; ++c) {
    const float* from = weights.of_group(c);  // the first filter of a tile is the only one
    float* block = made.floats.get() + c / kChannelBlock * block_floats + c % kChannelBlock;
    for (int k = group_start[c]; k < group_start[c + 1]; ++k, from += kTileFilters)
      block[columns[k].tap * kChannelBlock] = *from;
  }
}

std::shared_ptr<const WinogradWeights> Plan::winograd_weights(int side) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& made = winograd_weights_[side == 4];
  if (!made) made = std::make_shared<const WinogradWeights>(*this, side);
  return made;
}

}  // namespace spp
