// The pixel-vectorised kernel of depthwise layers: vectors along the pixels of NCHW planes, plane by plane.
//
// The rows that some outputs need are copied into scratch that stays in the L1 cache, with zeros around them, and
// with the phases of the stride along the rows taken apart. A tile of outputs, some rows by some vectors, stays in
// registers while the kernel runs over the channel's kept columns: per column it multiplies the pixels by one weight.
// Columns are added in the order of the other kernels.
#pragma once

#include <utility>

#include "activation.h"
#include "epilogue.h"
#include "images.h"

namespace spp {
namespace SPP_ISA {

// ---- The micro-kernel ----

// Outputs of a plane that are computed together: some rows, some vectors wide.
struct StencilTile {
  const float* pixels;    // in scratch, of the first output under an offset of 0
  int64_t line;           // floats from a row of scratch to the next one
  int64_t row_step;       // from the pixels under a row of outputs to those under the next one
  const int64_t* offset;  // of the pixels under each kept column
  const float* weight;    // one per kept column
  int count;              // of the columns
  float bias;
  bool clamped;
  float low, high;
  float* out;
  int rows;
  int width;           // floats from a row of the output to the next one
  int pixels_left;     // from the first output to the end of its row
  const float* limit;  // what may be written ends here; what a row writes behind its end is written again
};

// Clamps a row of sums and stores it.
template <int kV>
inline __attribute__((always_inline)) void store_sums(Vector (&sum)[kV], const StencilTile& tile, float* out) {
  if (tile.clamped) {
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) sum[v] = clamp(sum[v], tile.low, tile.high);
  }
  const bool whole = out + kV * kLanes <= tile.limit;
#pragma GCC unroll 3
  for (int v = 0; v < kV; ++v) {
    if (whole) store(out + v * kLanes, sum[v]);
    else if (tile.pixels_left > v * kLanes) store_lanes(out + v * kLanes, sum[v], tile.pixels_left - v * kLanes);
  }
}

// Some of the columns, kRows rows.
template <int kV, int kRows>
void sparse_stencil(const StencilTile& tile) {
  Vector sum[kRows][kV];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) sum[r][v] = broadcast(tile.bias);
  for (int k = 0; k < tile.count; ++k) {
    const float* x = tile.pixels + tile.offset[k];
    const Vector w = broadcast(tile.weight[k]);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r, x += tile.row_step)
#pragma GCC unroll 3
      for (int v = 0; v < kV; ++v) sum[r][v] += w * load(x + v * kLanes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) store_sums<kV>(sum[r], tile, tile.out + r * tile.width);
}

// Adds a row of pixels to the sums of the rows of outputs that it is part of. Of the first of them it is under row
// `first` of the kernel.
template <int kSide, int kStride, int kSums, int kV>
inline __attribute__((always_inline)) void add_line(const float* x, const int64_t* column, const Vector* weight,
                                                    int first, Vector (&sum)[kSums][kV]) {
#pragma GCC unroll 7
  for (int j = 0; j < kSide; ++j) {
    Vector pixels[kV];
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) pixels[v] = load(x + column[j] + v * kLanes);
#pragma GCC unroll 7
    for (int a = 0; a < kSums; ++a)
      if (first >= a * kStride) {
#pragma GCC unroll 3
        for (int v = 0; v < kV; ++v) sum[a][v] += weight[(first - a * kStride) * kSide + j] * pixels[v];
      }
  }
}

// All columns of a square kernel, any number of rows: each pixel is loaded once for all rows of outputs.
template <int kSide, int kStride, int kV>
void dense_stencil(const StencilTile& tile) {
  constexpr int kSums = (kSide + kStride - 1) / kStride, kBefore = kSide - kStride;
  alignas(64) Vector weight[kSide * kSide];
#pragma GCC unroll 49
  for (int k = 0; k < kSide * kSide; ++k) weight[k] = broadcast(tile.weight[k]);
  int64_t column[kSide];
#pragma GCC unroll 7
  for (int j = 0; j < kSide; ++j) column[j] = tile.offset[j];
  Vector sum[kSums][kV];
#pragma GCC unroll 7
  for (int a = 0; a < kSums; ++a)
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) sum[a][v] = broadcast(tile.bias);
  const float* x = tile.pixels;
  const int64_t line = tile.line;
  const int rows = tile.rows, width = tile.width;
  const Vector bias = broadcast(tile.bias);
