// The pixel-vectorised kernel: vectors along the pixels of NCHW planes.
//
// The output is computed in tiles of a few filters by up to kVectors vectors of pixels, which stay in registers
// while the kernel runs over the kept columns: per column it loads the pixels, and multiplies them by one
// weight per filter. Columns are added in their order whatever the tile and the number of threads: the result
// is always the same, bit for bit. Only pairs of bfloat16 are rounded differently.
#pragma once

#include "activation.h"
#include "epilogue.h"
#include "images.h"
#include "pixel_panel.h"

#ifdef SPP_PIXEL_TILES
#include "tile_sums.h"
#endif

namespace spp {
namespace SPP_ISA {

// ---- The micro-kernel ----

// Sources of pixels: load_pixels(k, x) gives those under column k.

// From a panel, or pairs of them.
struct FromPanel {
  static constexpr bool kPaired = kPairs;
  const float* panel;

  template <int kV>
  inline __attribute__((always_inline)) void load_pixels(int k, Vector (&x)[kV]) const {
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) x[v] = load(panel + static_cast<size_t>(k) * kTile + v * kLanes);
  }
};

// From the input, packing them into a panel on the way, while the products keep the processor busy.
template <bool kMasked>
struct ThroughPanel {
  static constexpr bool kPaired = false;
  const InputPixels& input;
  float* panel;

  inline __attribute__((always_inline)) void load_pixels(int k, Vector (&x)[kVectors]) const {
    input.pack<kMasked>(k, panel, x);
  }
};

// From a panel, prefetching a vector of the next tile.
struct FromPanelAhead {
  static constexpr bool kPaired = false;
  const float *panel, *next;  // `next` is for an offset of 0
  const int64_t* offset;

  template <int kV>
  inline __attribute__((always_inline)) void load_pixels(int k, Vector (&x)[kV]) const {
    __builtin_prefetch(next + offset[k]);
    FromPanel{panel}.load_pixels(k, x);
  }
};

// sum[filter][v] += Σ_k weight[tile of filters][k][filter] · pixels[k][v].
template <int kTiles, int kV, typename Pixels>
inline __attribute__((always_inline)) void add_products(const float* weight, size_t tile_stride,
                                                        int count, const Pixels& pixels,
                                                        Vector (&sum)[kTiles * kTileFilters][kV]) {
#pragma GCC unroll 4
  for (int k = 0; k < count; ++k) {
    Vector x[kV];
    pixels.load_pixels(k, x);
#pragma GCC unroll 8
    for (int r = 0; r < kTiles * kTileFilters; ++r) {
      const float* w = weight + (r / kTileFilters) * tile_stride + r % kTileFilters;
#pragma GCC unroll 3
      for (int v = 0; v < kV; ++v) {
        if constexpr (Pixels::kPaired) sum[r][v] = add_pair_products(sum[r][v], x[v], w);
        else sum[r][v] += *w * x[v];
      }
    }
    weight += kTileFilters;
  }
}

// One or two tiles of filters at a tile of pixels.
struct TileTask {
  const float* weight;
  size_t tile_stride;     // floats from one tile of filters to the next
  float* panel;
  const InputPixels* input;  // to be packed by the first filters; null if the panel is packed
  int ahead;              // the vector of the next tile that is prefetched meanwhile
  int columns;            // or pairs of them
  const float* bias;      // one per filter
  const float* residual;  // planes like the output's, at the first pixel; or null
  float* output;          // the first filter's plane, at the first pixel
  int64_t plane;          // floats from one filter's plane to the next
  int filters, pixels;    // to store
  bool non_temporal;      // whether full tiles are stored so
  bool clamped;
  float low, high;
  Activation activation;
  float* partial;         // sums over the columns so far; null if the panel has all columns
  bool first, last;       // whether this is the first panel, or the last one
};

// Adds the residual, clamps, applies the activation and stores a tile. The activation keeps no sums in registers.
template <int kRows, int kV>
__attribute__((noinline)) void store_part(Vector (&sum)[kRows][kV], const TileTask& task) {
  const int rows = std::min(kRows, task.filters);
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kV; ++v) {
      const int count = std::min(kLanes, task.pixels - v * kLanes);
      Vector& y = sum[r][v];
      if (task.residual) y += load_lanes(task.residual + r * task.plane + v * kLanes, 0, count);
      if (task.clamped) y = clamp(y, task.low, task.high);
    }
  activate_row(task.activation, reinterpret_cast<float*>(sum), int64_t{rows} * kV * kLanes);
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kV; ++v)
      store_lanes(task.output + r * task.plane + v * kLanes, sum[r][v], task.pixels - v * kLanes);
}

