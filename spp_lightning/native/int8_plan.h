// An int8 layer as its kernels read it: kept columns, packed weights, and the scales of its tensors.
//
// Activations are uint8, NCHW, contiguous: of a number q the real one is scale · (q - zero point). Weights are int8
// with a scale per filter. All products are summed exactly, in int32.
#pragma once

#include "plan.h"

namespace spp {

constexpr int32_t kColumnsOfStep = 4;  // columns that are multiplied together, a byte of a word each

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
  int32_t tile_filters;  // filters that are computed together
  int32_t panel_steps;   // steps of columns that a panel has at most; even
  int32_t group_steps;   // steps whose weights of a filter lie next to each other
  bool sums_in_int16;    // products of two columns meet in int16, whose sums would saturate: see Excess
  void (*forward)(const Int8Pass&);
};

constexpr int32_t kMostLanes = 16;  // of a vector of words, of which those behind the last weight may be read

constexpr int32_t kTilesOfBlock = 4;  // tiles of filters whose sums wait in the L1 cache for excess and epilogue

// What a filter's weights lack that were made smaller, so that no sum of int16 saturates whatever the pixels are. It is
// multiplied by itself and added, which makes the sum exact.
struct Excess {
  int32_t step;    // of its panel
  int32_t filter;  // of its block
  int32_t word;
};

// Weights of which no sum of int16 saturates: [conv group][panel][tile of filters][group of steps][filter of the
// tile][step of the group], a word for the columns of a step. Zeros stand for filters, steps and columns that there aren't.
struct Int8Weights {
  int32_t steps_at_once = 1;  // 2: the products of two steps meet in int16, too
  std::vector<int32_t> order;  // [conv group][step][column of the step]: indices of columns, or -1
  std::vector<int32_t, AlignedAllocator<int32_t>> words;
  std::vector<Excess> excess;
  std::vector<int32_t> excess_start;  // [conv group][panel][block of filters], and their number
  // Where the parts of a conv group begin: in `order`, in `words`, and in `excess_start`.
  struct Group {
    size_t column, words;
    int32_t block;
    int32_t steps;
  };
  std::vector<Group> groups;
};

struct Int8Plan : KeptColumns {
  Int8Scales scales;
  const Int8Kernel* kernel;
  Int8Weights weights;
  std::vector<int32_t> offset;          // -zero point · Σ weights, one per filter
  std::vector<float> multiplier, bias;  // one per filter

  // `weight` is (filters / groups, columns); `bias` may be null.
  Int8Plan(const Geometry& geometry, const int32_t* numbers, int32_t num_columns, const int8_t* weight,
           const float* multipliers, const float* biases, const Int8Scales& scales, const Int8Kernel& kernel);

  // Whether output and input are the same pixels: a 1×1 layer with a stride of 1 and no padding.
  bool reads_in_place() const {
    const Geometry& g = geometry;
    return g.kernel[0] * g.kernel[1] == 1 && g.stride[0] * g.stride[1] == 1 && g.padding[0] + g.padding[1] == 0;
  }
  int32_t filter_tiles() const { return (group_filters() + kernel->tile_filters - 1) / kernel->tile_filters; }

  int32_t filter_blocks() const { return (filter_tiles() + kTilesOfBlock - 1) / kTilesOfBlock; }

 private:
  Int8Weights pack(const int8_t* weight, int steps_at_once) const;
  void order_group(const int8_t* weight, int group, Int8Weights& into) const;
  void pack_panel(const int8_t* weight, const int32_t* order, int steps, Int8Weights& into) const;
};

// One pass over a batch; of the config, kernel and bfloat16 aren't read.
struct Int8Pass : KernelConfig {
  const Int8Plan* plan;
  const uint8_t* input;
  const uint8_t* residual;  // of the output's shape, if the plan has one
  void* output;             // uint8 or float32
};

}  // namespace spp
