// Chains: layers of which each reads the output of the one before it, channel-blocked and from the cache. A
// channel-blocked layer alone is a chain of one.
#pragma once

#include "blocked_kernel.h"
#include "linear.h"

namespace spp {
namespace SPP_ISA {

#ifdef SPP_EXACT_BUFFERS
constexpr size_t kFewFloats = 1 << 12;
#else
constexpr size_t kFewFloats = 1 << 18;  // of all copies, when every thread copies all source planes
#endif

class BlockedChain : public Chain {
 public:
  BlockedChain(const Plan* const* plans, const KernelConfig* const* configs, int count) {
    for (int i = 0; i < count; ++i) {
      const Stage* before = i == 0 ? nullptr : stages_.back().get();
      if (before) stages_.back()->edge = plans[i]->geometry.padding[1];
      stages_.push_back(std::make_unique<Stage>(*plans[i], *configs[i], before, count == 1));
    }
    const Stage& first = *stages_.front();
    if (!first.before && first.reads_blocks()) blocked_input_ = first.blocks() * first.input.floats();
    for (int i = 0; i + 1 < count; ++i) {
      const Stage& stage = *stages_[i];
      const int64_t floats = stage.blocks() * stage.output(nullptr, stage.edge).floats();
      between_ = std::max<size_t>(between_, floats);
    }
  }

  // Phases: the source planes, unless each thread copies them for itself, or the channel blocks that a depthwise
  // layer reads; each stage; the linear layer, or the result's narrowing.
  void forward(const void* input, const void* residual, const Linear* linear,
               void* output) const override {
    const Stage &first = *stages_.front(), &last = *stages_.back();
    const ForwardPass read{first.config, &first.plan, input, residual, nullptr};
    const ForwardPass write{last.config, &last.plan, nullptr, residual, output};
    const int count = static_cast<int>(stages_.size());
    const bool copies = (first.s.copied && !copies_alone()) || blocked_input_ > 0;
    const Phases phases{copies ? kReadPhase : 0, count + (linear || write.bfloat16)};
    const size_t features = linear ? linear->in_features : 0;
    for_each_image(read, first.s, blocked_input_ + 2 * between_ + features, phases,
                   [&](int phase, const ImagePart& part) {
                     if (phase == kReadPhase && blocked_input_ > 0)
                       block_input(first, input_of(read, first.s, part), part.scratch.planes, part.threads);
                     else if (phase == kReadPhase) read_phase(read, first.s, part);
                     else if (phase < count) run(phase, read, write, linear, part);
                     else if (linear) run_linear(*linear, write, part);
                     else narrow_result(write, last.s, part);
                   });
  }

 private:
  // Of small source planes: sooner done than other threads can be waited for.
  bool copies_alone() const {
    const Stage& first = *stages_.front();
    const size_t floats = first.plan.sources.size() * first.s.source_plane;
    return first.config.threads > 1 && !first.config.bfloat16 &&
           first.config.threads * floats <= kFewFloats;
  }

  void run(int index, const ForwardPass& read, const ForwardPass& write, const Linear* linear,
           const ImagePart& part) const {
    const Stage &stage = *stages_[index], &last = *stages_.back();
    const bool is_last = &stage == &last;
    StageTask task{};
    task.input = index == 0 ? first_input(read, part) : between(index - 1, part);
    task.residual = is_last ? residual_of(write, last.s, part) : nullptr;
    task.planes = is_last;
    task.output = !is_last ? between(index, part)
                  : linear ? features_of(part)
                           : output_of(write, last.s, part);
    task.non_temporal = is_last && !linear && is_non_temporal(write, last.s, task.output);
    if (stage.bands) run_bands(stage, task, part.threads);
    else run_stage(stage, task, part.threads);
  }

  const float* first_input(const ForwardPass& read, const ImagePart& part) const {
    const Stage& first = *stages_.front();
    if (blocked_input_ > 0) return part.scratch.planes;
    if (!first.s.copied || !copies_alone()) return input_of(read, first.s, part);
    thread_local Buffer sources_buffer;
    const size_t floats = first.plan.sources.size() * first.s.source_plane + kTile;
    ImagePart alone{part.image, {}, {0, 1}};
    alone.scratch.sources = sources_buffer.get<float>(floats);
    read_phase(read, first.s, alone);
    return alone.scratch.sources;
  }

  // Outputs of stages and inputs of the next ones, in turns.
  float* between(int index, const ImagePart& part) const {
    return part.scratch.planes + blocked_input_ + index % 2 * between_;
  }
  float* features_of(const ImagePart& part) const {
    return part.scratch.planes + blocked_input_ + 2 * between_;
  }

  void run_linear(const Linear& linear, const ForwardPass& write, const ImagePart& part) const {
    const int count = linear.out_features;
    linear_outputs(linear, features_of(part), part.threads.begin(count), part.threads.end(count),
                   static_cast<float*>(write.output) + part.image * count);
  }

  std::vector<std::unique_ptr<Stage>> stages_;
  size_t blocked_input_ = 0;  // floats of the channel blocks that a depthwise layer reads of an image
  size_t between_ = 0;        // floats of the largest output between two stages
};

inline Chain* make_chain(const Plan* const* plans, const KernelConfig* const* configs, int count) {
  return new BlockedChain(plans, configs, count);
}

}  // namespace SPP_ISA
}  // namespace spp
