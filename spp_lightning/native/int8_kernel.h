// The int8 kernel: vectors along the pixels of NCHW planes of uint8, sums of int32.
//
// As in the pixel-vectorised kernel of floats, the pixels of a tile under the kept columns are packed into a panel once,
// and read for all filters. The columns are taken in twos or fours, as the product instructions want them. The sums are
// exact, so that neither their order nor the instruction set matters; the epilogue rounds each operation once.
#pragma once

#include "int8_panel.h"
#include "int8_plan.h"
#include "spread.h"

namespace spp {
namespace SPP_ISA {

// ---- The micro-kernel ----

// A tile of filters at a tile of pixels.
struct Int8Task {
  const int32_t* weight;  // [step][filter of the tile]
  const int32_t* panel;   // [step][pixel]
  int steps;
  const int32_t* offset;  // one per filter, like the next two
  const float* multiplier;
  const float* bias;
  const uint8_t* residual;  // planes like the output's, at the first pixel; or null
  uint8_t* bytes;           // the output: the first filter's plane, at the first pixel; or null
  float* floats;            // likewise of an output of floats
  int64_t plane;            // pixels of a plane
  int filters, pixels;      // to store
  int32_t* sums;            // [filter][pixel]: over the columns so far, if `first` is false
  bool first, last;         // whether this is the first panel, or the last one
};

template <int kFilters, int kV>
void sum_tile(const Int8Task& task) {
  Sums sum[kFilters][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kFilters; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v)
      sum[r][v] = task.first ? broadcast(task.offset[r]) : load(task.sums + r * kTile + v * kLanes);
  const int32_t *weight = task.weight, *panel = task.panel;
  for (int k = 0; k < task.steps; ++k, weight += kTileFilters8, panel += kTile) {
    Sums x[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) x[v] = load(panel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kFilters; ++r) {
      const Sums w = broadcast(weight[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) sum[r][v] = add_products(sum[r][v], x[v], w);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kFilters; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) store(task.sums + r * kTile + v * kLanes, sum[r][v]);
}

using SumTile = void (*)(const Int8Task&);

// By filters and vectors of pixels, both counted from 1.
template <size_t... i>
constexpr auto sum_tiles(std::index_sequence<i...>) {
  struct Table {
    SumTile by_size[sizeof...(i)];
  };
  return Table{{sum_tile<i / kVectors + 1, i % kVectors + 1>...}};
}
constexpr auto kSumTiles = sum_tiles(std::make_index_sequence<kTileFilters8 * kVectors>());

// ---- From sums to outputs ----

// The clamp and the scale of an output. The clamp of a quantised one is moved behind the division by the scale: both
// are monotonic, so that the result is the same.
struct OutputScale {
  float low, high, inverse;
  int32_t zero;
  float residual_scale;
  int32_t residual_zero;

  explicit OutputScale(const Int8Scales& s)
      : low(s.low), high(s.high), inverse(s.output_inverse), zero(s.output_zero), residual_scale(s.residual_scale),
        residual_zero(s.residual_zero) {
    if (!s.is_quantised) return;
    const float least = static_cast<float>(-zero), most = static_cast<float>(255 - zero);
    low = std::clamp(low * inverse, least, most);
    high = std::clamp(high * inverse, least, most);
  }
};

// kBytes: the output is quantised. Every operation on floats is rounded once.
template <bool kBytes, bool kResidual>
void finish_tile(const Int8Task& task, const OutputScale& scale) {
  const Floats low = broadcast(scale.low), high = broadcast(scale.high), inverse = broadcast(scale.inverse);
  for (int r = 0; r < task.filters; ++r) {
    const Floats multiplier = broadcast(task.multiplier[r]), bias = broadcast(task.bias[r]);
    for (int done = 0; done < task.pixels; done += kLanes) {
      const int64_t at = r * task.plane + done;
      const int count = task.pixels - done;
      Floats y = to_floats(load(task.sums + r * kTile + done)) * multiplier;
      y += bias;
      if constexpr (kResidual)
        y += to_floats(load_bytes(task.residual + at, count) - scale.residual_zero) * scale.residual_scale;
      if constexpr (kBytes) y *= inverse;
      y = clamp(y, low, high);
      if constexpr (kBytes) store_bytes(task.bytes + at, round_to_even(y) + scale.zero, count);
      else store_floats(task.floats + at, y, count);
    }
  }
}

using FinishTile = void (*)(const Int8Task&, const OutputScale&);

inline FinishTile finish_of(const Int8Scales& s) {
  if (s.is_quantised) return s.has_residual ? finish_tile<true, true> : finish_tile<true, false>;
  return s.has_residual ? finish_tile<false, true> : finish_tile<false, false>;
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
    sums_ = sums_buffer.get<int32_t>(static_cast<size_t>(plan.filter_tiles()) * kTileFilters8 * kTile);
    offset_ = offset_buffer.get<int64_t>(plan.columns.size());
    for (size_t k = 0; k < plan.columns.size(); ++k) {
      const Column& c = plan.columns[k];
      offset_[k] = s.copied ? offset_in_sources(c, s) : plan.sources[c.source].channel * s.input_plane;
    }
  }

  // A thread's part of the planes.
  void run(const Partition& threads) {
    const int filter_tiles = plan_.filter_tiles(), tiles = static_cast<int>((s_.conv_plane + kTile - 1) / kTile);
    const int parts = filter_parts(tiles, filter_tiles, threads.count);
    for (int g = 0; g < plan_.geometry.groups; ++g)
      for (int item = threads.begin(tiles * parts); item < threads.end(tiles * parts); ++item) {
        const Partition part{item / tiles, parts};
        run_tile(g, item % tiles * kTile, part.begin(filter_tiles), part.end(filter_tiles));
      }
  }

 private:
  // Tiles of filters [first, last) of a conv group at the tile of pixels from `begin` on, panel by panel.
  void run_tile(int group, int begin, int first, int last) {
    const Tile tile = tile_at(begin, s_.conv_plane, width_, source_width_);
    const int steps = plan_.steps(group), columns = plan_.group_columns(group);
    const int64_t* offset = offset_ + plan_.group_start[group];
    Int8Task task{};
    task.panel = panel_;
    task.plane = s_.conv_plane;
    task.pixels = tile.count;
    int done = 0;
    do {  // once, even without columns
      const int column = done * kColumnsAtOnce;
      task.steps = std::min(kPanelSteps, steps - done);
      pack({image_.base, image_.end, offset + column, std::min(kPanelSteps * kColumnsAtOnce, columns - column)}, tile,
           panel_);
      task.first = done == 0;
      task.last = done + task.steps == steps;
      for (int i = first; i < last; ++i) run_filters(group, i, plan_.weights_at(group, i, done), begin, task);
      done += task.steps;
    } while (done < steps);
  }

  // A tile of filters at a panel; behind the last panel, the epilogue.
  void run_filters(int group, int tile, const int32_t* weight, int begin, Int8Task& task) const {
    const int in_group = tile * kTileFilters8, filter = group * plan_.group_filters() + in_group;
    const int64_t at = filter * task.plane + begin;
    task.weight = weight;
    task.filters = std::min(kTileFilters8, plan_.group_filters() - in_group);
    task.offset = plan_.offset.data() + filter;
    // Between panels the sums of all filters wait; those of one panel may take one place in turn.
    task.sums = sums_ + (task.first && task.last ? 0 : in_group * kTile);
    const int vectors = (task.pixels + kLanes - 1) / kLanes;
    kSumTiles.by_size[(task.filters - 1) * kVectors + vectors - 1](task);
    if (!task.last) return;
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
  const FinishTile finish_;
  const int width_, source_width_;
  int32_t *panel_, *sums_;
  int64_t* offset_;  // of each column in what is read
};

// Phases: source planes, if the layer reads them, and the convolution.
inline void forward_int8(const Int8Pass& pass) {
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

}  // namespace SPP_ISA
}  // namespace spp
