// A stage of a chain: a layer for inputs of one shape, as the channel-blocked kernel runs it.
#pragma once

#include <memory>

#include "blocked_tile.h"
#include "epilogue.h"

namespace spp {
namespace SPP_ISA {

#ifdef SPP_EXACT_BUFFERS  // small images are cut into bands, too
constexpr size_t kBandFloats = 1 << 9;
#else
constexpr size_t kBandFloats = 1 << 16;  // of source planes that are copied at once
#endif

// Channel blocks one behind the other, each (height, width, kChannelBlock), with zeros at both ends of
// every row.
struct BlockedPlanes {
  float* first;
  int height, width, edge;

  int64_t pitch() const { return static_cast<int64_t>(width + 2 * edge) * kChannelBlock; }
  int64_t floats() const { return height * pitch(); }  // of a block
  float* row(int block, int y) const {
    return first + block * floats() + y * pitch() + edge * kChannelBlock;
  }

  void clear_edges(int block, int y) const {
    for (float* end : {row(block, y) - edge * kChannelBlock, row(block, y) + width * kChannelBlock})
      std::fill_n(end, edge * kChannelBlock, 0.0f);
  }
};

// A stage of a chain: a layer. Rows under which the same rows of the kernel lie inside the image have the
// same taps.
struct Stage {
  const Plan& plan;
  KernelConfig config;
  Shapes s;
  std::shared_ptr<const BlockedWeights> weights;
  const Stage* before;  // its output is the input; null if the input is an image
  BlockedPlanes input;  // where channel blocks are read: behind another stage, and by a depthwise layer
  int64_t row_step;     // floats from the pixels under a row to those under the next row
  std::vector<Tap> taps;
  std::vector<int> start;           // in `taps`: [kind of row][block group], and the end
  std::vector<int> row_kind;        // of each row
  RowSources rows;
  int edge = 0;                     // of the output: the next layer's padding
  int bands = 0;                    // of rows, whose source planes are copied; 0: not in bands

  Stage(const Plan& of, const KernelConfig& how, const Stage* stage_before, bool alone);

  int blocks() const { return plan.block_groups() * plan.group_blocks(); }
  bool reads_blocks() const { return before != nullptr || plan.is_depthwise(); }

  // What the next layer reads.
  BlockedPlanes output(float* first, int out_edge) const {
    return {first, s.out_height, s.out_width, out_edge};
  }

  // Rows of the output that a band makes.
  std::pair<int, int> out_rows(int band) const {
    const Partition part{band, bands};
    return {part.begin(s.out_height), part.end(s.out_height)};
  }

  // Rows of the source planes that those are made of.
  std::pair<int, int> source_rows(int band) const {
    auto [first, last] = out_rows(band);
    for (size_t i = rows.of.size() - 1; i > 0; --i) {
      first = first * rows.of[i].stride;
      last = std::min((last - 1) * rows.of[i].stride + rows.of[i].window, rows.of[i - 1].height);
    }
    return {first, last + plan.margin[0]};
  }

