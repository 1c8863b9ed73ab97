// The plan of a layer, the choice of the instruction set, and the functions that Python calls.
#include "column_conv.h"

#include <cstdlib>
#include <exception>
#include <new>

#include "common.h"
#include "export.h"

namespace spp {

void AlignedFree::operator()(float* p) const { std::free(p); }

AlignedFloats aligned_floats(size_t count) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, std::max<size_t>(1, count) * sizeof(float)) != 0)
    throw std::bad_alloc();
  return AlignedFloats(static_cast<float*>(memory));
}

int32_t pool_size(int32_t size, int32_t kernel, int32_t stride, int32_t padding, bool ceil_mode) {
  const int32_t room = size + 2 * padding - kernel;
  int32_t out = (ceil_mode ? room + stride - 1 : room) / stride + 1;
  if (ceil_mode && (out - 1) * stride >= size + padding) --out;  // starts beyond the picture
  return out;
}

std::shared_ptr<const ChunkWeights> Plan::chunk_weights() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!chunk_weights_) chunk_weights_ = chunk_weights_in_use_.lock();
  if (chunk_weights_) return chunk_weights_;
  auto made = std::make_shared<ChunkWeights>();
  const int groups = geometry.groups, filters = group_filters(), blocks = group_blocks();
  size_t floats = 0;
  for (int g = 0; g < groups; ++g) {
    made->start.push_back(floats);
    floats += static_cast<size_t>(group_chunks()) * group_columns(g) * kChunk;
  }
  made->floats = aligned_floats(floats);
  std::fill_n(made->floats.get(), floats, 0.0f);
  made->bias.assign(static_cast<size_t>(groups) * group_chunks() * kChunk, 0.0f);
  for (int g = 0; g < groups; ++g) {
    const size_t columns = group_columns(g);
    std::copy_n(bias.data() + g * filters, filters,
                made->bias.data() + static_cast<size_t>(g) * group_chunks() * kChunk);
    const float* from = packed.get() + packed_start[g];
    for (int block = 0; block < blocks; ++block) {
      const int filter = block * kBlock;
      float* out = made->floats.get() + made->start[g] + filter / kChunk * columns * kChunk +
                   filter % kChunk;
      for (size_t k = 0; k < columns; ++k, from += kBlock, out += kChunk)
        std::copy_n(from, kBlock, out);
    }
  }
  chunk_weights_ = std::move(made);
  chunk_weights_in_use_ = chunk_weights_;
  return chunk_weights_;
}

std::shared_ptr<const Sequence> Plan::by_filters(const Kernels& kernels, const Way& way) const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (by_filters_ && kernels_ == &kernels && way_ == way) return by_filters_;
  }
  const Plan* plan = this;
  const Way* how = &way;
  std::shared_ptr<const Sequence> made(kernels.make_sequence(&plan, &how, 1));
  const std::lock_guard<std::mutex> lock(mutex_);
  kernels_ = &kernels;
  way_ = way;
  return by_filters_ = std::move(made);
}

void Plan::drop_filters() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  chunk_weights_.reset();  // a call that runs holds them until it is done
  by_filters_.reset();
}