#pragma GCC unroll 7
  for (int i = 0; i < kBefore; ++i, x += line)
    add_line<kSide, kStride, kSums, kV>(x, column, weight, i, sum);
  float* out = tile.out;
#pragma GCC unroll 6
  for (int y = 0; y < rows; ++y, out += width) {
#pragma GCC unroll 2
    for (int i = kBefore; i < kSide; ++i, x += line)
      add_line<kSide, kStride, kSums, kV>(x, column, weight, i, sum);
    store_sums<kV>(sum[0], tile, out);
#pragma GCC unroll 7
    for (int a = 0; a < kSums; ++a)
#pragma GCC unroll 3
      for (int v = 0; v < kV; ++v) sum[a][v] = a + 1 < kSums ? sum[a + 1][v] : bias;
  }
}

using StencilKernel = void (*)(const StencilTile&);

// Rows of a tile so many vectors wide: their sums fit into the registers.
constexpr int most_rows(int vectors) { return vectors == 1 ? 8 : vectors == 2 ? 5 : 4; }

template <int kV, int... kIndex>
inline const StencilKernel* sparse_kernels_of(std::integer_sequence<int, kIndex...>) {
  static constexpr StencilKernel kKernels[] = {sparse_stencil<kV, kIndex + 1>...};
  return kKernels;
}

// Those of one row, of two, and so on.
inline const StencilKernel* sparse_kernels(int vectors) {
  return vectors == 1   ? sparse_kernels_of<1>(std::make_integer_sequence<int, most_rows(1)>())
         : vectors == 2 ? sparse_kernels_of<2>(std::make_integer_sequence<int, most_rows(2)>())
                        : sparse_kernels_of<3>(std::make_integer_sequence<int, most_rows(3)>());
}

constexpr int kDenseVectors = 2;  // of a tile

template <int kSide, int kStride>
inline const StencilKernel* dense_kernels_of() {
  static constexpr StencilKernel kKernels[] = {dense_stencil<kSide, kStride, 1>, dense_stencil<kSide, kStride, 2>};
  return kKernels;
}

// Those of one vector, and of two; null where there are none for the layer, or where they don't pay: few outputs of
// many columns, whose weights take long to be put into vectors.
inline const StencilKernel* dense_kernels(const Geometry& g, int vectors) {
  const int side = g.kernel[0], stride = g.stride[0];
  if (side != g.kernel[1] || g.dilation[0] != 1 || (vectors == 1 && side > 3)) return nullptr;
  if (stride == 1)
    return side == 3   ? dense_kernels_of<3, 1>()
           : side == 5 ? dense_kernels_of<5, 1>()
           : side == 7 ? dense_kernels_of<7, 1>()
                       : nullptr;
  if (stride == 2) return side == 3 ? dense_kernels_of<3, 2>() : side == 5 ? dense_kernels_of<5, 2>() : nullptr;
  return nullptr;
}

// The next part of `left`, which are split into parts as equal as can be, of at most `most`.
inline int next_part(int left, int most) {
  const int parts = (left + most - 1) / most;
  return (left + parts - 1) / parts;
}

// ---- Rows in scratch ----

// Where a row of the input ends, within a vector of each phase: what lies behind it becomes 0.
struct RowEnd {
  Bits first{}, second{};  // masks of one phase, or of the even pixels and of the odd ones
  int rest;                // pixels behind the last whole vectors
  const float* end;        // of the tensor

  RowEnd(int width, int stride, const float* tensor_end)
      : rest(width % (stride == 2 ? 2 * kLanes : kLanes)), end(tensor_end) {
    const int count = stride == 2 ? (rest + 1) / 2 : rest;
    for (int i = 0; i < count; ++i) first[i] = -1;
    for (int i = 0; i < rest / 2; ++i) second[i] = -1;
  }
};

