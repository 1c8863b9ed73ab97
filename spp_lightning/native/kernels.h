// The kernels of each instruction set, and what they are called with.
#pragma once

#include "amx.h"
#include "plan.h"

namespace spp {

// One pass over a batch.
struct ForwardPass : KernelConfig {
  const Plan* plan;
  const void* input;
  const void* residual;  // added before the clamp, in the convolution's shape; may be null
  void* output;
};

// One backward pass over a batch of float32. A gradient that isn't wanted is null.
struct BackwardPass : KernelConfig {
  const Plan* plan;
  const float* weight;  // (filters / groups, columns), as the plan was made of
  const float* input;
  const float* grad;    // of the output
  bool fused;           // whether `grad` lies behind clamp and epilogue, or behind the convolution
  float* grad_input;
  float* grad_weight;
  float* grad_bias;
};

// Layers of which each reads the output of the one before it, for inputs of one shape; a linear layer may
// follow them, else that is null. The plans must outlive it.
class Chain {
 public:
  virtual ~Chain() = default;
  virtual void forward(const void* input, const void* residual, const Linear* linear,
                       void* output) const = 0;
};

struct Kernels {
  void (*forward_pixels)(const ForwardPass&);
  void (*forward_depthwise)(const ForwardPass&);
  void (*forward_winograd)(const ForwardPass&);
  Chain* (*make_chain)(const Plan* const*, const KernelConfig* const*, int);
  void (*linear_batch)(const Linear&, const float* x, int64_t batch, int threads, float* out);
  void (*backward)(const BackwardPass&);
  void (*gate)(const Gate&, const float* x, int64_t batch, int64_t pixels, int threads, float* out);
  void (*norm_parts)(const Norm&, const ConcatPart* parts, int count, const uint8_t* read, int64_t batch,
                     int64_t pixels, int threads, float* out);
  void (*concat_parts)(const ConcatPart* parts, int count, int64_t batch, int64_t pixels, int threads, float* out);
  void (*add)(const float* x, const float* y, int64_t count, int threads, float* out);
  void (*plane_means)(const float* x, int64_t planes, int64_t pixels, int threads, float* out);
  void (*pool_planes)(const EpilogueOp&, const float* in, int64_t planes, int height, int width, int threads,
                      float* out);
};

extern const Kernels kBaseKernels;
#ifdef SPP_X86
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#if defined(__clang__) || __GNUC__ >= 11
#define SPP_HAS_BFLOAT16
extern const PairKernel kAvx512Pairs;
#endif
#endif
#ifdef SPP_HAS_AMX
extern const PairKernel kAmxPairs;
#endif
extern const PairKernel kAmxPairsEmulated;  // for tests

}  // namespace spp
