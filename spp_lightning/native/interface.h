// The functions of the library that C++ calls, too: interface.cpp says what they do.
#pragma once

#include "export.h"
#include "plan.h"

namespace spp {

enum class Status : int32_t { kOk = 0, kOutOfMemory = 1, kBadArgument = 2, kUnsupported = 3, kInternal = 4 };

struct CheckedChain;

}  // namespace spp

SPP_EXPORT const char* spp_error();
SPP_EXPORT spp::Status spp_plan_create(const spp::Geometry* geometry, const int32_t* columns,
                                       int32_t num_columns, const float* weight, int64_t weight_count,
                                       const float* bias, int64_t bias_count, float low, float high,
                                       spp::Activation activation, const spp::EpilogueOp* epilogue,
                                       int32_t num_ops, int32_t bfloat16, spp::Plan** plan);
SPP_EXPORT void spp_plan_free(spp::Plan* plan);
SPP_EXPORT spp::Status spp_forward(const spp::Plan* plan, const spp::KernelConfig* config, const void* input,
                                   int64_t input_count, const void* residual, int64_t residual_count,
                                   void* output, int64_t output_count);
SPP_EXPORT spp::Status spp_chain_create(const spp::Plan* const* plans, const spp::KernelConfig* const* configs,
                                        int32_t count, spp::CheckedChain** chain);
SPP_EXPORT void spp_chain_free(spp::CheckedChain* chain);
SPP_EXPORT spp::Status spp_chain_forward(const spp::CheckedChain* chain, const void* input,
                                         int64_t input_count, const void* residual, int64_t residual_count,
                                         const spp::Linear* linear, void* output, int64_t output_count);
SPP_EXPORT spp::Status spp_linear(const spp::Linear* layer, const float* x, int64_t x_count, int64_t batch,
                                  int32_t threads, float* out, int64_t out_count);
SPP_EXPORT spp::Status spp_gate(const spp::Gate* gate, const float* x, int64_t x_count, int64_t batch, int64_t pixels,
                                int32_t threads, float* out, int64_t out_count);
SPP_EXPORT spp::Status spp_norm(const spp::Norm* norm, const spp::ConcatPart* parts, int32_t count,
                                const uint8_t* read, int64_t batch, int64_t pixels, int32_t threads, float* out,
                                int64_t out_count);
SPP_EXPORT spp::Status spp_concat(const spp::ConcatPart* parts, int32_t count, int64_t batch, int64_t pixels,
                                  int32_t threads, float* out, int64_t out_count);
SPP_EXPORT spp::Status spp_add(const float* x, int64_t x_count, const float* y, int64_t y_count, int32_t threads,
                               float* out, int64_t out_count);
SPP_EXPORT spp::Status spp_plane_means(const float* x, int64_t x_count, int64_t planes, int64_t pixels,
                                       int32_t threads, float* out, int64_t out_count);
SPP_EXPORT spp::Status spp_pool(const spp::EpilogueOp* op, int64_t planes, int32_t height, int32_t width,
                                int32_t threads, const float* in, int64_t in_count, float* out, int64_t out_count);
