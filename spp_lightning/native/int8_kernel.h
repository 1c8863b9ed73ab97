// The int8 kernel: vectors, or the tiles of AMX, along the pixels of NCHW planes of uint8, sums of int32.
//
// As in the pixel-vectorised kernel of floats, the pixels of a tile under the kept columns are packed into a panel once,
// and read for all filters. A step takes four columns, which are bytes of one word. The sums are exact, so that neither
// their order nor the instruction set matters; the epilogue rounds each operation once.
#pragma once

#include <type_traits>

#include "spread.h"

#ifdef SPP_INT8_TILES
#include "int8_tile_sums.h"
#else
#include "int8_vector_sums.h"
#endif

namespace spp {
namespace SPP_ISA {

// ---- From sums to outputs ----

// The clamp and the scale of an output. Limits of a quantised one are rounded as the output is: scaling and rounding
// are monotonic, so that the order doesn't matter.
struct OutputScale {
  float low, high, inverse;
  ByteLimits limits;
  float residual_scale;
  int32_t residual_zero;

  explicit OutputScale(const Int8Scales& s)
      : low(s.low), high(s.high), inverse(s.output_inverse), limits{0, 255, s.output_zero},
        residual_scale(s.residual_scale), residual_zero(s.residual_zero) {
    const auto quantised = [&](float limit) {
      const float zero = static_cast<float>(s.output_zero);
      return static_cast<int32_t>(std::nearbyint(std::clamp(limit * inverse, -zero, 255 - zero))) + s.output_zero;
    };
    if (s.is_quantised) limits.low = quantised(low), limits.high = quantised(high);
  }
};

// 16 outputs of a filter. kBytes: they are quantised. Every operation on floats is rounded once.
template <bool kBytes, bool kResidual>
SPP_INLINE void finish_pixels(const int32_t* sums, int32_t offset, float multiplier, float bias, const OutputScale& scale,
                              const uint8_t* residual, uint8_t* bytes, float* floats) {
  Floats y[kPackVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kPackVectors; ++i) {
    y[i] = to_floats(load(sums + i * kLanes) + offset) * multiplier;
    y[i] += bias;
    if constexpr (kResidual)
      y[i] += to_floats(widen(residual + i * kLanes) - scale.residual_zero) * scale.residual_scale;
    if constexpr (kBytes)
      y[i] *= scale.inverse;
    else
      *reinterpret_cast<Floats*>(floats + i * kLanes) = clamp(y[i], broadcast(scale.low), broadcast(scale.high));
  }
  if constexpr (kBytes) store_rounded(y, scale.limits, bytes);
}

// Fewer than 16 numbers, without a call.
template <typename Number>
SPP_INLINE void copy_few(const Number* from, int count, Number* to) {
  const auto copy = [&](auto size) {
    if (!(count & size)) return;
    std::memcpy(to, from, sizeof(Number) * size);
    from += size, to += size;
  };
  copy(std::integral_constant<int, 8>());
  copy(std::integral_constant<int, 4>());
  copy(std::integral_constant<int, 2>());
  copy(std::integral_constant<int, 1>());
}

template <bool kBytes, bool kResidual>
void finish_filters(const Int8Task& task, const OutputScale& of) {
  const OutputScale scale = of;  // which nothing that is stored can change
  const int pixels = task.pixels, whole = pixels / kPackPixels * kPackPixels;
  for (int f = 0; f < task.filters; ++f) {
    const int32_t* sums = task.sums + f * kTile;
    const int32_t offset = kAddsOffsetLast ? task.offset[f] : 0;
    const float multiplier = task.multiplier[f], bias = task.bias[f];
    const int64_t at = f * task.plane;
    const uint8_t* residual = kResidual ? task.residual + at : nullptr;
    uint8_t* bytes = kBytes ? task.bytes + at : nullptr;
    float* floats = kBytes ? nullptr : task.floats + at;
    for (int p = 0; p < whole; p += kPackPixels)
      finish_pixels<kBytes, kResidual>(sums + p, offset, multiplier, bias, scale, kResidual ? residual + p : nullptr,
                                       kBytes ? bytes + p : nullptr, kBytes ? nullptr : floats + p);
    if (whole == pixels) continue;
    const int rest = pixels - whole;
    int32_t last_sums[kPackPixels] = {};
    uint8_t last_residual[kPackPixels] = {}, last_bytes[kPackPixels];
    float last_floats[kPackPixels];
    copy_few(sums + whole, rest, last_sums);
    if constexpr (kResidual) copy_few(residual + whole, rest, last_residual);
    finish_pixels<kBytes, kResidual>(last_sums, offset, multiplier, bias, scale, last_residual, last_bytes, last_floats);
    if constexpr (kBytes) copy_few(last_bytes, rest, bytes + whole);
    else copy_few(last_floats, rest, floats + whole);
  }
}

using FinishFilters = void (*)(const Int8Task&, const OutputScale&);

inline FinishFilters finish_of(const Int8Scales& s) {
  if (s.is_quantised) return s.has_residual ? finish_filters<true, true> : finish_filters<true, false>;
  return s.has_residual ? finish_filters<false, true> : finish_filters<false, false>;
}

// ---- Scheduling ----

// The tensors of an image.
struct Int8Image {
  const uint8_t *base, *end;  // the image or its source planes, and how far may be read
  const uint8_t* residual;    // or null
  uint8_t* bytes;             // either output; the other one is null
  float* floats;
};

// The convolution of an image.
class Int8Convolution {
 public:
  Int8Convolution(const Int8Plan& plan, const KernelConfig& config, const Shapes& s, const Int8Image& image)
      : plan_(plan), s_(s), image_(image), scale_(plan.scales), finish_(finish_of(plan.scales)),
        // In place, the whole plane is one row: its pixels are neighbours.
        width_(s.copied ? config.conv_width : static_cast<int>(s.conv_plane)), source_width_(s.copied ? s.width : 0) {
    thread_local Buffer panel_buffer, sums_buffer, offset_buffer;
    panel_ = panel_buffer.get<int32_t>(kPanelSteps * kTile + kRunSlack);
    sums_ = sums_buffer.get<int32_t>(static_cast<size_t>(plan.filter_tiles()) * kInt8TileFilters * kTile);
    const std::vector<int32_t>& order = plan.weights.order;
    offset_ = offset_buffer.get<int64_t>(order.size());
    for (size_t k = 0; k < order.size(); ++k) {
      // Where there is no column, the weights are 0, and another one may be read.
      const Column& c = plan.columns[std::max(0, order[k])];
      offset_[k] = s.copied ? offset_in_sources(c, s) : plan.sources[c.source].channel * s.input_plane;
    }
  }