// The same of a full tile without an activation. The compiler takes any store to change the task, which is read before.
template <int kRows, int kV>
inline __attribute__((always_inline)) void store_whole(const Vector (&sum)[kRows][kV],
                                                       const TileTask& task) {
  float* out = task.output;
  const float* residual = task.residual;
  const int64_t plane = task.plane;
  const bool clamped = task.clamped, non_temporal = task.non_temporal;
  const float low = task.low, high = task.high;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r, out += plane) {
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) {
      Vector y = sum[r][v];
      if (residual) y += load(residual + v * kLanes);
      if (clamped) y = clamp(y, low, high);
      store_output(out + v * kLanes, y, non_temporal);
    }
    if (residual) residual += plane;
  }
}

constexpr int kPrefetchColumns = 8;  // with fewer, to prefetch the output takes longer than it spares

template <int kRows, int kV>
inline __attribute__((always_inline)) void prefetch_output(const TileTask& task) {
  if (!task.last || task.non_temporal || task.columns < kPrefetchColumns) return;
  for (int r = 0; r < std::min(kRows, task.filters); ++r) {
    const float* row = task.output + r * task.plane;
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) __builtin_prefetch(row + v * kLanes, 1);
    __builtin_prefetch(row + kV * kLanes - 1, 1);
  }
}

// How a tile gets its pixels.
enum class Read { kPanel, kPanelAhead, kPacking, kPackingMasked, kNothing };  // kNothing: all sums were made

template <int kTiles, int kV, Read kRead>
inline __attribute__((always_inline)) void pixel_tile(const TileTask& task) {
  constexpr int kRows = kTiles * kTileFilters;
  Vector sum[kRows][kV];
  if (task.first) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kV; ++v) sum[r][v] = broadcast(task.bias[r]);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kV; ++v) sum[r][v] = load(task.partial + (r * kVectors + v) * kLanes);
  }
  prefetch_output<kRows, kV>(task);
  if (task.last && task.residual)
    for (int r = 0; r < std::min(kRows, task.filters); ++r)
      for (int v = 0; v < kV; ++v) __builtin_prefetch(task.residual + r * task.plane + v * kLanes);
  const auto add = [&](const auto& pixels) __attribute__((always_inline)) {
    add_products<kTiles, kV>(task.weight, task.tile_stride, task.columns, pixels, sum);
  };
  if constexpr (kRead == Read::kNothing) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kV; ++v) sum[r][v] += broadcast(task.bias[r]);
  } else if constexpr (kRead == Read::kPanel) add(FromPanel{task.panel});
  else if constexpr (kRead == Read::kPanelAhead)
    add(FromPanelAhead{task.panel, task.input->ahead(task.ahead), task.input->of.offset});
  else add(ThroughPanel<kRead == Read::kPackingMasked>{*task.input, task.panel});
  if (!task.last) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kV; ++v) store(task.partial + (r * kVectors + v) * kLanes, sum[r][v]);
    return;
  }
  const bool whole = task.pixels == kV * kLanes && task.filters >= kRows;
  if (whole && task.activation == Activation::kNone) return store_whole<kRows, kV>(sum, task);
  // A copy, since what a call can see lies in memory: the sums would be written there at the start.
  Vector copy[kRows][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) copy[r][v] = sum[r][v];
  store_part<kRows, kV>(copy, task);
}

// ---- Scheduling ----

// The planes of a conv group's filters.
struct GroupTask {
  const float* weight;
  const float* bias;
  const float* residual;
  float* output;
  float* partial;  // room for the sums of all filters of a tile; null if one panel has all columns
  int filters;
  bool non_temporal;  // whether full tiles are stored so
};

