// What a node of the operator `ColumnChain` computes: column convolutions in a row, and perhaps a linear layer that
// reads the last one's images flattened. Nothing in here knows onnxruntime.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "onnx_values.h"

namespace spp {

// A node's attributes, as export/chain_node.py writes them.
struct ChainAttributes {
  Shape geometry;            // per layer: kGeometryNumbers numbers
  Shape activation;          // per layer
  std::vector<float> clamp;  // per layer: low, high
  Shape post;                // per operation on planes: kPostNumbers numbers
  std::vector<float> alpha;  // per operation on planes
  Shape configs;             // per row: batch, threads, threads of the one call; per layer: kernel, threads
  bool linear, residual;
};

struct FreePlan {
  void operator()(Plan* plan) const { spp_plan_free(plan); }
};
struct FreeChain {
  void operator()(CheckedChain* chain) const { spp_chain_free(chain); }
};
using PlanPointer = std::unique_ptr<Plan, FreePlan>;
using ChainPointer = std::unique_ptr<CheckedChain, FreeChain>;

// What was prepared for inputs of one shape.
struct PreparedShape {
  std::vector<KernelConfig> configs;  // of the layers, where each is called by itself
  std::vector<ChainPointer> alone;    // the channel-blocked ones of them
  ChainPointer at_once;               // or one call for all
  std::vector<int64_t> counts;        // numbers of the input, and of each layer's output
  Shape residual, output;             // shapes; the residual is that of the last convolution's output
};

class ColumnChain {
 public:
  // `parameters`: weight, columns and bias of each layer; then weight and bias of the linear layer. Only the linear
  // layer's must outlive the chain. Throws BadArgument for whatever doesn't fit.
  ColumnChain(const ChainAttributes& attributes, const std::vector<Parameter>& parameters, int32_t threads);

  bool adds_residual() const { return adds_residual_; }

  // Of inputs of a shape, (B, C, H, W). Any number of threads may call it, and `run`, at the same time.
  std::shared_ptr<const PreparedShape> prepared(const Shape& shape) const;

  void run(const PreparedShape& prepared, const float* x, const float* residual, float* output) const;

 private:
  struct Layer {
    Geometry geometry;
    std::vector<EpilogueOp> post;
    PlanPointer plan;
  };
  // Which kernels compute inputs of one batch size, with so many threads at hand.
  struct Row {
    int64_t batch;
    int32_t threads, at_once;
    std::vector<std::pair<Kernel, int32_t>> layers;  // kernel and threads
  };

  void add_layers(const ChainAttributes& attributes);
  void make_plans(const ChainAttributes& attributes, const std::vector<Parameter>& parameters);
  void add_linear(const Parameter& weight, const Parameter& bias);
  void add_rows(const Shape& configs);
  Row row_for(int64_t batch) const;
  std::shared_ptr<const PreparedShape> prepare(const Shape& shape) const;

  std::vector<Layer> layers_;
  std::optional<Linear> linear_;
  std::vector<Row> rows_;
  bool adds_residual_;
  int32_t threads_;
  mutable std::mutex mutex_;
  mutable std::list<std::pair<Shape, std::shared_ptr<const PreparedShape>>> shapes_;  // the one used last first
};

}  // namespace spp
