// What the layers of int8 networks compute. Nothing in here knows onnxruntime.
#pragma once

#include <memory>

#include "int8_interface.h"
#include "onnx_planes.h"

namespace spp {

// A node's attributes, as export/int8_node.py writes them.
struct Int8Attributes {
  Shape geometry;             // kGeometryNumbers numbers
  std::vector<float> scales;  // of input, residual and output; 0 if there is no residual
  Shape zero_points;          // likewise
  std::vector<float> clamp;   // low, high
};

// A convolution, or a linear layer, whose inputs are matrices.
class Int8Convolution {
 public:
  // `parameters`: weight, columns, scales of the filters' weights, bias. Without `is_quantised` the output is float32,
  // and its scale isn't read. Throws BadArgument for whatever doesn't fit.
  Int8Convolution(const Int8Attributes& attributes, const std::vector<Parameter>& parameters, bool is_quantised,
                  int32_t threads);

  bool adds_residual() const { return scales_.has_residual; }
  Shape out_shape(const Shape& shape) const;

  // Any number of threads may call it at the same time. `residual` is null where none is added.
  void run(const Parameter& x, const Parameter* residual, void* out) const;

 private:
  struct Free {
    void operator()(Int8Plan* plan) const { spp_int8_free(plan); }
  };

  KernelConfig config(const Shape& shape) const;

  Geometry geometry_;
  Int8Scales scales_;
  std::unique_ptr<Int8Plan, Free> plan_;
  int32_t threads_;
};

// Rounds floats to uint8, behind pools and norms.
class Int8Rounding {
 public:
  Int8Rounding(const std::vector<float>& scale, const Shape& zero_point, PlaneOps before, int32_t threads);

  Shape out_shape(const Shape& shape) const;
  void run(const Parameter& x, uint8_t* out) const;

 private:
  float inverse_;
  int32_t zero_;
  PlaneOps before_;
  int32_t threads_;
};

}  // namespace spp
