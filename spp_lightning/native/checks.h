// What the C interface is handed, compared with what was prepared. Kernels trust their arguments: nothing reaches
// them but through these checks.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace spp {

// An argument that doesn't fit; the message says which, what it is, and the rule.
class BadArgument : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What this processor, or this build, doesn't have.
class Unsupported : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Numbers that somebody else owns: null and 0 if there are none.
struct Span {
  const void* data;
  int64_t count;
};

inline void check(bool holds, const char* message) {
  if (!holds) throw BadArgument(message);
}

// Likewise with a function that makes the message: to make a string takes as long as a small layer.
template <typename Message>
auto check(bool holds, const Message& message) -> decltype(message(), void()) {
  if (!holds) throw BadArgument(message());
}

// That a tensor has so many numbers; or none, if it is optional.
void check_count(const char* name, Span tensor, int64_t count, bool optional = false);

void check_geometry(const Geometry& g, const int32_t* columns, int32_t num_columns);
void check_clamp(float low, float high, Activation activation);
void check_epilogue(const EpilogueOp* ops, int32_t count);

// Height and width that a pool leaves of planes, once they and the pool have been checked.
struct PoolSize {
  int32_t height, width;
};
PoolSize check_pool(const EpilogueOp& op, int64_t planes, int32_t height, int32_t width, int32_t threads);

// That a convolution makes outputs of this shape of inputs of this shape.
void check_sizes(const Geometry& g, const KernelConfig& config);
// That a plan can compute inputs of this shape by this kernel.
void check_config(const Plan& plan, const KernelConfig& config);

// Numbers of the tensors of a pass.
int64_t input_count(const KeptColumns& layer, const KernelConfig& config);
int64_t conv_count(const KeptColumns& layer, const KernelConfig& config);  // of the convolution's output
int64_t output_count(const Plan& plan, const KernelConfig& config);  // of the epilogue's

void check_linear(const Linear& linear);
void check_gate(const Gate& gate);
// Channels of a concatenation of planes that have so many pixels in a batch.
int64_t check_parts(const ConcatPart* parts, int32_t count, int64_t pixels);
void check_norm(const Norm& norm, const ConcatPart* parts, int32_t count, int64_t pixels);

}  // namespace spp
