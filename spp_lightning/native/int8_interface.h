// The functions of the int8 kernels that C++ calls, too: int8_interface.cpp, int8_planes.cpp and int8_post.cpp say what
// they do.
#pragma once

#include "int8_plan.h"
#include "interface.h"

SPP_EXPORT const char* spp_int8_isa();
SPP_EXPORT spp::Status spp_int8_set_isa(const char* name);
SPP_EXPORT spp::Status spp_int8_create(const spp::Geometry* geometry, const int32_t* columns, int32_t num_columns,
                                       const int8_t* weight, int64_t weight_count, const float* multiplier,
                                       int64_t multiplier_count, const float* bias, int64_t bias_count,
                                       const spp::Int8Scales* scales, spp::Int8Plan** plan);
SPP_EXPORT void spp_int8_free(spp::Int8Plan* plan);
SPP_EXPORT spp::Status spp_int8_forward(const spp::Int8Plan* plan, const spp::KernelConfig* config,
                                        const uint8_t* input, int64_t input_count, const uint8_t* residual,
                                        int64_t residual_count, void* output, int64_t output_count);
SPP_EXPORT spp::Status spp_int8_max_pool(const spp::EpilogueOp* op, int64_t planes, int32_t height, int32_t width,
                                         int32_t threads, const uint8_t* in, int64_t in_count, uint8_t* out,
                                         int64_t out_count);
SPP_EXPORT spp::Status spp_int8_quantize(float inverse, int32_t zero, int32_t threads, const float* in,
                                         int64_t in_count, uint8_t* out, int64_t out_count);
SPP_EXPORT spp::Status spp_int8_post(const spp::EpilogueOp* ops, int32_t count, int64_t planes, int32_t height,
                                     int32_t width, float inverse, int32_t zero, int32_t threads, const float* in,
                                     int64_t in_count, uint8_t* out, int64_t out_count);