// Copies of a row of the input. What is the same for all rows is passed by value, since the compiler takes any store to
// change what it can see.
inline __attribute__((always_inline)) void copy_one_phase(const float* in, int width, RowEnd row, float* out) {
  int x = 0;
  for (; x + kLanes <= width; x += kLanes) store(out + x, load(in + x));
  if (x == width) return;
  const bool inside = in + x + kLanes <= row.end;
  store(out + x, inside ? masked(load(in + x), row.first) : load_lanes(in + x, 0, row.rest));
}

// The even pixels and the odd ones.
inline __attribute__((always_inline)) void copy_two_phases(const float* in, int width, RowEnd row, float* even,
                                                           float* odd) {
  Vector first, second;
  for (int x = 0; x + 2 * kLanes <= width; x += 2 * kLanes, in += 2 * kLanes, even += kLanes, odd += kLanes) {
    load_alternating(in, first, second);
    store(even, first);
    store(odd, second);
  }
  if (row.rest == 0) return;
  float part[2 * kLanes];
  if (in + 2 * kLanes > row.end) {
    std::copy_n(in, row.rest, part);
    in = part;
  }
  load_alternating(in, first, second);
  store(even, masked(first, row.first));
  store(odd, masked(second, row.second));
}

// Any number of phases, which are `phase` floats apart.
inline void copy_phases(const float* in, int width, int stride, int64_t phase, float* out) {
  for (int first = 0; first < stride; ++first, out += phase)
    for (int64_t x = first, i = 0; x < width; x += stride, ++i) out[i] = in[x];
}

#ifdef SPP_EXACT_BUFFERS
constexpr int kScratchFloats = 1 << 9;  // so that small planes are cut into strips, too
#else
constexpr int kScratchFloats = 1 << 12;  // half of an L1 cache
#endif

// How planes go through scratch: some whole planes at once, or one in strips of rows. A row is its phases, one behind
// the other, with zeros in front of each: as many as the padding needs on either side.
struct Strips {
  int lead;           // zeros in front of a phase
  int phase;          // floats of a phase, with those
  int64_t line;       // of a row
  int rows;           // of the output, of a strip
  int64_t plane;      // floats of what a strip reads
  int at_once;        // planes
  int reach, stride;  // rows under one row of the output, and from it to the next one
  int64_t room;       // floats of all planes, and those behind that the last tile reads

  Strips(const Plan& plan, const KernelConfig& config) {
    const Geometry& g = plan.geometry;
    const auto whole = [](int n) { return (n + kLanes - 1) / kLanes * kLanes; };
    const auto phase_of = [&](int n) { return whole((n + g.stride[1] - 1) / g.stride[1]); };
    lead = phase_of(g.padding[1]);
    phase = lead + phase_of(config.width);
    line = int64_t{g.stride[1]} * phase;
    stride = g.stride[0];
    reach = (g.kernel[0] - 1) * g.dilation[0] + 1;
    const int64_t most = std::max<int64_t>((kScratchFloats / line - reach) / stride + 1, most_rows(1));
    rows = next_part(config.conv_height, static_cast<int>(std::min<int64_t>(most, config.conv_height)));
    plane = lines(rows) * line;
    at_once = rows < config.conv_height ? 1 : static_cast<int>(std::max<int64_t>(1, kScratchFloats / plane));
    room = at_once * plane + whole(config.conv_width) + plan.margin[1] + lead;
  }

  int lines(int out_rows) const { return (out_rows - 1) * stride + reach; }

  // Of the pixel under a tap of output (0, 0).
  int64_t offset(const Geometry& g, int tap) const {
    const int step = g.stride[1], x = tap % g.kernel[1] * g.dilation[1] - g.padding[1];
    const int in_phase = (x % step + step) % step;
    return tap / g.kernel[1] * g.dilation[0] * line + int64_t{in_phase} * phase + lead + (x - in_phase) / step;
  }
};

// ---- Scheduling ----

