// Squeeze and excitation: every plane is multiplied by a number that two small layers make of the planes' means.
#pragma once

#include "activation.h"
#include "means_kernel.h"
#include "memory.h"

namespace spp {
namespace SPP_ISA {

// The outputs of one of the two layers; `out` has room for whole vectors.
inline void gate_layer(const GateLayer& layer, const float* in, float* out) {
  thread_local Buffer kept_buffer;
  float* kept = kept_buffer.get<float>(layer.num_columns);
  for (int k = 0; k < layer.num_columns; ++k) kept[k] = in[layer.columns[k]];
  const Linear linear{layer.weight, layer.weight_count, layer.bias, layer.filters, layer.num_columns, layer.filters};
  linear_outputs(linear, kept, 0, layer.filters, out);
  for (int f = 0; f < layer.filters; f += kLanes) store(out + f, clamp(load(out + f), layer.low, layer.high));
  activate_row(layer.activation, out, (layer.filters + kLanes - 1) / kLanes * kLanes);
}

inline void multiply_plane(const float* in, float factor, int64_t pixels, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= pixels; i += kLanes) store(out + i, factor * load(in + i));
  for (; i < pixels; ++i) out[i] = factor * in[i];
}

inline void gate(const Gate& of, const float* x, int64_t batch, int64_t pixels, int threads, float* out) {
  thread_local Buffer means_buffer, squeezed_buffer, factors_buffer;
  const int channels = of.channels;
  float* means = means_buffer.get<float>(channels);
  float* squeezed = squeezed_buffer.get<float>(of.reduce.filters + kLanes);
  float* factors = factors_buffer.get<float>(channels + kLanes);
  for (int64_t image = 0; image < batch; ++image, x += channels * pixels, out += channels * pixels) {
    plane_means(x, channels, pixels, threads, means);
    gate_layer(of.reduce, means, squeezed);
    gate_layer(of.expand, squeezed, factors);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int c = 0; c < channels; ++c) multiply_plane(x + c * pixels, factors[c], pixels, out + c * pixels);
  }
}

}  // namespace SPP_ISA
}  // namespace spp
