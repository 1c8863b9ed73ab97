// The backward pass; like the forward one it touches kept columns only.
//
// The images are spread over the threads, and an image takes all steps before the next one: the gradient of the
// convolution's output stays in the cache and is never written to memory. Where clamp and epilogue operations
// follow, the convolution is computed once more, which takes less time than to have kept its output.
#pragma once

#include "input_gradient.h"
#include "weight_gradient.h"

namespace spp {
namespace SPP_ISA {

// What is the same for all images.
struct BackwardTask {
  const BackwardPass& pass;
  Shapes shapes;
  PackedColumns packed;  // if the input's gradient is wanted
  Transposing transposing;
  std::vector<int64_t> offset;  // of each column in the source planes
  int64_t grad_floats;          // of an image's gradient

  explicit BackwardTask(const BackwardPass& of)
      : pass(of), shapes(shapes_of(*of.plan, of, of.fused)), transposing(*of.plan, of) {
    shapes.copied = true;
    grad_floats = pass.plan->geometry.filters * shapes.output_plane;
    for (const Column& c : pass.plan->columns) offset.push_back(offset_in_sources(c, shapes));
    if (pass.grad_input) packed = pack_columns(*pass.plan, pass.weight, shapes);
  }
};

// Sums over the images of one thread.
struct BackwardSums {
  float* weight;  // (columns, filters of a conv group in whole vectors)
  float* bias;
};

// The gradient of an image's convolution, with room for a vector behind its planes.
inline void conv_gradient(const BackwardTask& task, const float* given, const float* sources,
                          float* planes, float* grad) {
  const BackwardPass& pass = task.pass;
  const Plan& plan = *pass.plan;
  const Shapes& s = task.shapes;
  if (!pass.fused) {
    std::memcpy(grad, given, sizeof(float) * task.grad_floats);
    return;
  }
  Convolution(plan, pass, s, sources, nullptr, nullptr).run(nullptr, planes, false, Partition{0, 1});
  for (int f = 0; f < plan.geometry.filters; f += kChannelBlock)
    epilogue_gradient(plan, pass, s, std::min(kChannelBlock, plan.geometry.filters - f),
                      planes + f * s.conv_plane, given + f * s.output_plane, grad + f * s.conv_plane);
}

inline float sum_of(const float* in, int64_t count) {
  Vector sum{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum += load(in + i);
  float total = 0;
  for (; i < count; ++i) total += in[i];
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

// Not part of the OpenMP region below, because clang compiles a region's body without the instruction
// set of the function around it.
inline void backward_image(const BackwardTask& task, int64_t image, const BackwardSums& sums) {
  thread_local Buffer source_buffer, plane_buffer, grad_buffer, transposed_buffer, back_buffer;
  const BackwardPass& pass = task.pass;
  const Plan& plan = *pass.plan;
  const Geometry& g = plan.geometry;
  const Shapes& s = task.shapes;
  const size_t source_floats = plan.sources.size() * static_cast<size_t>(s.source_plane);
  const size_t conv_floats = g.filters * static_cast<size_t>(s.conv_plane);
  float* sources = source_buffer.get<float>(source_floats + kTile);
  float* planes = plane_buffer.get<float>(pass.fused ? conv_floats + kLanes : 0);
  float* grad = grad_buffer.get<float>(conv_floats + kLanes);
  const float* input = pass.input + image * g.channels * s.input_plane;
  if (pass.fused || pass.grad_weight) {
    std::memset(sources + source_floats, 0, sizeof(float) * kTile);
    copy_sources(plan, pass, s, input, Partition{0, 1}, sources);
  }
  conv_gradient(task, pass.grad + image * task.grad_floats, sources, planes, grad);
  std::fill_n(grad + conv_floats, kLanes, 0.0f);
  if (pass.grad_bias)
    for (int f = 0; f < g.filters; ++f) sums.bias[f] += sum_of(grad + f * s.conv_plane, s.conv_plane);
  if (pass.grad_weight) {
    const size_t floats = task.transposing.rows_at_once * pass.conv_width * task.transposing.pitch;
    add_weight_gradient(pass, s, task.transposing, task.offset.data(), sources, grad,
                        transposed_buffer.get<float>(floats), sums.weight);
  }
  if (pass.grad_input)
    input_gradient(pass, s, task.packed, grad, back_buffer.get<float>(source_floats),
                   pass.grad_input + image * g.channels * s.input_plane);
}

inline void backward(const BackwardPass& pass) {
  const Plan& plan = *pass.plan;
  const Geometry& g = plan.geometry;
  const BackwardTask task(pass);
  const int filters = plan.group_filters();
  const size_t columns = plan.columns.size(), pitch = task.transposing.pitch;
  const size_t weights = pass.grad_weight ? columns * pitch : 0;
  const int threads = static_cast<int>(std::clamp<int64_t>(pass.batch, 1, std::max(1, pass.threads)));
  std::vector<float> weight_sums(weights * threads, 0.0f);
  std::vector<float> bias_sums(static_cast<size_t>(g.filters) * threads, 0.0f);
  OutOfMemory memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    memory.guard([&] {
      const BackwardSums sums{weight_sums.data() + thread_index() * weights,
                              bias_sums.data() + static_cast<size_t>(thread_index()) * g.filters};
      for (int64_t image = thread_index(); image < pass.batch; image += thread_count())
        backward_image(task, image, sums);
    });
  }
  memory.rethrow();
  const auto total = [&](const std::vector<float>& sums, size_t count, size_t i) {
    float value = 0;
    for (int t = 0; t < threads; ++t) value += sums[t * count + i];
    return value;
  };
  if (pass.grad_weight)
    for (int f = 0; f < filters; ++f)
      for (size_t k = 0; k < columns; ++k)
        pass.grad_weight[f * columns + k] = total(weight_sums, weights, k * pitch + f);
  if (pass.grad_bias)
    for (int f = 0; f < g.filters; ++f) pass.grad_bias[f] = total(bias_sums, g.filters, f);
}

}  // namespace SPP_ISA
}  // namespace spp
