// The C interface of the column-pruned convolution, and the plan behind it.
//
// A plan is made once per layer: which input positions are kept, and their weights in the order in
// which the kernels read them. What is written to it afterwards is guarded, so any number of threads
// may run it at the same time. All tensors are NCHW, contiguous, and float32 but where it says otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace spp {

constexpr int kBlock = 4;   // filters that a kernel computes together
constexpr int kChunk = 16;  // filters next to each other, where they are what fills the vectors

// What happens to each plane of the convolution's output before it is stored.
enum class PostKind : int32_t { kMaxPool = 0, kAveragePool = 1, kLocalResponseNorm = 2 };

// One operation on a plane. The same layout is declared in cpu.py.
struct PostOp {
  PostKind kind;
  int32_t kernel[2], stride[2], padding[2];
  int32_t ceil_mode, count_include_pad;
  float alpha;  // of the local response norm: x · (1 + alpha · mean(x²))^(-3/4)
};

struct Geometry {
  int32_t channels, filters, groups;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
};

// A plane that the kernels read: one input channel, padded, every stride-th pixel from a phase on.
// With the phases taken apart, a kernel of any stride reads neighbouring pixels.
struct Source {
  int32_t channel, phase[2];
};

// A kept column: where in its source plane the pixel of output (0, 0) lies.
struct Column {
  int32_t source, row, col;
  int32_t tap;  // i · kw + j
};

struct AlignedFree {
  void operator()(float* p) const;
};
using AlignedFloats = std::unique_ptr<float[], AlignedFree>;
AlignedFloats aligned_floats(size_t count);

// The weights of all conv groups: [group][chunk of filters][column][filter of the chunk].
struct ChunkWeights {
  AlignedFloats floats;
  std::vector<size_t> start;  // of each conv group
  std::vector<float> bias;    // [group][chunk][filter of the chunk]
};

// Ways to compute: vectors of pixels, those of a tile under the kept columns packed first; or read in
// place; or packed as pairs of bfloat16; vectors of filters; and Winograd's minimal filtering, with tiles of
// 4×4 or 2×2 outputs.
constexpr int32_t kPanelVariant = 0, kDirectVariant = 1, kPairsVariant = 2, kFiltersVariant = 3,
                  kWinograd4Variant = 4, kWinograd2Variant = 5;

// How a plan computes inputs of one shape. The same layout is declared in cpu.py.
struct Way {
  int64_t batch;
  int32_t height, width;            // of the input
  int32_t conv_height, conv_width;  // of the convolution's output, before the post operations
  int32_t threads;
  int32_t variant;
  int32_t bfloat16;  // whether input, residual and output are that and not float32

  bool operator==(const Way& other) const {
    return batch == other.batch && height == other.height && width == other.width &&
           conv_height == other.conv_height && conv_width == other.conv_width &&
           threads == other.threads && variant == other.variant && bfloat16 == other.bfloat16;
  }
};

struct Kernels;
class Sequence;
struct WinogradWeights;

struct Plan {
  Geometry geometry;
  std::vector<Source> sources;
  std::vector<Column> columns;      // sorted by conv group
  std::vector<int32_t> group_start;  // first column of each conv group, and their number
  std::vector<size_t> packed_start;  // of each conv group, in `packed`
  AlignedFloats packed;              // [group][block of filters][column][filter of the block]
  std::vector<size_t> pairs_start;   // likewise, in `pairs`
  AlignedFloats pairs;               // as bfloat16, two columns in the place of one; or null
  std::vector<float> bias;           // one per filter, and zeros
  float low, high;                   // the output is clamped to these
  std::vector<PostOp> post;
  int32_t margin[2];                 // rows and columns that a source plane has beyond the output

  // Made when they are asked for the first time, and kept until they are dropped; of how vectors of
  // filters compute a shape, that of the last one.
  std::shared_ptr<const ChunkWeights> chunk_weights() const;
  std::shared_ptr<const Sequence> by_filters(const Kernels& kernels, const Way& way) const;
  void drop_filters() const;
  std::shared_ptr<const WinogradWeights> winograd_weights(int side) const;  // of a tile: 2 or 4

  int32_t group_filters() const { return geometry.filters / geometry.groups; }
  int32_t group_blocks() const { return (group_filters() + kBlock - 1) / kBlock; }
  int32_t group_chunks() const { return (group_filters() + kChunk - 1) / kChunk; }
  int32_t group_columns(int32_t g) const { return group_start[g + 1] - group_start[g]; }

 private:
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const ChunkWeights> chunk_weights_;
  mutable std::weak_ptr<const ChunkWeights> chunk_weights_in_use_;  // by who held them when dropped
  mutable std::shared_ptr<const Sequence> by_filters_;
  mutable std::shared_ptr<const WinogradWeights> winograd_weights_[2];
  mutable const Kernels* kernels_ = nullptr;  // that made them: spp_set_isa may choose others
  mutable Way way_{};
};

// One pass over a batch.
struct Pass : Way {
  const Plan* plan;
  const void* input;
  const void* residual;  // added before the clamp, in the output's shape; may be null
  void* output;
};

// A linear layer; the bias may be null. The same layout is declared in
// cpu_sequence.py.
struct Linear {
  const float* weight;  // (out_features, in_features)
  const float* bias;
  int32_t in_features, out_features;
};

// One backward pass over a batch of float32: the gradients that are wanted, of those that aren't null.
struct Backward : Way {
  const Plan* plan;
  const float* weight;  // (filters of a group, columns), as the plan was made of
  const float* input;
  const float* grad;    // of the output
  bool fused;           // with clamp and post operations; or of the convolution alone
  float* grad_input;
  float* grad_weight;
  float* grad_bias;
};

int32_t pool_size(int32_t size, int32_t kernel, int32_t stride, int32_t padding, bool ceil_mode);

}  // namespace spp
