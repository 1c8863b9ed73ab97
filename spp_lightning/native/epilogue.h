// The epilogue operations of a layer, one after the other: row by row while a row of the convolution lies in the
// cache, on planes that the other kernels made, and their gradients.
#pragma once

#include "epilogue_rows.h"
#include "source_planes.h"
#include "transpose.h"

namespace spp {
namespace SPP_ISA {

constexpr int kTransposedPixels = 128;  // of the output, transposed at once

// The rows that the convolution, or an epilogue operation behind it, makes, and which of the rows before it
// one of them is made of.
struct RowSource {
  int height, width;
  int window, stride, padding;
  int kept;      // rows that the next operation reads at once; of the last operation all rows are kept
  size_t start;  // of those in the buffer

  int64_t pitch() const { return static_cast<int64_t>(width) * kChannelBlock; }
};

// Those of a layer that computes so many channel blocks at once.
struct RowSources {
  std::vector<RowSource> of;  // the convolution, then each epilogue operation
  size_t floats = 0;          // of the rows that all but the last one keep

  RowSources(const Plan& plan, const KernelConfig& config, int blocks) {
    of.push_back({config.conv_height, config.conv_width, 0, 0, 0, 0, 0});
    for (const EpilogueOp& op : plan.epilogue) {
      RowSource next = of.back(), &last = of.back();
      size_after(op, next.height, next.width);
      const bool is_norm = op.kind == EpilogueKind::kLocalResponseNorm;
      next.window = op.kernel[0];
      next.stride = is_norm ? 1 : op.stride[0];
      next.padding = is_norm ? op.kernel[0] / 2 : op.padding[0];
      last.kept = next.window;
      last.start = floats;
      floats += blocks * last.kept * last.pitch();
      of.push_back(next);
    }
  }
};

// Makes the rows of some channel blocks, operation after operation, each row when it is asked for.
// conv_row(y, out, stride) makes a row of the convolution, the blocks `stride` floats apart.
template <typename ConvRow>
class RowMaker {
 public:
  RowMaker(const Plan& plan, const RowSources& sources, int blocks, const ConvRow& conv_row)
      : ops_(plan.epilogue), sources_(sources.of), blocks_(blocks), conv_row_(conv_row) {
    thread_local Buffer kept_buffer, next_buffer;
    kept_ = kept_buffer.get<float>(sources.floats);
    next_ = next_buffer.get<int>(sources_.size());
    std::fill_n(next_, sources_.size(), 0);
  }

  // Rows [begin, end) of the last operation: the blocks `stride` floats apart, their rows `pitch`. It must
  // not be called for rows before those that it made.
  void make(int begin, int end, float* out, int64_t pitch, int64_t stride) {
    const int last = static_cast<int>(sources_.size()) - 1;
    next_[last] = begin;
    make_rows(last, end, [&](int y) { return out + (y - begin) * pitch; }, stride);
  }

 private:
  template <typename Row>
  void make_rows(int op, int end, const Row& row, int64_t stride) {
    for (int& y = next_[op]; y < end; ++y) {
      if (op == 0) conv_row_(y, row(y), stride);
      else make_row(op, y, row(y), stride);
    }
  }

  void make_row(int op, int y, float* out, int64_t stride) {
    const RowSource &to = sources_[op], &from = sources_[op - 1];
    const int top = y * to.stride - to.padding;
    const int64_t from_stride = from.kept * from.pitch();
    const auto row = [&](int i) { return kept_ + from.start + i % from.kept * from.pitch(); };
    next_[op - 1] = std::max(next_[op - 1], top);
    make_rows(op - 1, std::min(top + to.window, from.height), row, from_stride);
    for (int block = 0; block < blocks_; ++block)
      epilogue_row(ops_[op - 1], [&](int i) { return row(i) + block * from_stride; }, from.height,
                   from.width, y, out + block * stride);
  }