// Tiles of filters at three vectors of pixels at once: more don't fit into fewer registers.
constexpr int kWide = kLanes == 16 ? 2 : 1;

// The task of some filters, of which the first one is in tile i, at the pixels from `begin` on.
inline __attribute__((always_inline)) void set_filters(const GroupTask& group, int i, int tiles, int begin,
                                                       TileTask& task) {
  const int filter = i * kTileFilters;
  task.weight = group.weight + i * task.tile_stride;
  task.bias = group.bias + filter;
  task.filters = std::min(group.filters - filter, tiles * kTileFilters);
  task.output = group.output + filter * task.plane + begin;
  task.residual = group.residual ? group.residual + filter * task.plane + begin : nullptr;
  task.partial = group.partial ? group.partial + filter * kTile : nullptr;
}

// kTiles tiles of filters from tile i on.
template <int kTiles, int kV, Read kRead>
inline __attribute__((always_inline)) void run_filter_tiles(const GroupTask& group, TileTask& task, int begin,
                                                            int i) {
  set_filters(group, i, kTiles, begin, task);
  pixel_tile<kTiles, kV, kRead>(task);
}

// Tiles of filters [first, last), from a panel.
template <int kTiles, int kV>
void run_packed(const GroupTask& group, TileTask& task, int begin, int first, int last) {
  int i = first;
  for (; i + kTiles <= last; i += kTiles) run_filter_tiles<kTiles, kV, Read::kPanel>(group, task, begin, i);
  if (i < last) run_filter_tiles<1, kV, Read::kPanel>(group, task, begin, i);
}

// Vectors of the next tile that the first filters prefetch: one, if there are filters for the others.
inline int prefetched_at_once(int filter_tiles) { return std::max(1, kVectors + 1 - filter_tiles / kWide); }

// The first filters pack the panel. They and those after them prefetch the pixels of the next tile. Returns the
// first tile of filters that is left.
template <int kTiles>
int pack_and_run(const GroupTask& group, TileTask& task, int begin, int first) {
  if (task.input->mask) run_filter_tiles<kTiles, kVectors, Read::kPackingMasked>(group, task, begin, first);
  else run_filter_tiles<kTiles, kVectors, Read::kPacking>(group, task, begin, first);
  int i = first + kTiles;
  for (task.ahead = task.input->prefetched; task.ahead < kVectors; ++task.ahead, i += kTiles)
    run_filter_tiles<kTiles, kVectors, Read::kPanelAhead>(group, task, begin, i);
  return i;
}

#ifdef SPP_PIXEL_TILES
constexpr int kFilterUnit = kTileSide / kTileFilters;  // tiles of filters that are computed together
constexpr int steps_of_weights(int steps) { return padded_steps(steps); }
using KernelRegisters = TileRegisters;

// The same by the tiles of AMX: products of all filters, then the epilogue of a vector of pixels after the other.
inline void run_filters(const GroupTask& group, TileTask task, int begin, int first, int last) {
  float* panel = task.panel;
  std::fill(panel + task.columns * kTile, panel + padded_steps(task.columns) * kTile, 0.0f);  // 0 · NaN would be NaN
  set_filters(group, first, last - first, begin, task);
  sum_tiles({task.weight, task.tile_stride * kFilterUnit, task.panel, task.partial, task.filters, task.columns,
             task.pixels, task.first});
  if (!task.last) return;
  task.first = false;
  const int pixels = task.pixels;
  for (int i = first; i < last; i += 2)
    for (int done = 0; done < pixels; done += kLanes) {
      GroupTask part = group;
      part.partial += done;
      task.pixels = std::min(kLanes, pixels - done);
      run_filter_tiles<2, 1, Read::kNothing>(part, task, begin + done, i);
    }
}
#else
constexpr int kFilterUnit = 1;
constexpr int steps_of_weights(int steps) { return steps; }
struct KernelRegisters {};