  // A thread's part of the planes.
  void run(const Partition& threads) {
    [[maybe_unused]] const KernelRegisters registers{};
    const int blocks = plan_.filter_blocks(), tiles = static_cast<int>((s_.conv_plane + kTile - 1) / kTile);
    const int parts = filter_parts(tiles, blocks, threads.count);
    for (int g = 0; g < plan_.geometry.groups; ++g)
      for (int item = threads.begin(tiles * parts); item < threads.end(tiles * parts); ++item) {
        const Partition part{item / tiles, parts};
        run_tile(g, item % tiles * kTile, part.begin(blocks), part.end(blocks));
      }
  }

 private:
  // Blocks of filters [first, last) of a conv group at the tile of pixels from `begin` on, panel by panel.
  void run_tile(int group, int begin, int first, int last) {
    const Tile tile = tile_at(begin, s_.conv_plane, width_, source_width_);
    Int8Task task{};
    task.panel = panel_;
    task.plane = s_.conv_plane;
    task.pixels = tile.count;
    task.steps_at_once = plan_.weights.steps_at_once;
    const Int8Weights::Group& where = plan_.weights.groups[group];
    const int64_t* offset = offset_ + where.column;
    const int32_t* weight = plan_.weights.words.data() + where.words;
    const int32_t* excess = plan_.weights.excess_start.data() + where.block;
    int done = 0;
    do {  // once, even without columns
      task.steps = std::min(kPanelSteps, where.steps - done);
      const int used = tile.count < kTile ? 0 : task.steps;
      // Lanes without a pixel and steps without a column are computed, too; let them be the same every time.
      std::fill(panel_ + used * kTile, panel_ + padded(task.steps) * kTile, 0);
      pack({image_.base, image_.end, offset + static_cast<size_t>(done) * kColumnsOfStep, task.steps}, tile, panel_);
      task.first = done == 0;
      task.last = done + task.steps == where.steps;
      for (int block = first; block < last; ++block) run_block(group, block, weight, excess, begin, task);
      weight += static_cast<size_t>(plan_.filter_tiles()) * kInt8TileFilters * padded(task.steps);
      excess += plan_.filter_blocks();
      done += task.steps;
    } while (done < where.steps);
  }

  // A block of filters at a panel; behind the last panel, the epilogue.
  void run_block(int group, int block, const int32_t* weight, const int32_t* excess, int begin, Int8Task task) const {
    constexpr int kBlockFilters = kTilesOfBlock * kInt8TileFilters;
    const int first = block * kBlockFilters, filter = group * plan_.group_filters() + first;
    // Between panels the sums of all filters wait; those of one panel may take one place in turn.
    task.sums = sums_ + (task.first && task.last ? 0 : first * kTile);
    task.weight = weight + static_cast<size_t>(first) * padded(task.steps);
    task.offset = plan_.offset.data() + filter;
    task.filters = std::min(kBlockFilters, plan_.group_filters() - first);
    sum_filters(task);
    if (kSumsInInt16 && task.steps > 0) {
      task.excess = plan_.weights.excess.data() + excess[block];
      task.excess_end = plan_.weights.excess.data() + excess[block + 1];
      add_excess(task);
    }
    if (task.last) finish(filter, begin, task);
  }

  void finish(int filter, int begin, Int8Task& task) const {
    const int64_t at = filter * task.plane + begin;
    task.multiplier = plan_.multiplier.data() + filter;
    task.bias = plan_.bias.data() + filter;
    task.residual = image_.residual ? image_.residual + at : nullptr;
    task.bytes = image_.bytes ? image_.bytes + at : nullptr;
    task.floats = image_.floats ? image_.floats + at : nullptr;
    finish_(task, scale_);
  }

