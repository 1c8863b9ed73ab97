// The channel-blocked kernel: vectors along the filters.
//
// Per kept column a vector of weights is multiplied by one pixel after the other. Pixels are read one by one,
// wherever they are, so that nothing is packed, narrow images fill the vectors as wide ones do, and rows outside
// the image are left out. A depthwise layer multiplies vectors of channels. The epilogue finds the filters of a
// pixel next to each other, and so does the next layer of a chain; the last layer's result is transposed. Work
// goes row by row: a row of the convolution is pooled and normed while it lies in the cache. Columns are added
// in the order of the pixel-vectorised kernel.
#pragma once

#include "activation.h"
#include "images.h"
#include "stage.h"

namespace spp {
namespace SPP_ISA {

// How threads share a layer: by units of blocks that are computed together; by bands of their rows where there
// aren't as many units, for which the rows that both need are computed twice.
struct UnitSplit {
  int at_once, per_group, units, bands;

  UnitSplit(const Stage& stage, const Partition& threads) {
    const int groups = stage.plan.block_groups(), blocks = stage.plan.group_blocks();
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
    first_filter = group * plan.block_filters() + block * kChannelBlock;
    last_filter = std::min((group + 1) * plan.block_filters(), first_filter + blocks * kChannelBlock);
  }

  // The filters of one of its blocks: the first one, and how many.
  int filter(int block) const { return first_filter + block * kChannelBlock; }
  int filters(int block) const { return std::min(kChannelBlock, last_filter - filter(block)); }
};

// Adds a row of the residual to a block's, and clamps the sum or applies the activation.
inline void add_residual(const Plan& plan, const float* residual, int64_t plane, int filters,
                         int width, float* row) {
  thread_local Buffer transposed_buffer;
  float* transposed = transposed_buffer.get<float>(static_cast<size_t>(width) * kChannelBlock);
  transpose_planes(residual, plane, filters, width, kChannelBlock, transposed);
  const int all = (filters + kLanes - 1) / kLanes * kLanes;
  for (int x = 0; x < width * kChannelBlock; x += kChannelBlock)
    for (int part = x; part < x + all; part += kLanes)
      store(row + part, clamp(load(row + part) + load(transposed + part), plan.low, plan.high));
  activate_row(plan.activation, row, width * kChannelBlock);
}

// What a stage reads and writes.
struct StageTask {
  const float* input;
  const float* residual;
  float* output;
  bool planes;  // whether the output is planes, or channel blocks for the next stage
  bool non_temporal;  // whether planes are stored so
};

// The tiles of a row, one after the other.
inline void run_tiles(const TileKernel* kernels, BlockedTile tile, int width, int64_t step) {
  for (int left = width, pixels; left > 0; left -= pixels) {
    pixels = tile_pixels(left);
    kernels[pixels - 1](tile);
    tile.pixels += pixels * step;
    tile.out += pixels * kChannelBlock;
  }
}

// What the tiles of row y have in common.
inline BlockedTile tile_of(const Stage& stage, const Unit& unit, const StageTask& task, int y, float* out,
                           int64_t out_stride) {
  const Plan& plan = stage.plan;
  const int* start = stage.start.data() + stage.row_kind[y] * plan.block_groups() + unit.group;
  BlockedTile tile;
  const int columns = plan.is_depthwise() ? plan.taps() : plan.group_columns(unit.group);
  tile.weight_stride = static_cast<size_t>(columns) * kChannelBlock;
  tile.weight = stage.weights->floats.get() + stage.weights->start[unit.group] +
                (unit.first_block - unit.group * plan.group_blocks()) * tile.weight_stride;
  tile.taps = stage.taps.data() + start[0];
  tile.count = start[1] - start[0];
  tile.bias = stage.weights->bias.data() + unit.first_block * kChannelBlock;
  tile.from_below = task.residual == nullptr && plan.low > -kInfinity;
  tile.from_above = task.residual == nullptr && plan.high < kInfinity;
  tile.low = plan.low;
  tile.high = plan.high;
  tile.out_stride = out_stride;
  tile.pixels = task.input + y * stage.row_step;
  tile.step = int64_t{plan.geometry.stride[1]} * kChannelBlock;
  tile.out = out;
  return tile;
}

// Row y before the epilogue operations: [block][pixel][filter], the blocks `out_stride` apart.
inline void conv_row(const Stage& stage, const Unit& unit, const StageTask& task, int y, float* out,
                     int64_t out_stride) {
  const Plan& plan = stage.plan;
  const int width = stage.config.conv_width;
  const bool one_block = unit.blocks == 1;
  BlockedTile tile = tile_of(stage, unit, task, y, out, out_stride);
  if (plan.is_depthwise()) {
    const TileKernel* kernels = depthwise_kernels(plan.geometry.stride[1]);
    tile.pixels += unit.first_block * stage.input.floats();
    for (int block = 0; block < unit.blocks; ++block) {
      run_tiles(kernels, tile, width, tile.step);
      tile.pixels += stage.input.floats();
      tile.weight += tile.weight_stride;
      tile.bias += kChannelBlock;
      tile.out += out_stride;
    }
  } else if (stage.before) {
    run_tiles(tile_kernels<kChannelBlock>(one_block), tile, width, kChannelBlock);
  } else {
    run_tiles(tile_kernels<1>(one_block), tile, width, 1);
  }
  const int64_t plane = stage.s.conv_plane;
  for (int block = 0; block < unit.blocks; ++block) {
    float* row = out + block * out_stride;
    if (task.residual)
      add_residual(plan, task.residual + unit.filter(block) * plane + static_cast<int64_t>(y) * width, plane,
                   unit.filters(block), width, row);
    else activate_row(plan.activation, row, int64_t{width} * kChannelBlock);
  }
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
