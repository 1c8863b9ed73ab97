// What a convolution and the operations behind it are. Python declares the same structures in
// kernels/cpu/library.py.
#pragma once

#include <cstdint>

namespace spp {

struct Geometry {
  int32_t channels, filters, groups;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
};

// What a layer computes of each number of its output, in the place of a clamp.
enum class Activation : int32_t {
  kNone = 0,
  kSigmoid = 1,
  kSilu = 2,         // x · sigmoid(x)
  kHardsigmoid = 3,  // clamp(x + 3, 0, 6) / 6
  kHardswish = 4,    // x · hardsigmoid(x)
  kGelu = 5,         // x · (1 + erf(x / √2)) / 2
  kGeluTanh = 6,     // x · sigmoid(2 · √(2 / π) · (x + 0.044715 · x³))
};
constexpr int32_t kActivations = 7;

enum class EpilogueKind : int32_t { kMaxPool = 0, kAveragePool = 1, kLocalResponseNorm = 2 };

// An operation on each plane of the convolution's output, before that is stored.
struct EpilogueOp {
  EpilogueKind kind;
  int32_t kernel[2], stride[2], padding[2];
  int32_t ceil_mode, count_include_pad;
  float alpha;  // of the local response norm: x · (1 + alpha · mean(x²))^(-3/4)
};

inline int32_t pool_size(int32_t size, int32_t kernel, int32_t stride, int32_t padding,
                         bool ceil_mode) {
  const int32_t room = size + 2 * padding - kernel;
  int32_t out = (ceil_mode ? room + stride - 1 : room) / stride + 1;
  if (ceil_mode && (out - 1) * stride >= size + padding) --out;  // starts beyond the image
  return out;
}

// Height and width after an operation.
inline void size_after(const EpilogueOp& op, int& height, int& width) {
  if (op.kind == EpilogueKind::kLocalResponseNorm) return;
  height = pool_size(height, op.kernel[0], op.stride[0], op.padding[0], op.ceil_mode);
  width = pool_size(width, op.kernel[1], op.stride[1], op.padding[1], op.ceil_mode);
}

enum class Kernel : int32_t {
  kPixelVectorised = 0,
  kBfloat16Pairs = 2,  // pixel-vectorised; products of bfloat16 of AVX-512 or AMX
  kChannelBlocked = 3,
  kWinograd4 = 4,  // tiles of 4×4 outputs
  kWinograd2 = 5,
};

// How a plan computes inputs of one shape.
struct KernelConfig {
  int64_t batch;
  int32_t height, width;            // of the input
  int32_t conv_height, conv_width;  // of the convolution's output, before the epilogue operations
  int32_t threads;
  Kernel kernel;
  int32_t bfloat16;  // 1 if input, residual and output are bfloat16; 0 if they are float32
};

// A linear layer; the bias may be null.
struct Linear {
  const float* weight;  // (out_features, in_features)
  int64_t weight_count;
  const float* bias;
  int64_t bias_count;
  int32_t in_features, out_features;
};

// A 1×1 layer on a single pixel, with a clamp or an activation; the bias may be null.
struct GateLayer {
  const float* weight;  // (filters, columns)
  int64_t weight_count;
  const float* bias;
  const int32_t* columns;  // the channels that are read
  int32_t num_columns, filters;
  float low, high;
  Activation activation;
};

// Squeeze and excitation.
struct Gate {
  GateLayer reduce, expand;
  int32_t channels;
};

// A batch norm with its running statistics, and a clamp; weight and bias may be null. Each tensor has a number per
// channel.
struct Norm {
  const float *mean, *variance, *weight, *bias;
  int32_t channels;
  float eps, low, high;
};

// One of the tensors that are concatenated along their channels.
struct ConcatPart {
  const float* data;
  int64_t count, channels;
};

}  // namespace spp