namespace {

struct Choice {
  const Kernels* kernels;
  const char* name;
  void (*pairs)(const Pass&) = nullptr;  // forward with pairs of bfloat16, where there is that
};

#ifdef SPP_HAS_BFLOAT16
const auto kPairs = forward_bfloat16;
bool has_pairs() { return __builtin_cpu_supports("avx512bf16"); }
#else
constexpr void (*kPairs)(const Pass&) = nullptr;
bool has_pairs() { return false; }
#endif

Choice choose(const char* wanted) {
  const auto is = [&](const char* name) { return !*wanted || std::strcmp(wanted, name) == 0; };
#ifdef SPP_X86
  __builtin_cpu_init();
  if (is("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    return {&kAvx512Kernels, "avx512", has_pairs() ? kPairs : nullptr};
  if (is("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {&kAvx2Kernels, "avx2"};
#endif
  if (is("base")) return {&kBaseKernels, "base"};
  return {nullptr, nullptr};
}

Choice chosen = choose("");

// Puts the weights in the order in which the kernels read them; of bfloat16 those of two columns, the
// first in the lower half, in the place of one.
void pack(const Plan& plan, const float* weight, int per_step, std::vector<size_t>& start,
          AlignedFloats& packed) {
  const int groups = plan.geometry.groups, filters = plan.group_filters();
  const size_t columns = plan.columns.size();
  size_t floats = 0;
  for (int i = 0; i < groups; ++i) {
    start.push_back(floats);
    const int steps = (plan.group_columns(i) + per_step - 1) / per_step;
    floats += static_cast<size_t>(plan.group_blocks()) * kBlock * steps;
  }
  packed = aligned_floats(floats + 2 * kBlock);
  float* out = packed.get();
  for (int i = 0; i < groups; ++i)
    for (int block = 0; block < plan.group_blocks(); ++block)
      for (int k = plan.group_start[i]; k < plan.group_start[i + 1]; k += per_step)
        for (int r = 0; r < kBlock; ++r) {
          const int filter = block * kBlock + r;
          const float* row = weight + static_cast<size_t>(filter) * columns;
          uint32_t words[2] = {};
          if (filter < filters)
            std::memcpy(words, row + k,
                        sizeof(float) * std::min(per_step, plan.group_start[i + 1] - k));
          const uint32_t word = per_step == 1 ? words[0] : words[0] >> 16 | (words[1] & 0xffff0000u);
          std::memcpy(out++, &word, sizeof word);
        }
}

std::unique_ptr<Plan> make_plan(const Geometry& g, const int32_t* columns, int32_t num_columns,
                                const float* weight, const float* bias, float low, float high,
                                const PostOp* post, int32_t num_post, bool bfloat16) {
  auto plan = std::make_unique<Plan>();
  plan->geometry = g;
  plan->low = low;
  plan->high = high;
  plan->post.assign(post, post + num_post);
  const int taps = g.kernel[0] * g.kernel[1], group_channels = g.channels / g.groups;
  for (int d = 0; d < 2; ++d) plan->margin[d] = (g.kernel[d] - 1) * g.dilation[d] / g.stride[d];
  plan->group_start.assign(g.groups + 1, 0);
  for (int32_t k = 0; k < num_columns; ++k) {
    const int channel = columns[k] / taps;
    const int at[2] = {columns[k] % taps / g.kernel[1] * g.dilation[0],
                       columns[k] % g.kernel[1] * g.dilation[1]};
    const Source source{channel, {at[0] % g.stride[0], at[1] % g.stride[1]}};
    // Columns are sorted by channel: a channel's source planes are among the last ones.
    int index = static_cast<int>(plan->sources.size()) - 1;
    for (; index >= 0 && plan->sources[index].channel == channel; --index)
      if (plan->sources[index].phase[0] == source.phase[0] &&
          plan->sources[index].phase[1] == source.phase[1])
        break;
    if (index < 0 || plan->sources[index].channel != channel) {
      index = static_cast<int>(plan->sources.size());
      plan->sources.push_back(source);
    }
    plan->columns.push_back({index, at[0] / g.stride[0], at[1] / g.stride[1],
                             columns[k] % taps});
    ++plan->group_start[channel / group_channels + 1];
  }
  for (int i = 0; i < g.groups; ++i) plan->group_start[i + 1] += plan->group_start[i];
  plan->bias.assign(g.filters + 2 * kBlock, 0.0f);  // blocks may reach beyond the last filter
  if (bias != nullptr) std::copy(bias, bias + g.filters, plan->bias.begin());

  pack(*plan, weight, 1, plan->packed_start, plan->packed);
  if (bfloat16) pack(*plan, weight, 2, plan->pairs_start, plan->pairs);
  return plan;
}

}  // namespace
}  // namespace spp

// All return 0 or null where memory runs out; the arguments are checked in Python.

SPP_EXPORT const char* spp_isa() { return spp::chosen.name; }

// For tests: another instruction set than the best one. Returns whether this machine has it.
SPP_EXPORT int32_t spp_set_isa(const char* name) {
  const spp::Choice choice = spp::choose(name);
  if (choice.kernels == nullptr) return 0;
  spp::chosen = choice;
  return 1;
}

// Whether this machine multiplies pairs of bfloat16.
SPP_EXPORT int32_t spp_has_pairs() { return spp::chosen.pairs != nullptr; }

// `bfloat16` says that the weights are numbers of that kind, so that they can be read as pairs.
SPP_EXPORT void* spp_plan(const spp::Geometry* geometry, const int32_t* columns,
                          int32_t num_columns, const float* weight, const float* bias, float low,
                          float high, const spp::PostOp* post, int32_t num_post,
                          int32_t bfloat16) {
  try {
    return spp::make_plan(*geometry, columns, num_columns, weight, bias, low, high, post, num_post,
                          bfloat16)
        .release();
  } catch (const std::exception&) {
    return nullptr;
  }
}

SPP_EXPORT void spp_free(void* plan) { delete static_cast<spp::Plan*>(plan); }

// Frees what only the vectors of filters need, until they are computed again.
SPP_EXPORT void spp_drop_filters(const void* plan) {
  static_cast<const spp::Plan*>(plan)->drop_filters();
}

SPP_EXPORT int32_t spp_forward(const void* plan, const spp::Way* way, const void* input,
                               const void* residual, void* output) {
  try {
    const auto* of = static_cast<const spp::Plan*>(plan);
    if (way->variant == spp::kFiltersVariant) {
      of->by_filters(*spp::chosen.kernels, *way)->forward(input, residual, nullptr, output);
      return 1;
    }
    const bool winograd =
        way->variant == spp::kWinograd4Variant || way->variant == spp::kWinograd2Variant;
    const auto forward = way->variant == spp::kPairsVariant ? spp::chosen.pairs
                         : winograd                         ? spp::chosen.kernels->forward_winograd
                                                            : spp::chosen.kernels->forward;
    if (forward == nullptr) return 0;
    forward({*way, of, input, residual, output});
    return 1;
  } catch (const std::exception&) {
    return 0;
  }
}

// Layers in a row, float32, each with a stride of 1 along the rows but the first: what only the input's
// shape and the plans decide. The plans must outlive it.
SPP_EXPORT void* spp_sequence(const void* const* plans, const spp::Way* const* ways, int32_t count) {
  try {
    const auto* const* of = reinterpret_cast<const spp::Plan* const*>(plans);
    return spp::chosen.kernels->make_sequence(of, ways, count);
  } catch (const std::exception&) {
    return nullptr;
  }
}

SPP_EXPORT void spp_free_sequence(void* sequence) { delete static_cast<spp::Sequence*>(sequence); }

// The residual is added in the last convolution. Both it and the linear layer may be null.
SPP_EXPORT int32_t spp_forward_sequence(const void* sequence, const float* input,
                                        const float* residual, const spp::Linear* linear,
                                        float* output) {
  try {
    static_cast<const spp::Sequence*>(sequence)->forward(input, residual, linear, output);
    return 1;
  } catch (const std::exception&) {
    return 0;
  }
}

// The same as in a sequence, bit for bit.
SPP_EXPORT void spp_linear(const spp::Linear* layer, const float* x, int64_t batch, int32_t threads,
                           float* out) {
  spp::chosen.kernels->linear_batch(*layer, x, batch, threads, out);
}

SPP_EXPORT int32_t spp_backward(const void* plan, const spp::Way* way, const float* weight,
                                const float* input, const float* grad, int32_t fused,
                                float* grad_input, float* grad_weight, float* grad_bias) {
  try {
    spp::chosen.kernels->backward({*way, static_cast<const spp::Plan*>(plan), weight, input, grad,
                                   fused != 0, grad_input, grad_weight, grad_bias});
    return 1;
  } catch (const std::exception&) {
    return 0;
  }
}