  const Int8Plan& plan_;
  const Shapes& s_;
  const Int8Image image_;
  const OutputScale scale_;
  const FinishFilters finish_;
  const int width_, source_width_;
  int32_t *panel_, *sums_;
  int64_t* offset_;  // of each column in what is read, in the order of the steps
};

// Phases: source planes, if the layer reads them, and the convolution.
inline void forward_images(const Int8Pass& pass) {
  const Int8Plan& plan = *pass.plan;
  const Geometry& g = plan.geometry;
  Shapes s = shapes_of(plan, pass);
  s.copied = !plan.reads_in_place();
  const size_t source_bytes = s.copied ? plan.sources.size() * static_cast<size_t>(s.source_plane) + kRunSlack : 0;
  const auto sources = [source_bytes](Buffer& buffer) { return buffer.get<uint8_t>(source_bytes); };
  thread_local Buffer shared_buffer;
  const auto shared = [&] { return sources(shared_buffer); };
  const auto own = [&] {
    thread_local Buffer own_buffer;
    return sources(own_buffer);
  };
  const auto run = [&](int phase, int64_t number, uint8_t* copies, const Partition& threads) {
    const uint8_t* input = pass.input + number * g.channels * s.input_plane;
    if (phase == kReadPhase) {
      const int count = static_cast<int>(plan.sources.size());
      if (threads.index == 0) std::memset(copies + source_bytes - kRunSlack, 0, kRunSlack);
      for (int i = threads.begin(count); i < threads.end(count); ++i)
        copy_plane(g, plan.sources[i], input + plan.sources[i].channel * s.input_plane, pass.height, pass.width, s,
                   plan.scales.input_zero, copies + i * s.source_plane);
      return;
    }
    Int8Image image{copies, copies + source_bytes, nullptr, nullptr, nullptr};
    if (!s.copied) image.base = input, image.end = pass.input + pass.batch * g.channels * s.input_plane;
    const int64_t at = number * g.filters * s.conv_plane;
    if (pass.residual != nullptr) image.residual = pass.residual + at;
    if (plan.scales.is_quantised) image.bytes = static_cast<uint8_t*>(pass.output) + at;
    else image.floats = static_cast<float*>(pass.output) + at;
    Int8Convolution(plan, pass, s, image).run(threads);
  };
  spread_images(pass.batch, pass.threads, {s.copied ? kReadPhase : 0, 1}, shared, own, run, [] {});
}

// [a][b][pixels] to [b][a][pixels].
template <typename Number>
void swap_axes(const Number* from, int64_t a, int64_t b, int64_t pixels, Number* to) {
  for (int64_t i = 0; i < a; ++i)
    for (int64_t j = 0; j < b; ++j)
      for (int64_t p = 0; p < pixels; ++p) to[(j * a + i) * pixels + p] = from[(i * b + j) * pixels + p];
}

// Small images of a layer that reads in place, such as those of a linear layer, as one image: their pixels fill vectors.
inline void forward_joined(const Int8Pass& pass) {
  thread_local Buffer input_buffer, residual_buffer, output_buffer;
  const Geometry& g = pass.plan->geometry;
  const int64_t pixels = int64_t{pass.height} * pass.width, all = pass.batch * pixels;
  Int8Pass joined = pass;
  joined.batch = joined.height = joined.conv_height = 1;
  joined.width = joined.conv_width = static_cast<int32_t>(all);
  uint8_t* input = input_buffer.get<uint8_t>(all * g.channels);
  swap_axes(pass.input, pass.batch, g.channels, pixels, input);
  joined.input = input;
  if (pass.residual != nullptr) {
    uint8_t* residual = residual_buffer.get<uint8_t>(all * g.filters);
    swap_axes(pass.residual, pass.batch, g.filters, pixels, residual);
    joined.residual = residual;
  }
  const auto run = [&](auto* output) {
    using Number = std::remove_pointer_t<decltype(output)>;
    Number* made = output_buffer.get<Number>(all * g.filters);
    joined.output = made;
    forward_images(joined);
    swap_axes<Number>(made, g.filters, pass.batch, pixels, output);
  };
  if (pass.plan->scales.is_quantised) run(static_cast<uint8_t*>(pass.output));
  else run(static_cast<float*>(pass.output));
}

inline void forward_int8(const Int8Pass& pass) {
  const int64_t pixels = int64_t{pass.height} * pass.width;
  const bool joins = pass.plan->reads_in_place() && pass.batch > 1 && pixels < 2 * kLanes;
  const int64_t most = std::max(pass.plan->geometry.channels, pass.plan->geometry.filters) * pass.batch * pixels;
  if (joins && most <= std::numeric_limits<int32_t>::max()) forward_joined(pass);
  else forward_images(pass);
}

constexpr Int8Kernel int8_kernel(const char* name) {
  return {name, kInt8TileFilters, kPanelSteps, kStepsOfGroup, kSumsInInt16, forward_int8};
}

}  // namespace SPP_ISA
}  // namespace spp
