// The choice of the instruction set, and the functions that Python calls.
#include <cstring>
#include <memory>

#include "call_list.h"
#include "guard.h"
#include "int8_plan.h"
#include "interface.h"

namespace spp {

// A chain, and what the tensors that it is handed must be.
struct CheckedChain {
  std::unique_ptr<const Chain> chain;
  int64_t input, residual, output;
  int64_t batch;
};

namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool has_pairs = false;  // whether there are products of bfloat16, too
};

bool has_pairs() {
#ifdef SPP_HAS_BFLOAT16
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// The best one of this machine, or the one of a name; without kernels if there is none.
InstructionSet choose(const char* wanted) {
  const auto is = [&](const char* name) { return !*wanted || std::strcmp(wanted, name) == 0; };
#ifdef SPP_X86
  __builtin_cpu_init();
  if (is("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    return {"avx512", &kAvx512Kernels, has_pairs()};
  if (is("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {"avx2", &kAvx2Kernels};
#endif
  if (is("base")) return {"base", &kBaseKernels};
  return {nullptr, nullptr};
}

InstructionSet chosen = choose("");

// Products of bfloat16: the best ones of this machine, or those of a name; null if there are none.
const PairKernel* choose_pairs(const char* wanted) {
  const auto is = [&](const PairKernel& kernel) { return !*wanted || std::strcmp(wanted, kernel.name) == 0; };
#ifdef SPP_HAS_AMX
  if (has_pairs() && is(kAmxPairs) && has_amx_bf16()) return &kAmxPairs;
#endif
#ifdef SPP_HAS_BFLOAT16
  if (has_pairs() && is(kAvx512Pairs)) return &kAvx512Pairs;
#endif
  return *wanted && is(kAmxPairsEmulated) ? &kAmxPairsEmulated : nullptr;
}

const PairKernel* forced_pairs = nullptr;

// Those of a plan that is made now, for so many columns. Nobody asks for AMX's registers before there is such a plan.
const PairKernel* pairs_of([[maybe_unused]] const Geometry& g, [[maybe_unused]] int32_t num_columns) {
  if (forced_pairs != nullptr || !chosen.has_pairs) return forced_pairs;
  static const PairKernel* best = choose_pairs("");
#ifdef SPP_HAS_AMX
  constexpr double kStepCycles = 1;  // a processor begins a VDPBF16PS in a cycle
  const int32_t pairs = (num_columns / g.groups + 1) / 2;
  if (best == &kAmxPairs && !tiles_pay(g.filters / g.groups, pairs, kStepCycles)) return &kAvx512Pairs;
#endif
  return best;
}

std::unique_ptr<CheckedChain> make_checked_chain(const Plan* const* plans,
                                                 const KernelConfig* const* configs, int32_t count) {
  check(count > 0 && plans != nullptr && configs != nullptr, "A chain needs a layer.");
  for (int i = 0; i < count; ++i) {
    const Plan& plan = deref(plans[i]);
    const KernelConfig& config = deref(configs[i]);
    check_config(plan, config);
    check(config.kernel == Kernel::kChannelBlocked && (count == 1 || !config.bfloat16),
          "The layers of a chain are computed by the channel-blocked kernel in float32.");
    if (i == 0) continue;
    const Plan& before = *plans[i - 1];
    int height = configs[i - 1]->conv_height, width = configs[i - 1]->conv_width;
    for (const EpilogueOp& op : before.epilogue) size_after(op, height, width);
    check(plan.geometry.channels == before.geometry.filters && config.height == height &&
              config.width == width && config.batch == configs[0]->batch &&
              config.threads == configs[0]->threads &&
              (plan.is_depthwise() ? before.fills_blocks() : plan.geometry.stride[1] == 1),
          "A layer of a chain reads the output of the layer before it: a depthwise layer whole channel"
          " blocks, any other layer with a stride of 1 along the rows.");
  }
  const Plan& last = *plans[count - 1];
  const KernelConfig& end = *configs[count - 1];
  auto made = std::make_unique<CheckedChain>();
  made->chain.reset(chosen.kernels->make_chain(plans, configs, count));
  made->input = input_count(*plans[0], *configs[0]);
  made->residual = conv_count(last, end);
  made->output = output_count(last, end);
  made->batch = end.batch;
  return made;
}

// Whether the depthwise kernel computes a layer: not where its scratch would be mostly zeros, and too large.
bool is_stencil(const Plan& plan, const KernelConfig& config) {
  constexpr int64_t kMost = 128;
  const Geometry& g = plan.geometry;
  bool fits = plan.is_depthwise() && !config.bfloat16;
  for (int d = 0; d < 2; ++d)
    fits = fits && g.stride[d] <= kMost && g.padding[d] <= kMost && (g.kernel[d] - 1) * int64_t{g.dilation[d]} < kMost;
  return fits;
}

}  // namespace
}  // namespace spp

using spp::guarded, spp::deref, spp::check, spp::check_count, spp::Status, spp::Plan, spp::KernelConfig;

// Every function that can fail returns a status: 0 where all is well. Counts are numbers of elements.

// What was wrong in this thread's last call that failed.
SPP_EXPORT const char* spp_error() { return spp::last_error().c_str(); }

// Of the structures that cross this border, in turn: Geometry, EpilogueOp, KernelConfig, Linear, GateLayer, Gate,
// Norm, ConcatPart, Int8Scales, ListedCall; -1 behind them.
SPP_EXPORT int64_t spp_struct_size(int32_t index) {
  constexpr int64_t kSizes[] = {sizeof(spp::Geometry), sizeof(spp::EpilogueOp), sizeof(KernelConfig),
                                sizeof(spp::Linear), sizeof(spp::GateLayer), sizeof(spp::Gate),
                                sizeof(spp::Norm), sizeof(spp::ConcatPart), sizeof(spp::Int8Scales),
                                sizeof(spp::Int8Rounding), sizeof(spp::ListedCall)};
  return index >= 0 && index < 11 ? kSizes[index] : -1;
}

SPP_EXPORT const char* spp_isa() { return spp::chosen.name; }

// For tests: another instruction set than the best one.
SPP_EXPORT Status spp_set_isa(const char* name) {
  return guarded([&] {
    const spp::InstructionSet set = spp::choose(name);
    if (set.kernels == nullptr)
      throw spp::Unsupported(std::string("This processor has no instruction set `") + name + "`.");
    spp::chosen = set;
  });
}

// Whether this processor multiplies pairs of bfloat16.
SPP_EXPORT int32_t spp_has_pairs() { return spp::forced_pairs != nullptr || spp::chosen.has_pairs; }

// For tests: plans that are made from now on use these products of pairs; "" lets each take the best ones for it.
SPP_EXPORT Status spp_set_pairs(const char* name) {
  return guarded([&] {
    const spp::PairKernel* pairs = *name ? spp::choose_pairs(name) : nullptr;
    if (*name && pairs == nullptr)
      throw spp::Unsupported(std::string("This processor has no products of pairs `") + name + "`.");
    spp::forced_pairs = pairs;
  });
}

// `bfloat16` says that the weights are numbers of that type, so that they can be packed in pairs.
SPP_EXPORT Status spp_plan_create(const spp::Geometry* geometry, const int32_t* columns,
                                  int32_t num_columns, const float* weight, int64_t weight_count,
                                  const float* bias, int64_t bias_count, float low, float high,
                                  spp::Activation activation, const spp::EpilogueOp* epilogue,
                                  int32_t num_ops, int32_t bfloat16, Plan** plan) {
  return guarded([&] {
    const spp::Geometry& g = deref(geometry);
    spp::check_geometry(g, columns, num_columns);
    spp::check_clamp(low, high, activation);
    spp::check_epilogue(epilogue, num_ops);
    check_count("weight", {weight, weight_count}, int64_t{g.filters / g.groups} * num_columns);
    check_count("bias", {bias, bias_count}, g.filters, true);
    *plan = new Plan(g, columns, num_columns, weight, bias, low, high, activation, epilogue, num_ops,
                     bfloat16 != 0, bfloat16 != 0 ? spp::pairs_of(g, num_columns) : nullptr);
  }, "There is no memory left for the weights of a convolution.");
}

SPP_EXPORT void spp_plan_free(Plan* plan) { delete plan; }

// The channel-blocked kernel runs as a chain of one layer.
SPP_EXPORT Status spp_forward(const Plan* plan, const KernelConfig* config, const void* input,
                              int64_t input_count, const void* residual, int64_t residual_count,
                              void* output, int64_t output_count) {
  return guarded([&] {
    const spp::ForwardPass pass{deref(config), &deref(plan), input, residual, output};
    spp::check_config(*plan, *config);
    check_count("input", {input, input_count}, spp::input_count(*plan, *config));
    check_count("residual", {residual, residual_count}, spp::conv_count(*plan, *config), true);
    check_count("output", {output, output_count}, spp::output_count(*plan, *config));
    switch (config->kernel) {
      case spp::Kernel::kPixelVectorised:
        return (spp::is_stencil(*plan, *config) ? spp::chosen.kernels->forward_depthwise
                                                : spp::chosen.kernels->forward_pixels)(pass);
      case spp::Kernel::kWinograd4:
      case spp::Kernel::kWinograd2: return spp::chosen.kernels->forward_winograd(pass);
      case spp::Kernel::kChannelBlocked: return check(false, "Run the channel-blocked kernel as a chain.");
      case spp::Kernel::kBfloat16Pairs:
        if (plan->pair_kernel == nullptr) throw spp::Unsupported("This processor has no products of bfloat16.");
        return plan->pair_kernel->forward(pass);
    }
  });
}

// `grad` is the gradient of the epilogue's output if `fused`, or else of the convolution's. Gradients that aren't
// wanted are null, with a count of 0.
SPP_EXPORT Status spp_backward(const Plan* plan, const KernelConfig* config, const float* weight,
                               int64_t weight_count, const float* input, int64_t input_count,
                               const float* grad, int64_t grad_count, int32_t fused, float* grad_input,
                               int64_t grad_input_count, float* grad_weight, int64_t grad_weight_count,
                               float* grad_bias, int64_t grad_bias_count) {
  return guarded([&] {
    spp::check_config(deref(plan), deref(config));
    check(!config->bfloat16, "Gradients are computed in float32.");
    check(!fused || plan->activation == spp::Activation::kNone, "An activation's gradient isn't fused.");
    const int64_t inputs = spp::input_count(*plan, *config);
    const int64_t weights = static_cast<int64_t>(plan->group_filters()) * plan->columns.size();
    check_count("weight", {weight, weight_count}, weights);
    check_count("input", {input, input_count}, inputs);
    check_count("grad", {grad, grad_count},
                fused ? spp::output_count(*plan, *config) : spp::conv_count(*plan, *config));
    check_count("grad_input", {grad_input, grad_input_count}, inputs, true);
    check_count("grad_weight", {grad_weight, grad_weight_count}, weights, true);
    check_count("grad_bias", {grad_bias, grad_bias_count}, plan->geometry.filters, true);
    spp::chosen.kernels->backward(
        {*config, plan, weight, input, grad, fused != 0, grad_input, grad_weight, grad_bias});
  }, "There is no memory left for the gradient of a convolution.");
}

// Layers for inputs of one shape. The plans must outlive the chain; it keeps nothing else that is handed in.
SPP_EXPORT Status spp_chain_create(const Plan* const* plans, const KernelConfig* const* configs,
                                   int32_t count, spp::CheckedChain** chain) {
  return guarded([&] { *chain = spp::make_checked_chain(plans, configs, count).release(); });
}

SPP_EXPORT void spp_chain_free(spp::CheckedChain* chain) { delete chain; }

// The residual is added in the last convolution. Both it and the linear layer, which reads the last layer's
// images flattened, may be null.
SPP_EXPORT Status spp_chain_forward(const spp::CheckedChain* chain, const void* input, int64_t input_count,
                                    const void* residual, int64_t residual_count,
                                    const spp::Linear* linear, void* output, int64_t output_count) {
  return guarded([&] {
    const spp::CheckedChain& of = deref(chain);
    check_count("input", {input, input_count}, of.input);
    check_count("residual", {residual, residual_count}, of.residual, true);
    if (linear != nullptr) {
      spp::check_linear(*linear);
      check(linear->in_features * of.batch == of.output, "The linear layer reads other features.");
    }
    check_count("output", {output, output_count}, linear ? of.batch * linear->out_features : of.output);
    of.chain->forward(input, residual, linear, output);
  });
}

// The same as in a chain, bit for bit.
SPP_EXPORT Status spp_linear(const spp::Linear* layer, const float* x, int64_t x_count, int64_t batch,
                             int32_t threads, float* out, int64_t out_count) {
  return guarded([&] {
    spp::check_linear(deref(layer));
    check(batch >= 0 && threads > 0, "Threads must be positive, and the batch at least 0.");
    check_count("x", {x, x_count}, batch * layer->in_features);
    check_count("out", {out, out_count}, batch * layer->out_features);
    spp::chosen.kernels->linear_batch(*layer, x, batch, threads, out);
  });
}

// Gates the planes of a batch; `out` may not overlap `x`.
SPP_EXPORT Status spp_gate(const spp::Gate* gate, const float* x, int64_t x_count, int64_t batch, int64_t pixels,
                           int32_t threads, float* out, int64_t out_count) {
  return guarded([&] {
    spp::check_gate(deref(gate));
    check(batch >= 0 && pixels > 0 && threads > 0, "Pixels and threads must be positive, and the batch at least 0.");
    check_count("x", {x, x_count}, batch * gate->channels * pixels);
    check_count("out", {out, out_count}, batch * gate->channels * pixels);
    spp::chosen.kernels->gate(*gate, x, batch, pixels, threads, out);
  });
}

// The mean or the largest number of every window of planes.
SPP_EXPORT Status spp_pool(const spp::EpilogueOp* op, int64_t planes, int32_t height, int32_t width, int32_t threads,
                           const float* in, int64_t in_count, float* out, int64_t out_count) {
  return guarded([&] {
    const spp::PoolSize size = spp::check_pool(deref(op), planes, height, width, threads);
    check_count("in", {in, in_count}, planes * height * width);
    check_count("out", {out, out_count}, planes * size.height * size.width);
    spp::chosen.kernels->pool_planes(*op, in, planes, height, width, threads, out);
  });
}

// Norms the concatenation of some tensors: the channels that `read` has a 1 for, or all of them if it is null.
SPP_EXPORT Status spp_norm(const spp::Norm* norm, const spp::ConcatPart* parts, int32_t count, const uint8_t* read,
                           int64_t batch, int64_t pixels, int32_t threads, float* out, int64_t out_count) {
  return guarded([&] {
    check(batch >= 0 && pixels > 0 && threads > 0, "Pixels and threads must be positive, and the batch at least 0.");
    spp::check_norm(deref(norm), parts, count, batch * pixels);
    check_count("out", {out, out_count}, batch * norm->channels * pixels);
    spp::chosen.kernels->norm_parts(*norm, parts, count, read, batch, pixels, threads, out);
  });
}

// Concatenates some tensors along their channels. A part may lie in `out`, where it belongs.
SPP_EXPORT Status spp_concat(const spp::ConcatPart* parts, int32_t count, int64_t batch, int64_t pixels,
                             int32_t threads, float* out, int64_t out_count) {
  return guarded([&] {
    check(batch >= 0 && pixels > 0 && threads > 0, "Pixels and threads must be positive, and the batch at least 0.");
    check_count("out", {out, out_count}, batch * spp::check_parts(parts, count, batch * pixels) * pixels);
    spp::chosen.kernels->concat_parts(parts, count, batch, pixels, threads, out);
  });
}

// The sum of two tensors.
SPP_EXPORT Status spp_add(const float* x, int64_t x_count, const float* y, int64_t y_count, int32_t threads,
                          float* out, int64_t out_count) {
  return guarded([&] {
    check(out_count >= 0 && threads > 0, "Threads must be positive.");
    check_count("x", {x, x_count}, out_count);
    check_count("y", {y, y_count}, out_count);
    spp::chosen.kernels->add(x, y, out_count, threads, out);
  });
}

// The mean of each plane.
SPP_EXPORT Status spp_plane_means(const float* x, int64_t x_count, int64_t planes, int64_t pixels, int32_t threads,
                                  float* out, int64_t out_count) {
  return guarded([&] {
    check(planes >= 0 && pixels > 0 && threads > 0, "Pixels and threads must be positive, and planes at least 0.");
    check_count("x", {x, x_count}, planes * pixels);
    check_count("out", {out, out_count}, planes);
    spp::chosen.kernels->plane_means(x, planes, pixels, threads, out);
  });
}
