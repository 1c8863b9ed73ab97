// An int8 layer as its kernels read it: kept columns, packed weights, and the scales of its tensors.
//
// Activations are uint8, NCHW, contiguous: of a number q the real one is scale · (q - zero point). Weights are int8
// with a scale per filter. All products are summed exactly, in int32.
#pragma once

#include "plan.h"

namespace spp {

// The most columns of a conv group of which sums fit into int32: 255 · 128 · 65535 < 2³¹.
constexpr int32_t kMostInt8Columns = 65535;

// How a layer's tensors are scaled, and its clamp in real numbers. Python declares the same structure in
// kernels/cpu/library.py.
struct Int8Scales {
  int32_t input_zero;                  // zero points are in [0, 255]
  int32_t has_residual, residual_zero;
  float residual_scale;
  int32_t is_quantised, output_zero;   // whether the output is uint8; else it is float32
  float output_inverse;                // 1 / scale of the output
  float low, high;
};

struct Int8Pass;

// The kernel of an instruction set, and the layout of weights that it reads.
struct Int8Kernel {
  const char* name;
  int32_t tile_filters;     // filters that are computed together
  int32_t columns_at_once;  // columns that one instruction multiplies: 2 of int16, or 4 of int8
  void (*forward)(const Int8Pass&);
};

struct Int8Plan : KeptColumns {
  Int8Scales scales;
  const Int8Kernel* kernel;
  // [conv group][tile of filters][step of columns][filter of the tile]: a word has the weights of the columns that
  // are multiplied at once. Zeros stand for filters and columns that there aren't.
  std::unique_ptr<int32_t[], AlignedFree> weights;
  std::vector<size_t> group_weights;       // where each conv group's begin
  std::vector<int32_t> offset;             // -zero point · Σ weights, one per filter
  std::vector<float> multiplier, bias;     // one per filter

  // `weight` is (filters / groups, columns); `bias` may be null.
  Int8Plan(const Geometry& geometry, const int32_t* numbers, int32_t num_columns, const int8_t* weight,
           const float* multipliers, const float* biases, const Int8Scales& scales, const Int8Kernel& kernel);

  // Of a tile of filters, from a step on.
  const int32_t* weights_at(int group, int tile, int step) const {
    const size_t rows = static_cast<size_t>(tile) * steps(group) + step;
    return weights.get() + group_weights[group] + rows * kernel->tile_filters;
  }
  int32_t steps(int group) const {
    return (group_columns(group) + kernel->columns_at_once - 1) / kernel->columns_at_once;
  }
  // Whether output and input are the same pixels: a 1×1 layer with a stride of 1 and no padding.
  bool reads_in_place() const {
    const Geometry& g = geometry;
    return g.kernel[0] * g.kernel[1] == 1 && g.stride[0] * g.stride[1] == 1 && g.padding[0] + g.padding[1] == 0;
  }
  int32_t filter_tiles() const { return (group_filters() + kernel->tile_filters - 1) / kernel->tile_filters; }

 private:
  int32_t word(const int8_t* weight, int filter, int column, int count) const;
  void pack(const int8_t* weight);
};

// One pass over a batch; of the config, kernel and bfloat16 aren't read.
struct Int8Pass : KernelConfig {
  const Int8Plan* plan;
  const uint8_t* input;
  const uint8_t* residual;  // of the output's shape, if the plan has one
  void* output;             // uint8 or float32
};

}  // namespace spp