// Tiles of filters [first, last) at one tile of pixels. `task` has what is the same for all of them.
inline void run_filters(const GroupTask& group, TileTask task, int begin, int first, int last) {
  if (task.input && last - first >= kWide) first = pack_and_run<kWide>(group, task, begin, first);
  else if (task.input) first = pack_and_run<1>(group, task, begin, first);
  // Wide tiles fill the registers with few filters, narrow ones take more of them at once.
  const int vectors = (task.pixels + kLanes - 1) / kLanes;
  if (vectors == 3) run_packed<kWide, 3>(group, task, begin, first, last);
  else if (vectors == 2) run_packed<kWide, 2>(group, task, begin, first, last);
  else run_packed<2, 1>(group, task, begin, first, last);
}
#endif

// The convolution of an image.
class Convolution {
 public:
  // `base` is the image, or its source planes. `start` and `end` are those of the tensor that is read if
  // nothing is copied.
  Convolution(const Plan& plan, const KernelConfig& config, const Shapes& s, const float* base,
              const float* start, const float* end)
      : plan_(plan), config_(config), s_(s), base_(base), start_(start), end_(end) {
    thread_local Buffer panel_buffer, partial_buffer, offset_buffer, mask_buffer;
    const Geometry& g = plan.geometry;
    const size_t taps = static_cast<size_t>(g.kernel[0]) * g.kernel[1];
    border_ = {mask_buffer.get<Bits>(taps * kVectors), false};
    panel_ = panel_buffer.get<float>(kTile * kPanelColumns + kTile);
    partial_ = partial_buffer.get<float>(static_cast<size_t>(filter_units()) * kFilterUnit * kTileFilters * kTile);
    offset_ = offset_buffer.get<int64_t>(plan.columns.size());
    for (size_t k = 0; k < plan.columns.size(); ++k) {
      const Column& c = plan.columns[k];
      offset_[k] = s.copied ? offset_in_sources(c, s)
                            : plan.sources[c.source].channel * s.input_plane +
                                  static_cast<int64_t>(c.row - g.padding[0]) * config.width + c.col -
                                  g.padding[1];
    }
  }

  // A thread's part of the planes.
  void run(const float* residual, float* output, bool non_temporal, const Partition& threads) {
    [[maybe_unused]] const KernelRegisters registers{};
    const int filters = plan_.group_filters(), filter_tiles = plan_.group_tiles(), units = filter_units();
    const int tiles = static_cast<int>((s_.conv_plane + kTile - 1) / kTile);
    const int parts = filter_parts(tiles, units, threads.count);
    for (int g = 0; g < plan_.geometry.groups; ++g) {
      const int64_t at = g * filters * s_.conv_plane;
      const TileWeights& weights = kPairs ? plan_.pairs : plan_.weights;
      set_group(g);
      const GroupTask group{weights.of_group(g), plan_.bias.data() + g * filters,
                            residual ? residual + at : nullptr, output + at, partial_, filters,
                            non_temporal};
      for (int item = threads.begin(tiles * parts); item < threads.end(tiles * parts); ++item) {
        const Partition part{item / tiles, parts};
        run_tile(group, item % tiles * kTile, part.begin(units) * kFilterUnit,
                 std::min(filter_tiles, part.end(units) * kFilterUnit));
      }
    }
  }

 private:
  int filter_units() const { return (plan_.group_tiles() + kFilterUnit - 1) / kFilterUnit; }

  void set_group(int g) {
    columns_ = {plan_.columns.data() + plan_.group_start[g], offset_ + plan_.group_start[g],
                plan_.group_columns(g)};
    const auto [least, most] = std::minmax_element(columns_.offset, columns_.offset + columns_.count);
    least_ = columns_.count ? *least : 0;
    most_ = columns_.count ? *most : 0;
  }