class DepthwiseConvolution {
 public:
  DepthwiseConvolution(const ForwardPass& pass, const Shapes& s)
      : plan_(*pass.plan), config_(pass), s_(s), strips_(plan_, pass),
        row_end_(pass.width, plan_.geometry.stride[1], static_cast<const float*>(pass.input) + input_count(pass)),
        dense_(dense_kernels(plan_.geometry, vectors())) {
    thread_local Buffer scratch_buffer, tap_buffer, offset_buffer;
    scratch_ = scratch_buffer.get<float>(strips_.room);
    std::fill_n(scratch_, strips_.room, 0.0f);
    of_tap_ = tap_buffer.get<int64_t>(plan_.taps());
    offset_ = offset_buffer.get<int64_t>(plan_.taps());
    for (int tap = 0; tap < plan_.taps(); ++tap) of_tap_[tap] = strips_.offset(plan_.geometry, tap);
    for (int wide = 1; wide <= kVectors; ++wide) sparse_[wide - 1] = sparse_kernels(wide);
    tile_.line = strips_.line;
    tile_.row_step = strips_.stride * strips_.line;
    tile_.low = plan_.low;
    tile_.high = plan_.high;
    tile_.width = config_.conv_width;
  }

  // A thread's part of the planes of an image; `residual` may be null.
  void run(const float* image, const float* residual, float* output, const Partition& threads) {
    const int channels = plan_.geometry.channels, end = threads.end(channels), at_once = strips_.at_once;
    tile_.limit = output + end * s_.conv_plane;
    tile_.clamped = !residual && (plan_.low > -kInfinity || plan_.high < kInfinity);
    for (int c = threads.begin(channels); c < end; c += at_once) {
      const int planes = std::min(at_once, end - c);
      for (int y = 0; y < config_.conv_height; y += strips_.rows) {
        tile_.rows = std::min(strips_.rows, config_.conv_height - y);
        const int64_t at = c * s_.conv_plane + int64_t{y} * config_.conv_width;
        for (int i = 0; i < planes; ++i)
          copy_strip(image + (c + i) * s_.input_plane, y, tile_.rows, scratch_ + i * strips_.plane);
        for (int i = 0; i < planes; ++i)
          run_strip(c + i, scratch_ + i * strips_.plane, output + at + i * s_.conv_plane);
        // One strip, or whole planes, which lie behind each other.
        const int64_t count = int64_t{planes} * tile_.rows * config_.conv_width;
        finish(residual ? residual + at : nullptr, output + at, count);
      }
    }
  }

 private:
  static int64_t input_count(const ForwardPass& pass) {
    return pass.batch * pass.plan->geometry.channels * pass.height * pass.width;
  }

  // What output rows [y, y + rows) of a channel read.
  void copy_strip(const float* plane, int y, int rows, float* out) const {
    const int height = config_.height, width = config_.width, stride = plan_.geometry.stride[1];
    const int64_t line = strips_.line, phase = strips_.phase, lead = strips_.lead;
    const RowEnd row_end = row_end_;
    const int first = y * strips_.stride - plan_.geometry.padding[0], last = first + strips_.lines(rows);
    for (int row = first; row < last; ++row, out += line) {
      const float* in = plane + static_cast<int64_t>(row) * width;
      if (row < 0 || row >= height) {
        if (strips_.rows < config_.conv_height) std::fill_n(out, line, 0.0f);  // else they are 0 from the start
      } else if (stride == 1) {
        copy_one_phase(in, width, row_end, out + lead);
      } else if (stride == 2) {
        copy_two_phases(in, width, row_end, out + lead, out + phase + lead);
      } else {
        copy_phases(in, width, stride, phase, out + lead);
      }
    }
  }

  // The offsets of a channel's kept columns.
  const int64_t* offsets_of(int channel, int count) {
    if (count == plan_.taps()) return of_tap_;
    const Column* columns = plan_.columns.data() + plan_.group_start[channel];
    for (int k = 0; k < count; ++k) offset_[k] = of_tap_[columns[k].tap];
    return offset_;
  }

