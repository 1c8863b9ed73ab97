// Winograd's minimal filtering of 3×3 kernels.
//
// Rows of tiles are computed while they lie in the cache. The inputs under each tile, 6×6 or 4×4, are
// transformed, channels next to each other as the lanes of a vector; for each of the 36 or 16 places, a matrix of
// tiles by channels is multiplied by one of channels by filters, by the channel-blocked micro-kernel; and the
// products of a tile and a filter become its 4×4 or 2×2 outputs. Threads share the tiles where there are enough
// of them; else the filters, and each transforms all inputs for itself: that is done sooner than they come out
// of another core's cache.
#pragma once

#include "blocked_kernel.h"

namespace spp {
namespace SPP_ISA {

#ifdef SPP_EXACT_BUFFERS  // small images have several batches of tiles, too
constexpr int64_t kInputFloats = 1 << 9, kFewestTiles = 2, kOwnTiles = 4;
#else
constexpr int64_t kInputFloats = 1 << 17;  // of a batch of tiles, transformed
constexpr int64_t kFewestTiles = 56;  // of a batch: each takes all weights through the cache once more
constexpr int64_t kOwnTiles = 48;     // of a thread, for the same reason
#endif

// ---- The micro-kernels: transforms of a tile ----

constexpr float kNear2 = kNear * kNear, kFar2 = kFar * kFar, kBoth = kNear2 + kFar2;
constexpr float kProduct = kNear2 * kFar2;

// Neighbouring inputs, as the factors of the products.
inline void transform_inputs(const Vector (&x)[6], Vector (&out)[6]) {
  const Vector even_near = x[4] - kFar2 * x[2], odd_near = x[3] - kFar2 * x[1];
  const Vector even_far = x[4] - kNear2 * x[2], odd_far = x[3] - kNear2 * x[1];
  out[0] = kProduct * x[0] - kBoth * x[2] + x[4];
  out[1] = even_near + kNear * odd_near;
  out[2] = even_near - kNear * odd_near;
  out[3] = even_far + kFar * odd_far;
  out[4] = even_far - kFar * odd_far;
  out[5] = kProduct * x[1] - kBoth * x[3] + x[5];
}

inline void transform_inputs(const Vector (&x)[4], Vector (&out)[4]) {
  out[0] = x[2] - x[0];
  out[1] = x[2] + x[1];
  out[2] = x[2] - x[1];
  out[3] = x[3] - x[1];
}

// The products, summed to neighbouring outputs.
inline void transform_outputs(const Vector (&x)[6], Vector (&out)[4]) {
  const Vector even_near = x[1] + x[2], odd_near = x[1] - x[2];
  const Vector even_far = x[3] + x[4], odd_far = x[3] - x[4];
  out[0] = x[0] + even_near + even_far;
  out[1] = kNear * odd_near + kFar * odd_far;
  out[2] = kNear2 * even_near + kFar2 * even_far;
  out[3] = kNear2 * kNear * odd_near + kFar2 * kFar * odd_far + x[5];
}

inline void transform_outputs(const Vector (&x)[4], Vector (&out)[2]) {
  out[0] = x[0] + x[1] + x[2];
  out[1] = x[1] - x[2] + x[3];
}

// Of a tile; rows of inputs are `pitch` floats apart, and places `stride`.
template <int kSide>
inline void transform_tile(const float* in, int64_t pitch, float* out, int64_t stride) {
  constexpr int kReach = reach_of(kSide);
  Vector half[kReach][kReach];
#pragma GCC unroll 6
  for (int j = 0; j < kReach; ++j) {
    Vector column[kReach], made[kReach];
#pragma GCC unroll 6
    for (int i = 0; i < kReach; ++i) column[i] = load(in + i * pitch + j * kChannelBlock);
    transform_inputs(column, made);
#pragma GCC unroll 6
    for (int i = 0; i < kReach; ++i) half[i][j] = made[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kReach; ++i) {
    Vector made[kReach];
    transform_inputs(half[i], made);
#pragma GCC unroll 6
    for (int j = 0; j < kReach; ++j) store(out + (i * kReach + j) * stride, made[j]);
  }
}

// ---- Scheduling ----

// How a layer is cut into batches of tiles, for one thread's part of it.
struct TileBatches {
  int side, places;  // of a tile
  int tile_rows, tile_cols;
  int in_blocks, out_blocks;
  bool by_rows;      // whether threads share the rows of tiles, or else the filters
  int rows;          // of tiles, of a batch
  int64_t tiles;     // of a batch
  int64_t in_stride;  // floats from one place's inputs to the next
  int64_t in_width;   // pixels of the rows under the tiles

  TileBatches(const Plan& plan, const KernelConfig& config, int tile_side, int threads)
      : side(tile_side),
        places(places_of(side)),
        tile_rows(per(config.conv_height, side)),
        tile_cols(per(config.conv_width, side)),
        in_blocks(per(plan.geometry.channels, kChannelBlock)),
        out_blocks(plan.group_blocks()) {
    const int per_thread = per(tile_rows, threads), units = per(out_blocks, kBlocksAtOnce);
    // What all threads take while the one with the most work is busy.
    const int64_t work_rows = int64_t{per_thread} * threads * units;
    const int64_t work_units = int64_t{per(units, threads)} * threads * tile_rows;
    const bool many = int64_t{per_thread} * tile_cols >= kOwnTiles;
    by_rows = threads == 1 || (many ? 10 * work_rows <= 11 * work_units : work_rows < work_units);
    const int all = by_rows ? per_thread : tile_rows;
    const int64_t tile_floats = int64_t{places} * in_blocks * kChannelBlock;
    const int64_t most = std::max(kFewestTiles, kInputFloats / tile_floats);
    const int most_rows = static_cast<int>(std::clamp<int64_t>(most / tile_cols, 1, all));
    rows = per(all, per(all, most_rows));
    tiles = int64_t{rows} * tile_cols;
    in_stride = (in_blocks * tiles | 1) * kChannelBlock;  // odd: a power of two would meet in one cache set
    in_width = int64_t{tile_cols} * side + kTaps - 1;
  }

  int64_t out_stride(int blocks) const { return (blocks * tiles | 1) * kChannelBlock; }
  static int per(int count, int shares) { return (count + shares - 1) / shares; }
};

// What a thread needs for itself.
struct WinogradBuffers {
  float* band;      // inputs under a batch's tiles, of a channel block: [row][pixel][channel]
  float* inputs;    // of a batch, transformed: [place][channel block][tile][channel]
  float* products;  // of a batch and some channel blocks of filters: [place][channel block][tile][filter]
  float* result;    // a row of tiles: [row][pixel][filter]
  Tap* taps;        // of a place: where each channel's inputs and weights are

  WinogradBuffers(const ForwardPass& pass, const TileBatches& batches) {
    thread_local Buffer inputs_buffer, band_buffer, products_buffer, result_buffer, taps_buffer;
    inputs = inputs_buffer.get<float>(batches.places * batches.in_stride);
    const int64_t band_rows = int64_t{batches.rows} * batches.side + kTaps - 1;
    band = band_buffer.get<float>(band_rows * batches.in_width * kChannelBlock);
    products = products_buffer.get<float>(batches.places * batches.out_stride(kBlocksAtOnce));
    result = result_buffer.get<float>((int64_t{batches.side} * pass.conv_width + kLanes) * kChannelBlock);
    const int channels = pass.plan->geometry.channels;
    taps = taps_buffer.get<Tap>(channels);
    for (int c = 0; c < channels; ++c)
      taps[c] = {c / kChannelBlock * batches.tiles * kChannelBlock + c % kChannelBlock, int64_t{c} * kChannelBlock};
  }
};

// Transforms the inputs under the tiles of rows [first, last), of a channel block.
template <int kSide>
inline void transform_block(const ForwardPass& pass, const Shapes& s, const TileBatches& batches,
                            const float* image, int block, int first, int last, float* band,
                            float* out) {
  const Geometry& g = pass.plan->geometry;
  const int channels = std::min(kChannelBlock, g.channels - block * kChannelBlock);
  const int rows = (last - first) * kSide + kTaps - 1, left = g.padding[1];
  const int64_t pitch = batches.in_width * kChannelBlock;
  const float* planes = image + block * kChannelBlock * s.input_plane;
  for (int i = 0; i < rows; ++i) {
    const int y = first * kSide - g.padding[0] + i;
    float* row = band + i * pitch;
    if (y < 0 || y >= pass.height) {
      std::fill_n(row, pitch, 0.0f);
      continue;
    }
    std::fill_n(row, left * kChannelBlock, 0.0f);
    transpose_planes(planes + int64_t{y} * pass.width, s.input_plane, channels, pass.width, kChannelBlock,
         row + left * kChannelBlock);
    const int end = (left + pass.width) * kChannelBlock;
    std::fill(row + end, row + pitch, 0.0f);
  }
  float* to = out + block * batches.tiles * kChannelBlock;
  for (int y = 0; y < last - first; ++y)
    for (int x = 0; x < batches.tile_cols; ++x, to += kChannelBlock)
      for (int part = 0; part < channels; part += kLanes)
        transform_tile<kSide>(band + y * kSide * pitch + x * kSide * kChannelBlock + part, pitch, to + part,
                              batches.in_stride);
}

constexpr float kNoBias[kBlocksAtOnce * kChannelBlock] = {};

// The products of some channel blocks of filters with all tiles of a batch.
inline void multiply(const WinogradWeights& weights, const TileBatches& batches, int tiles, int block,
                     int blocks, const WinogradBuffers& own) {
  const TileKernel* kernels = tile_kernels<kChannelBlock>(blocks == 1);
  BlockedTile tile{};
  tile.weight_stride = weights.block_stride;
  tile.taps = own.taps;
  tile.count = weights.channels;
  tile.bias = kNoBias;
  tile.out_stride = batches.tiles * kChannelBlock;
  const int64_t out_stride = batches.out_stride(blocks);
  for (int place = 0; place < batches.places; ++place) {
    tile.weight = weights.floats.get() + place * weights.place_stride + block * weights.block_stride;
    tile.pixels = own.inputs + place * batches.in_stride;
    tile.out = own.products + place * out_stride;
    for (int left = tiles; left > 0;) {
      const int at_once = tile_pixels(left);
      kernels[at_once - 1](tile);
      tile.pixels += at_once * kChannelBlock;
      tile.out += at_once * kChannelBlock;
      left -= at_once;
    }
  }
}

// A tile's outputs, of which (rows, cols) lie inside the plane: [row][pixel][filter], rows `pitch` floats
// apart.
template <int kSide>
inline void finish_tile(const float* products, int64_t stride, const float* bias, float low, float high,
                        int rows, int cols, float* out, int64_t pitch) {
  constexpr int kReach = reach_of(kSide);
  Vector half[kSide][kReach];
#pragma GCC unroll 6
  for (int j = 0; j < kReach; ++j) {
    Vector column[kReach], made[kSide];
#pragma GCC unroll 6
    for (int i = 0; i < kReach; ++i) column[i] = load(products + (i * kReach + j) * stride);
    transform_outputs(column, made);
#pragma GCC unroll 4
    for (int i = 0; i < kSide; ++i) half[i][j] = made[i];
  }
  const Vector add = load(bias);
#pragma GCC unroll 4
  for (int i = 0; i < kSide; ++i) {
    if (i >= rows) break;
    Vector made[kSide];
    transform_outputs(half[i], made);
#pragma GCC unroll 4
    for (int j = 0; j < kSide; ++j)
      if (j < cols) store(out + i * pitch + j * kChannelBlock, clamp(made[j] + add, low, high));
  }
}

// The planes of a channel block of filters under rows [first, last) of tiles; `products` are those of the block.
template <int kSide>
inline void finish_block(const ForwardPass& pass, const Shapes& s, const TileBatches& batches,
                         const WinogradWeights& weights, const float* products, int64_t stride,
                         int block, int first, int last, const float* residual, float* planes,
                         bool non_temporal, float* result) {
  const Plan& plan = *pass.plan;
  const int width = pass.conv_width, filter = block * kChannelBlock;
  const int filters = std::min(kChannelBlock, plan.geometry.filters - filter);
  const int64_t pitch = int64_t{width} * kChannelBlock;
  // A residual is added before the clamp.
  const float low = residual ? -kInfinity : plan.low, high = residual ? kInfinity : plan.high;
  for (int y = first; y < last; ++y) {
    const int rows = std::min(kSide, pass.conv_height - y * kSide);
    for (int x = 0; x < batches.tile_cols; ++x, products += kChannelBlock)
      for (int part = 0; part < filters; part += kLanes)
        finish_tile<kSide>(products + part, stride, weights.bias.data() + filter + part, low, high,
                           rows, std::min(kSide, width - x * kSide),
                           result + x * kSide * kChannelBlock + part, pitch);
    const int64_t at = filter * s.conv_plane + int64_t{y} * kSide * width;
    const int pixels = rows * width;
    if (residual) add_residual(plan, residual + at, s.conv_plane, filters, pixels, result);
    else activate_row(plan.activation, result, int64_t{pixels} * kChannelBlock);
    transpose_back(result, kChannelBlock, filters, pixels, s.conv_plane, planes + at,
                   non_temporal && y * kSide * width % kLanes == 0);
  }
}

// A thread's part of an image's planes before the epilogue operations.
template <int kSide>
inline void winograd_planes(const ForwardPass& pass, const Shapes& s, const WinogradWeights& weights,
                            const float* image, const float* residual, float* planes,
                            const Partition& threads) {
  const TileBatches batches(*pass.plan, pass, kSide, threads.count);
  const WinogradBuffers own(pass, batches);
  const Partition whole{0, 1}, rows = batches.by_rows ? threads : whole;
  const Partition rest = batches.by_rows ? whole : threads;
  const bool non_temporal = is_non_temporal(pass, s, planes);
  const int units = TileBatches::per(batches.out_blocks, kBlocksAtOnce), end = rows.end(batches.tile_rows);
  for (int first = rows.begin(batches.tile_rows); first < end; first += batches.rows) {
    const int last = std::min(first + batches.rows, end), tiles = (last - first) * batches.tile_cols;
    for (int i = 0; i < batches.in_blocks; ++i)
      transform_block<kSide>(pass, s, batches, image, i, first, last, own.band, own.inputs);
    for (int unit = rest.begin(units); unit < rest.end(units); ++unit) {
      const int block = unit * kBlocksAtOnce;
      const int blocks = std::min(kBlocksAtOnce, batches.out_blocks - block);
      multiply(weights, batches, tiles, block, blocks, own);
      for (int i = 0; i < blocks; ++i)
        finish_block<kSide>(pass, s, batches, weights, own.products + i * batches.tiles * kChannelBlock,
                            batches.out_stride(blocks), block + i, first, last, residual, planes,
                            non_temporal, own.result);
    }
  }
}

// Phases: the convolution; the epilogue operations, if there are any.
inline void forward_winograd(const ForwardPass& pass) {
  const Plan& plan = *pass.plan;
  Shapes s = shapes_of(plan, pass, true);
  const int side = pass.kernel == Kernel::kWinograd4 ? 4 : 2, filters = plan.geometry.filters;
  const auto planes_of = side == 4 ? winograd_planes<4> : winograd_planes<2>;
  const auto weights = plan.winograd_weights(side);
  const bool has_epilogue = !plan.epilogue.empty();
  const size_t floats = has_epilogue ? filters * static_cast<size_t>(s.conv_plane) + kLanes : 0;
  for_each_image(pass, s, floats, {0, has_epilogue ? 2 : 1}, [&](int phase, const ImagePart& part) {
    float* output = output_of(pass, s, part);
    float* planes = has_epilogue ? part.scratch.planes : output;
    if (phase == 0)
      return planes_of(pass, s, *weights, input_of(pass, s, part), residual_of(pass, s, part), planes,
                       part.threads);
    apply_epilogue(plan, pass, s, planes, output, part.threads);
  });
}

}  // namespace SPP_ISA
}  // namespace spp