  const std::vector<EpilogueOp>& ops_;
  const std::vector<RowSource>& sources_;
  int blocks_;
  const ConvRow& conv_row_;
  float* kept_;
  int* next_;  // of each operation: the row that comes next
};

// Where rows of channel blocks go as planes.
struct PlaneOutput {
  float* planes;  // of the first filter
  int64_t plane;  // floats from one to the next
  int width;
  int filters;    // of all blocks
  bool non_temporal;  // whether whole vectors are stored so
};

// Rows [begin, end) of some channel blocks, transposed some at a time.
template <typename ConvRow>
inline void make_planes(RowMaker<ConvRow>& maker, int begin, int end, const PlaneOutput& to) {
  thread_local Buffer rows_buffer;
  const int blocks = blocks_of(to.filters);
  int at_once = std::max(1, kTransposedPixels / to.width);
  // In whole vectors of pixels, where that isn't too few rows.
  while (at_once > 1 && at_once * to.width % kLanes != 0 && (at_once - 1) * to.width >= kTransposedPixels / 2)
    --at_once;
  const int64_t pitch = static_cast<int64_t>(to.width) * kChannelBlock, stride = at_once * pitch;
  // Tiles are transposed whole: there is room behind the last one.
  float* made = rows_buffer.get<float>(blocks * stride + kLanes * kChannelBlock);
  for (int y = begin; y < end; y += at_once) {
    const int rows = std::min(at_once, end - y);
    maker.make(y, y + rows, made, pitch, stride);
    for (int block = 0; block < blocks; ++block) {
      const int filter = block * kChannelBlock;
      transpose_back(made + block * stride, kChannelBlock, std::min(kChannelBlock, to.filters - filter),
                     rows * to.width, to.plane, to.planes + filter * to.plane + y * to.width,
                     to.non_temporal && y * to.width % kLanes == 0);
    }
  }
}

// At most a channel block of planes, transposed; the channels that aren't there are 0.
inline void transpose_block(const float* in, int64_t plane, int channels, int64_t pixels, float* out) {
  if (channels < kChannelBlock) std::fill_n(out, pixels * kChannelBlock, 0.0f);
  transpose_planes(in, plane, channels, static_cast<int>(pixels), kChannelBlock, out);
}

// All operations on a thread's part of the planes of a convolution.
inline void apply_epilogue(const Plan& plan, const KernelConfig& config, const Shapes& s,
                           const float* planes, float* output, const Partition& threads) {
  const RowSources sources(plan, config, 1);
  const int filters = plan.geometry.filters, blocks = blocks_of(filters);
  for (int block = threads.begin(blocks); block < threads.end(blocks); ++block) {
    const int first = block * kChannelBlock, count = std::min(kChannelBlock, filters - first);
    const auto conv_row = [&](int y, float* row, int64_t) {
      transpose_block(planes + first * s.conv_plane + static_cast<int64_t>(y) * config.conv_width,
                      s.conv_plane, count, config.conv_width, row);
    };
    RowMaker<decltype(conv_row)> maker(plan, sources, 1, conv_row);
    make_planes(maker, 0, s.out_height,
                {output + first * s.output_plane, s.output_plane, s.out_width, count, false});
  }
}

// Room for a channel block of planes that are transposed back.
inline size_t block_floats(int height, int width) {
  return (static_cast<size_t>(height) * width + kLanes) * kChannelBlock;
}

// The gradient of some planes of the convolution, at most a channel block, given these planes after the clamp,
// and the gradient of the epilogue's output.
inline void epilogue_gradient(const Plan& plan, const KernelConfig& config, const Shapes& s, int count,
                              const float* clamped, const float* given, float* out) {
  const std::vector<EpilogueOp>& ops = plan.epilogue;
  thread_local std::vector<Buffer> inputs;
  thread_local Buffer grads[2];
  if (inputs.size() <= ops.size()) inputs.resize(ops.size() + 1);
  const RowSources sources(plan, config, 1);
  const auto input_of = [&](size_t i) {
    return inputs[i].get<float>(block_floats(sources.of[i].height, sources.of[i].width));
  };
  transpose_block(clamped, s.conv_plane, count, s.conv_plane, input_of(0));
  for (size_t i = 0; i + 1 < ops.size(); ++i) {
    const RowSource &from = sources.of[i], &to = sources.of[i + 1];
    const float* in = input_of(i);
    float* made = input_of(i + 1);
    for (int y = 0; y < to.height; ++y)
      epilogue_row(ops[i], [&](int row) { return in + row * from.pitch(); }, from.height, from.width, y,
                   made + y * to.pitch());
  }
  float* grad = grads[ops.size() % 2].get<float>(block_floats(s.out_height, s.out_width));
  transpose_block(given, s.output_plane, count, s.output_plane, grad);
  for (size_t i = ops.size(); i-- > 0;) {
    const RowSource& from = sources.of[i];
    float* back = grads[i % 2].get<float>(block_floats(from.height, from.width));
    op_gradient(ops[i], input_of(i), grad, from.height, from.width, back);
    grad = back;
  }
  const float* conv = input_of(0);
  for (int64_t i = 0; i < s.conv_plane * kChannelBlock; ++i)
    grad[i] = conv[i] > plan.low && conv[i] < plan.high ? grad[i] : 0.0f;
  transpose_back(grad, kChannelBlock, count, static_cast<int>(s.conv_plane), s.conv_plane, out, false);
}

}  // namespace SPP_ISA
}  // namespace spp