  // The outputs of a channel that a strip is for.
  void run_strip(int channel, const float* pixels, float* out) {
    tile_.count = plan_.group_columns(channel);
    tile_.offset = offsets_of(channel, tile_.count);
    tile_.weight = plan_.depthwise.data() + plan_.group_start[channel];
    tile_.bias = plan_.bias[channel];
    if (dense_ && tile_.count == plan_.taps())
      return run_tiles_of<kDenseVectors>(tile_.rows, pixels, out, [&](int wide, int) { return dense_[wide - 1]; });
    run_tiles_of<kVectors>(most_rows(std::min(kVectors, vectors())), pixels, out,
                           [&](int wide, int rows) { return sparse_[wide - 1][rows - 1]; });
  }

  int vectors() const { return (config_.conv_width + kLanes - 1) / kLanes; }

  // In tiles of at most kMost vectors and most_rows rows; kernel(vectors, rows) computes one.
  template <int kMost, typename Kernel>
  void run_tiles_of(int most, const float* pixels, float* out, const Kernel& kernel) {
    const int rows = tile_.rows, height = next_part(rows, most), width = tile_.width;
    for (int y = 0; y < rows; y += height) {
      tile_.rows = std::min(height, rows - y);
      int x = 0;
      for (int left = vectors(), wide; left > 0; left -= wide) {
        wide = next_part(left, kMost);
        // The last tile ends where the row does, and computes pixels of the tile before it once more.
        x = std::max(0, std::min(x, width - wide * kLanes));
        tile_.pixels = pixels + y * tile_.row_step + x;
        tile_.out = out + static_cast<int64_t>(y) * width + x;
        tile_.pixels_left = width - x;
        kernel(wide, tile_.rows)(tile_);
        x += wide * kLanes;
      }
    }
    tile_.rows = rows;
  }

  // Adds the residual to outputs that lie in the cache, clamps them or applies the activation.
  void finish(const float* residual, float* out, int64_t count) const {
    if (!residual && plan_.activation == Activation::kNone) return;
    const int64_t whole = count / kLanes * kLanes;
    const int rest = static_cast<int>(count - whole);
    float tail[kLanes];
    store(tail, load_lanes(out + whole, 0, rest));
    if (residual) {
      for (int64_t i = 0; i < whole; i += kLanes)
        store(out + i, clamp(load(out + i) + load(residual + i), plan_.low, plan_.high));
      store(tail, clamp(load(tail) + load_lanes(residual + whole, 0, rest), plan_.low, plan_.high));
    }
    activate_row(plan_.activation, out, whole);
    activate_row(plan_.activation, tail, kLanes);
    if (rest) store_lanes(out + whole, load(tail), rest);
  }

  const Plan& plan_;
  const KernelConfig& config_;
  const Shapes& s_;
  Strips strips_;
  RowEnd row_end_;
  const StencilKernel* dense_;              // by vectors; may be null
  const StencilKernel* sparse_[kVectors];   // by vectors, then by rows
  StencilTile tile_{};                      // what tiles have in common
  float* scratch_;
  int64_t *of_tap_, *offset_;  // of all taps, and of a channel's kept columns
};

// Phases: convolution, and epilogue operations if there are any. In float32 only.
inline void forward_depthwise(const ForwardPass& pass) {
  const Plan& plan = *pass.plan;
  const Geometry& g = plan.geometry;
  Shapes s = shapes_of(plan, pass, true);
  s.copied = false;
  const bool has_epilogue = !plan.epilogue.empty();
  const size_t planes = has_epilogue ? g.filters * static_cast<size_t>(s.conv_plane) + kLanes : 0;
  for_each_image(pass, s, planes, {0, 1 + has_epilogue}, [&](int phase, const ImagePart& part) {
    float* output = output_of(pass, s, part);
    float* made = has_epilogue ? part.scratch.planes : output;
    if (phase == 1) return apply_epilogue(plan, pass, s, made, output, part.threads);
    DepthwiseConvolution conv(pass, s);
    conv.run(input_of(pass, s, part), residual_of(pass, s, part), made, part.threads);
  });
}

}  // namespace SPP_ISA
}  // namespace spp