 private:
  void split_into_bands();
  void add_taps(int first, int last);
  int64_t pixel_of(const Column& c) const;
  int64_t pixel_of(int tap) const;
};

inline Stage::Stage(const Plan& of, const KernelConfig& how, const Stage* stage_before, bool alone)
    : plan(of), config(how), s(shapes_of(of, how, true)), weights(of.blocked_weights()),
      before(stage_before), rows(of, how, kBlocksAtOnce) {
  const Geometry& g = plan.geometry;
  input = {nullptr, how.height, how.width, g.padding[1]};
  s.copied = !reads_blocks() && (g.padding[0] != 0 || g.padding[1] != 0 || g.stride[0] != 1 ||
                         g.stride[1] != 1 || config.bfloat16);
  row_step = reads_blocks() ? g.stride[0] * input.pitch() : s.width;
  if (alone && !reads_blocks()) split_into_bands();
  int known_first = -1, known_last = -1;
  for (int y = 0; y < config.conv_height; ++y) {
    const int top = y * g.stride[0] - g.padding[0];
    int first = 0, last = g.kernel[0];
    while (first < last && top + first * g.dilation[0] < 0) ++first;
    while (first < last && top + (last - 1) * g.dilation[0] >= config.height) --last;
    if (first != known_first || last != known_last) add_taps(first, last);
    known_first = first;
    known_last = last;
    row_kind.push_back(static_cast<int>(start.size()) / plan.block_groups() - 1);
  }
  start.push_back(static_cast<int>(taps.size()));
}

// Where no row of the convolution is needed twice, and weights take less room than source planes, a thread
// copies some rows of these, which stay in its cache, and computes all filters of them.
inline void Stage::split_into_bands() {
  const size_t floats = plan.sources.size() * static_cast<size_t>(s.source_plane);
  const size_t weight_floats = plan.columns.size() * static_cast<size_t>(plan.group_filters());
  bool exact = s.copied && !config.bfloat16 && weight_floats <= floats;
  for (const RowSource& row : rows.of) exact = exact && row.window <= row.stride && !row.padding;
  // Threads that have an image each don't share it.
  const int threads = config.threads <= 1 || config.batch % config.threads == 0 ? 1 : config.threads;
  const int per_thread = (s.out_height + threads - 1) / threads;
  const bool even = int64_t{10} * s.out_height >= int64_t{9} * per_thread * threads;
  if (!exact || !even || (threads > 1 && per_thread < plan.margin[0])) return;
  // A band copies the margin below it, too, which must not be most of it.
  const int most = std::max(1, per_thread / std::max(1, 4 * plan.margin[0]));
  const size_t per_band = (floats + kBandFloats * threads - 1) / (kBandFloats * threads);
  bands = threads * static_cast<int>(std::min<size_t>(per_band, most));
  int height = 0;
  for (int band = 0; band < bands; ++band) {
    const auto [first, last] = source_rows(band);
    height = std::max(height, last - first);
  }
  s.copied = false;
  s.source_plane = static_cast<int64_t>(height) * s.width;
}

// Those of a row under which the kernel's rows [first, last) lie inside the image.
inline void Stage::add_taps(int first, int last) {
  const Geometry& g = plan.geometry;
  if (plan.is_depthwise()) {
    start.push_back(static_cast<int>(taps.size()));
    for (int tap = first * g.kernel[1]; tap < last * g.kernel[1]; ++tap)
      taps.push_back({pixel_of(tap), int64_t{tap} * kChannelBlock});
    return;
  }
  for (int group = 0; group < g.groups; ++group) {
    start.push_back(static_cast<int>(taps.size()));
    const int begin = plan.group_start[group];
    for (int k = begin; k < plan.group_start[group + 1]; ++k) {
      const int row = plan.columns[k].tap / g.kernel[1];
      if (row >= first && row < last)
        taps.push_back({pixel_of(plan.columns[k]), static_cast<int64_t>(k - begin) * kChannelBlock});
    }
  }
}

inline int64_t Stage::pixel_of(const Column& c) const {
  if (!before && (s.copied || bands)) return offset_in_sources(c, s);
  const int channel = plan.sources[c.source].channel;
  if (!before) return channel * s.input_plane + static_cast<int64_t>(c.row) * s.width + c.col;
  const int filters = before->plan.block_filters(), filter = channel % filters;
  const int block = channel / filters * before->plan.group_blocks() + filter / kChannelBlock;
  return block * input.floats() + pixel_of(c.tap) + filter % kChannelBlock;
}

// The first channel of a block, under a tap of output (0, 0).
inline int64_t Stage::pixel_of(int tap) const {
  const Geometry& g = plan.geometry;
  const int row = tap / g.kernel[1] * g.dilation[0] - g.padding[0], col = tap % g.kernel[1] * g.dilation[1];
  return row * input.pitch() + col * kChannelBlock;
}

// A thread's part of the channel blocks that a depthwise layer reads of an image.
inline void block_input(const Stage& stage, const float* image, float* blocks, const Partition& threads) {
  BlockedPlanes to = stage.input;
  to.first = blocks;
  const int channels = stage.plan.geometry.channels;
  for (int block = threads.begin(stage.blocks()); block < threads.end(stage.blocks()); ++block) {
    const int first = block * kChannelBlock, count = std::min(kChannelBlock, channels - first);
    for (int y = 0; y < to.height; ++y) {
      to.clear_edges(block, y);
      transpose_block(image + first * stage.s.input_plane + static_cast<int64_t>(y) * to.width,
                      stage.s.input_plane, count, to.width, to.row(block, y));
    }
  }
}

}  // namespace SPP_ISA
}  // namespace spp