  // Tiles of filters [first, last) at the tile of pixels from `begin` on, panel by panel.
  void run_tile(const GroupTask& group, int begin, int first, int last) {
    const Tile tile = tile_at(begin, config_.conv_width, s_);
    const int steps = (columns_.count + kColumnsAtOnce - 1) / kColumnsAtOnce;
    TileTask task{};
    task.tile_stride = static_cast<size_t>(steps_of_weights(steps)) * kTileFilters;
    task.panel = panel_;
    task.plane = s_.conv_plane;
    task.pixels = tile.count;
    task.non_temporal = group.non_temporal;
    task.clamped = plan_.low > -kInfinity || plan_.high < kInfinity;
    task.low = plan_.low;
    task.high = plan_.high;
    task.activation = plan_.activation;
    if (!s_.copied && columns_.count > 0)
      find_border(plan_.geometry, config_.height, config_.width, begin, border_);
    int done = 0;
    do {  // once, even without columns
      const int column = done * kColumnsAtOnce;
      task.columns = std::min(kPanelColumns, steps - done);
      const InputPixels input{base_ + begin,
                              {columns_.columns + column, columns_.offset + column,
                               std::min(kPanelColumns * kColumnsAtOnce, columns_.count - column)},
                              border_.inside ? nullptr : border_.mask, prefetched_at_once(last - first)};
      // Products of tiles have lanes without a pixel, too; let them be the same every time.
      if (kFilterUnit > 1 && tile.count < kTile) std::fill_n(panel_, task.columns * kTile, 0.0f);
      task.input = pack(tile, input, panel_) ? nullptr : &input;
      task.first = done == 0;
      task.last = done + task.columns == steps;
      GroupTask panel = group;
      panel.weight += static_cast<size_t>(done) * kTileFilters * kFilterUnit;
      run_filters(panel, task, begin, first, last);
      done += task.columns;
    } while (done < steps);
  }

  // Packs a panel. Returns false for the panels that the first filters pack.
  bool pack(const Tile& tile, const InputPixels& input, float* panel) const {
    if (s_.copied) {
      const auto pack = tile.runs == 3 ? pack_sources<3> : tile.runs == 4 ? pack_sources<4> : pack_sources<0>;
      pack(tile, base_, input.of, panel);
    } else if (input.in + least_ < start_ || input.in + most_ + kTile > end_) {
      pack_edge(start_, end_, input, panel);
    } else if (tile.vectors() == kVectors) {
      return false;
    } else if (input.mask) {
      pack_input<true>(input, panel);
    } else {
      pack_input<false>(input, panel);
    }
    return true;
  }

  const Plan& plan_;
  const KernelConfig& config_;
  const Shapes& s_;
  const float *base_, *start_, *end_;
  Border border_;
  float *panel_, *partial_;
  int64_t* offset_;
  PanelColumns columns_{};  // of the conv group
  int64_t least_ = 0, most_ = 0;  // of its offsets
};

// Phases: source planes, convolution, epilogue operations and narrowing, those that there are.
inline void forward_pixels(const ForwardPass& pass) {
  const Plan& plan = *pass.plan;
  const Geometry& g = plan.geometry;
  Shapes s = shapes_of(plan, pass, true);
  const bool same_rows = g.stride[0] == 1 && g.stride[1] == 1 && pass.width == pass.conv_width;
  // Masks for the borders take as long as copies of so many planes.
  const bool few = plan.sources.size() <= static_cast<size_t>(g.kernel[0] * g.kernel[1]);
  s.copied = !same_rows || few || pass.bfloat16;
  const bool has_epilogue = !plan.epilogue.empty();
  const size_t planes = has_epilogue ? g.filters * static_cast<size_t>(s.conv_plane) + kLanes : 0;
  const float* start = static_cast<const float*>(pass.input);
  const float* end = start + pass.batch * g.channels * s.input_plane;
  const Phases phases{s.copied ? kReadPhase : 0, 1 + has_epilogue + (pass.bfloat16 != 0)};
  for_each_image(pass, s, planes, phases, [&](int phase, const ImagePart& part) {
    if (phase == kReadPhase) return read_phase(pass, s, part);
    float* output = output_of(pass, s, part);
    float* made = has_epilogue ? part.scratch.planes : output;
    if (phase == 0) {
      Convolution conv(plan, pass, s, input_of(pass, s, part), start, end);
      conv.run(residual_of(pass, s, part), made, is_non_temporal(pass, s, made), part.threads);
    } else if (phase == 1 && has_epilogue) {
      apply_epilogue(plan, pass, s, made, output, part.threads);
    } else {
      narrow_result(pass, s, part);
    }
  });
}

}  // namespace SPP_ISA
}  // namespace spp
