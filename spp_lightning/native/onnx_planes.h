// Pools and norms of planes that are no part of a convolution's epilogue. Nothing in here knows onnxruntime.
#pragma once

#include "onnx_values.h"

namespace spp {

// Operations on planes, from the attributes `post` and `alpha`.
class PlaneOps {
 public:
  PlaneOps(const Shape& post, const std::vector<float>& alpha);

  const std::vector<EpilogueOp>& ops() const { return ops_; }
  // Of what the operations leave of planes, (B, C, H, W).
  Shape out_shape(const Shape& shape) const;

 private:
  std::vector<EpilogueOp> ops_;
};

// A pool of float32, or a max pool of uint8.
class PlanePool {
 public:
  PlanePool(PlaneOps pool, Dtype dtype, int32_t threads);

  Shape out_shape(const Shape& shape) const { return pool_.out_shape(shape); }
  // Both tensors are of the pool's dtype.
  void run(const Parameter& x, void* out) const;

 private:
  PlaneOps pool_;
  int32_t threads_;
};

}  // namespace spp
