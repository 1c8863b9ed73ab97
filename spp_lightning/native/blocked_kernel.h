// The channel-blocked kernel: vectors along the filters.
//
// A tile is some pixels of a row by one or two channel blocks of filters: per kept column a vector of weights is
// multiplied by one pixel after the other. Pixels are read one by one, wherever they are, so that nothing is
// packed, narrow images fill the vectors as wide ones do, and rows outside the image are left out. The epilogue
// finds the filters of a pixel next to each other, and so does the next layer of a chain; the last layer's
// result is transposed. Work goes row by row: a row of the convolution is pooled and normed while it lies in
// the cache. Columns are added in the order of the pixel-vectorised kernel.
#pragma once

#include "epilogue.h"
#include "images.h"

namespace spp {
namespace SPP_ISA {

constexpr int kBlockVectors = kChannelBlock / kLanes;
constexpr int kBlocksAtOnce = kLanes == 16 ? 2 : 1;
constexpr int kMostPixels = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 2;  // that fit into the registers
#ifdef SPP_EXACT_BUFFERS  // small images are cut into bands, too
constexpr size_t kBandFloats = 1 << 9;
#else
constexpr size_t kBandFloats = 1 << 16;  // of source planes that are copied at once
#endif

// ---- The micro-kernel ----

// A column that lies inside the image.
struct Tap {
  int64_t pixel;   // under the first pixel of a tile
  int64_t weight;  // of the first filter of a block
};

struct BlockedTile {
  const float* weight;
  size_t weight_stride;  // floats from one block's weights to the next
  const Tap* taps;
  int count;
  const float* pixels;
  const float* bias;
  bool from_below, from_above;  // whether the sums are clamped
  float low, high;
  float* out;  // [block][pixel][filter]
  int64_t out_stride;
};

// The input's pixels are kPitch floats apart.
template <int kPitch, int kBlocks, int kPixels>
void blocked_tile(const BlockedTile& tile) {
  constexpr int kRows = kBlocks * kBlockVectors;
  Vector sum[kRows][kPixels];
#pragma GCC unroll 4
  for (int v = 0; v < kRows; ++v)
#pragma GCC unroll 14
    for (int p = 0; p < kPixels; ++p) sum[v][p] = load(tile.bias + v * kLanes);
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

// The next tile of `left` pixels, which are split into tiles as equal as can be.
inline int tile_pixels(int left) {
  const int tiles = (left + kMostPixels - 1) / kMostPixels;
  return (left + tiles - 1) / tiles;
}

// ---- A layer for inputs of one shape ----

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
  const Stage* before;  // its output is the input; null if the input is planes
  int64_t row_step;     // floats from a row's first pixel to that of the next row
  std::vector<Tap> taps;
  std::vector<int> start;           // in `taps`: [kind of row][conv group], and the end
  std::vector<int> row_kind;        // of each row
  RowSources rows;
  int edge = 0;                     // of the output: the next layer's padding
  int bands = 0;                    // of rows, whose source planes are copied; 0: not in bands

  Stage(const Plan& of, const KernelConfig& how, const Stage* stage_before, bool alone);

  int blocks() const { return plan.geometry.groups * plan.group_blocks(); }

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
};

inline Stage::Stage(const Plan& of, const KernelConfig& how, const Stage* stage_before, bool alone)
    : plan(of), config(how), s(shapes_of(of, how, true)), weights(of.blocked_weights()),
      before(stage_before), rows(of, how, kBlocksAtOnce) {
  const Geometry& g = plan.geometry;
  s.copied = !before && (g.padding[0] != 0 || g.padding[1] != 0 || g.stride[0] != 1 ||
                         g.stride[1] != 1 || config.bfloat16);
  row_step = before ? g.stride[0] * before->output(nullptr, g.padding[1]).pitch() : s.width;
  if (alone) split_into_bands();
  int known_first = -1, known_last = -1;
  for (int y = 0; y < config.conv_height; ++y) {
    const int top = y * g.stride[0] - g.padding[0];
    int first = 0, last = g.kernel[0];
    while (first < last && top + first * g.dilation[0] < 0) ++first;
    while (first < last && top + (last - 1) * g.dilation[0] >= config.height) --last;
    if (first != known_first || last != known_last) add_taps(first, last);
    known_first = first;
    known_last = last;
    row_kind.push_back(static_cast<int>(start.size()) / g.groups - 1);
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
  const Geometry& g = plan.geometry;
  if (!before && (s.copied || bands)) return offset_in_sources(c, s);
  const int channel = plan.sources[c.source].channel;
  if (!before) return channel * s.input_plane + static_cast<int64_t>(c.row) * s.width + c.col;
  const BlockedPlanes input = before->output(nullptr, g.padding[1]);
  const int filters = before->plan.group_filters(), filter = channel % filters;
  const int block = channel / filters * before->plan.group_blocks() + filter / kChannelBlock;
  const int row = c.tap / g.kernel[1] * g.dilation[0] - g.padding[0];
  const int col = c.tap % g.kernel[1] * g.dilation[1];
  return block * input.floats() + row * input.pitch() + col * kChannelBlock + filter % kChannelBlock;
}

// ---- Scheduling ----

// How threads share a layer: by units of blocks that are computed together; by bands of their rows where there
// aren't as many units, for which the rows that both need are computed twice.
struct UnitSplit {
  int at_once, per_group, units, bands;

  UnitSplit(const Stage& stage, const Partition& threads) {
    const int groups = stage.plan.geometry.groups, blocks = stage.plan.group_blocks();
    const auto fits = [&](int per) { return groups * per % threads.count == 0; };
    at_once = std::min(kBlocksAtOnce, blocks);
    per_group = (blocks + at_once - 1) / at_once;
    if (!fits(per_group) && fits(blocks)) at_once = 1, per_group = blocks;
    units = groups * per_group;
    bands = units % threads.count == 0 ? 1 : threads.count;
  }
};

// Channel blocks of filters that are computed together.
struct Unit {
  int group, first_block, blocks;  // the first one is counted over all groups
  int first_filter, last_filter;   // of all filters

  Unit(const Plan& plan, const UnitSplit& split, int index) {
    group = index / split.per_group;
    const int block = index % split.per_group * split.at_once;
    blocks = std::min(split.at_once, plan.group_blocks() - block);
    first_block = group * plan.group_blocks() + block;
    first_filter = group * plan.group_filters() + block * kChannelBlock;
    last_filter = std::min((group + 1) * plan.group_filters(), first_filter + blocks * kChannelBlock);
  }

  // The filters of one of its blocks: the first one, and how many.
  int filter(int block) const { return first_filter + block * kChannelBlock; }
  int filters(int block) const { return std::min(kChannelBlock, last_filter - filter(block)); }
};

// Adds a row of the residual to a block's, and clamps the sum.
inline void add_residual(const Plan& plan, const float* residual, int64_t plane, int filters,
                         int width, float* row) {
  thread_local Buffer transposed_buffer;
  float* transposed = transposed_buffer.get<float>(static_cast<size_t>(width) * kChannelBlock);
  transpose_planes(residual, plane, filters, width, kChannelBlock, transposed);
  const int all = (filters + kLanes - 1) / kLanes * kLanes;
  for (int x = 0; x < width * kChannelBlock; x += kChannelBlock)
    for (int part = x; part < x + all; part += kLanes)
      store(row + part, clamp(load(row + part) + load(transposed + part), plan.low, plan.high));
}

// What a stage reads and writes.
struct StageTask {
  const float* input;
  const float* residual;
  float* output;
  bool planes;  // whether the output is planes, or channel blocks for the next stage
  bool non_temporal;  // whether planes are stored so
};

// Row y of the convolution, clamped: [block][pixel][filter], the blocks `out_stride` apart.
inline void conv_row(const Stage& stage, const Unit& unit, const StageTask& task, int y, float* out,
                     int64_t out_stride) {
  const Plan& plan = stage.plan;
  const float* residual = task.residual;
  const int width = stage.config.conv_width, pixel_step = stage.before ? kChannelBlock : 1;
  const int* start = stage.start.data() + stage.row_kind[y] * plan.geometry.groups + unit.group;
  BlockedTile tile;
  tile.weight_stride = static_cast<size_t>(plan.group_columns(unit.group)) * kChannelBlock;
  tile.weight = stage.weights->floats.get() + stage.weights->start[unit.group] +
                (unit.first_block - unit.group * plan.group_blocks()) * tile.weight_stride;
  tile.taps = stage.taps.data() + start[0];
  tile.count = start[1] - start[0];
  tile.bias = stage.weights->bias.data() + unit.first_block * kChannelBlock;
  tile.from_below = residual == nullptr && plan.low > -kInfinity;
  tile.from_above = residual == nullptr && plan.high < kInfinity;
  tile.low = plan.low;
  tile.high = plan.high;
  tile.out_stride = out_stride;
  tile.pixels = task.input + y * stage.row_step;
  tile.out = out;
  const bool one_block = unit.blocks == 1;
  const TileKernel* kernels =
      stage.before ? tile_kernels<kChannelBlock>(one_block) : tile_kernels<1>(one_block);
  for (int left = width, pixels; left > 0; left -= pixels) {
    pixels = tile_pixels(left);
    kernels[pixels - 1](tile);
    tile.pixels += pixels * pixel_step;
    tile.out += pixels * kChannelBlock;
  }
  if (residual == nullptr) return;
  const int64_t plane = stage.s.conv_plane;
  for (int block = 0; block < unit.blocks; ++block)
    add_residual(plan, residual + unit.filter(block) * plane + y * width, plane,
                 unit.filters(block), width, out + block * out_stride);
}

// Rows [begin, end) of a unit.
inline void run_unit(const Stage& stage, const StageTask& task, const Unit& unit, int begin, int end) {
  const auto row = [&](int y, float* out, int64_t stride) { conv_row(stage, unit, task, y, out, stride); };
  RowMaker<decltype(row)> maker(stage.plan, stage.rows, unit.blocks, row);
  if (task.planes) {
    const int filter = unit.first_filter;
    return make_planes(maker, begin, end,
                       {task.output + filter * stage.s.output_plane, stage.s.output_plane,
                        stage.s.out_width, unit.last_filter - filter, task.non_temporal});
  }
  const BlockedPlanes out = stage.output(task.output, stage.edge);
  for (int block = 0; block < unit.blocks; ++block)
    for (int y = begin; y < end; ++y) out.clear_edges(unit.first_block + block, y);
  maker.make(begin, end, out.row(unit.first_block, begin), out.pitch(), out.floats());
}

// A thread's part of a stage.
inline void run_stage(const Stage& stage, const StageTask& task, const Partition& threads) {
  const UnitSplit split(stage, threads);
  const int items = split.units * split.bands, end_item = threads.end(items);
  for (int item = threads.begin(items); item < end_item;) {
    const Unit unit(stage.plan, split, item / split.bands);
    const int first = item % split.bands, last = std::min(split.bands, first + end_item - item);
    item += last - first;
    const int begin = Partition{first, split.bands}.begin(stage.s.out_height);
    const int end = Partition{last, split.bands}.begin(stage.s.out_height);
    run_unit(stage, task, unit, begin, end);
  }
}

// Likewise of a layer alone, whose input is an image: band by band.
inline void run_bands(const Stage& stage, const StageTask& task, const Partition& threads) {
  thread_local Buffer sources_buffer;
  const Plan& plan = stage.plan;
  const size_t floats = plan.sources.size() * static_cast<size_t>(stage.s.source_plane);
  float* sources = sources_buffer.get<float>(floats);
  const UnitSplit split(stage, Partition{0, 1});
  for (int band = threads.begin(stage.bands); band < threads.end(stage.bands); ++band) {
    const auto [begin, end] = stage.out_rows(band);
    const auto [first, last] = stage.source_rows(band);
    for (size_t i = 0; i < plan.sources.size(); ++i)
      copy_plane(plan.geometry, plan.sources[i],
                 task.input + plan.sources[i].channel * stage.s.input_plane, stage.config.height,
                 stage.config.width, stage.s, first, last, sources + i * stage.s.source_plane);
    StageTask of_band = task;
    of_band.input = sources - first * stage.row_step;
    for (int i = 0; i < split.units; ++i) run_unit(stage, of_band, Unit(plan, split, i), begin, end);
  }
}

}  // namespace SPP_ISA
}  // namespace spp
