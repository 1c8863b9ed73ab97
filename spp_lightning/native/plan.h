// A layer as the kernels read it: its kept columns and their packed weights.
//
// What is written to a plan after it was made is guarded by a mutex: any number of threads may run it at the
// same time. All tensors are NCHW, contiguous, and float32 unless a config says bfloat16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "geometry.h"
#include "memory.h"

namespace spp {

constexpr int kTileFilters = 4;     // filters that the pixel-vectorised kernel computes together
constexpr int kChannelBlock = 16;   // channels next to each other in the channel-blocked layout

inline int blocks_of(int channels) { return (channels + kChannelBlock - 1) / kChannelBlock; }

// A plane that the kernels read: one input channel, padded, every stride-th pixel from a phase on.
// With the phases taken apart, a kernel of any stride reads neighbouring pixels.
struct SourcePlane {
  int32_t channel, phase[2];
};

// A kept column: where in its source plane the pixel of output (0, 0) lies.
struct Column {
  int32_t source, row, col;
  int32_t tap;  // i · kw + j
};

// The kept columns of a layer, and the planes that they read.
struct KeptColumns {
  Geometry geometry;
  std::vector<SourcePlane> sources;
  std::vector<Column> columns;       // sorted by conv group
  std::vector<int32_t> group_start;  // first column of each conv group, and their number
  int32_t margin[2];                 // rows and columns that a source plane has beyond the output

  KeptColumns(const Geometry& geometry, const int32_t* numbers, int32_t count);

  int32_t group_filters() const { return geometry.filters / geometry.groups; }
  int32_t group_columns(int32_t g) const { return group_start[g + 1] - group_start[g]; }
};

// [conv group][channel block of filters][column][filter of the block]; of a depthwise layer
// [channel block][tap][channel of the block], zeros for pruned columns.
struct BlockedWeights {
  AlignedFloats floats;
  std::vector<size_t> start;  // of each conv group
  std::vector<float> bias;    // [conv group][channel block][filter of the block]
};

struct ForwardPass;

// A kernel that multiplies pairs of columns, two numbers of bfloat16 each.
struct PairKernel {
  const char* name;
  bool is_tiled;  // whether it reads weights in the tiles of AMX
  void (*forward)(const ForwardPass&);
};

// [conv group][tile of filters][group of steps][filter of the tile][step of the group]. A step is a column, or a pair
// of columns; zeros stand for filters and steps that there aren't.
struct TileWeights {
  AlignedFloats floats;
  std::vector<size_t> start;  // of each conv group

  const float* of_group(int group) const { return floats.get() + start[group]; }
};

struct WinogradWeights;

struct Plan : KeptColumns {
  TileWeights weights;
  TileWeights pairs;                 // bfloat16: two columns in the place of one; or empty
  const PairKernel* pair_kernel;     // which reads them; null if the processor has none
  std::vector<float> depthwise;      // of a depthwise layer, one per column; else empty
  std::vector<float> bias;           // one per filter, and zeros
  float low, high;                   // the clamp
  Activation activation;             // without a clamp
  std::vector<EpilogueOp> epilogue;

  // `weight` is (filters / groups, num_columns); `bias` may be null. `bfloat16` says that the weights are
  // numbers of that type, so that they can be packed in pairs, for a kernel if there is one.
  Plan(const Geometry& geometry, const int32_t* columns, int32_t num_columns, const float* weight,
       const float* bias, float low, float high, Activation activation, const EpilogueOp* ops,
       int32_t num_ops, bool bfloat16, const PairKernel* pair_kernel);

  // Made when they are asked for first. Blocked weights live as long as a chain holds them.
  std::shared_ptr<const BlockedWeights> blocked_weights() const;
  std::shared_ptr<const WinogradWeights> winograd_weights(int side) const;  // of a tile: 2 or 4

  int32_t taps() const { return geometry.kernel[0] * geometry.kernel[1]; }
  int32_t group_tiles() const { return (group_filters() + kTileFilters - 1) / kTileFilters; }
  // A depthwise layer has groups of one channel and one filter.
  bool is_depthwise() const {
    const Geometry& g = geometry;
    return g.groups > 1 && g.groups == g.channels && g.groups == g.filters;
  }
  // Groups of which each begins with a channel block of its own, in the channel-blocked layout.
  int32_t block_groups() const { return is_depthwise() ? 1 : geometry.groups; }
  int32_t block_filters() const { return geometry.filters / block_groups(); }  // of such a group
  // Whether each channel block but the last one is full, so that channel c is in block c / kChannelBlock.
  bool fills_blocks() const { return block_groups() == 1 || block_filters() % kChannelBlock == 0; }
  int32_t group_blocks() const { return blocks_of(block_filters()); }

 private:
  void pack_blocks(BlockedWeights& made) const;
  void pack_depthwise(BlockedWeights& made) const;
  struct TileLayout {
    int columns_of_step, filters, steps_of_group;
  };
  TileWeights pack(const float* weight, const TileLayout& layout) const;

  mutable std::mutex mutex_;
  mutable std::weak_ptr<const BlockedWeights> blocked_weights_;
  mutable std::shared_ptr<const WinogradWeights> winograd_weights_[2];
};

}  // namespace spp
