// What Python calls of the int8 kernels, and the choice of the instruction set.
#include "int8_interface.h"

#include <cmath>
#include <cstring>

#include "guard.h"
#include "int8_kernels.h"

namespace spp {
namespace {

#ifdef SPP_X86
bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
}
#endif

// The best one of this machine, or the one of a name; null if there is none.
const Int8Kernel* choose(const char* wanted) {
  const auto is = [&](const Int8Kernel& kernel) { return !*wanted || std::strcmp(wanted, kernel.name) == 0; };
#ifdef SPP_X86
  __builtin_cpu_init();
#ifdef SPP_HAS_AMX
  if (is(kInt8Amx) && has_avx512_vnni() && has_amx_int8()) return &kInt8Amx;
#endif
  if (is(kInt8Avx512Vnni) && has_avx512_vnni()) return &kInt8Avx512Vnni;
#ifdef SPP_HAS_AVX_VNNI
  if (is(kInt8AvxVnni) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni")) return &kInt8AvxVnni;
#endif
  if (is(kInt8Avx2) && __builtin_cpu_supports("avx2")) return &kInt8Avx2;
#endif
  for (const Int8Kernel* kernel : {&kInt8Base, &kInt8AvxVnniEmulated, &kInt8Avx512VnniEmulated, &kInt8AmxEmulated})
    if (is(*kernel)) return kernel;
  return nullptr;
}

const Int8Kernel* forced = nullptr;

// Nobody asks for AMX's registers before there is an int8 layer.
const Int8Kernel& best() {
  static const Int8Kernel* kernel = choose("");
  return *kernel;
}

const Int8Kernel& kernel_of(const Geometry& g, [[maybe_unused]] int32_t num_columns) {
  if (forced != nullptr) return *forced;
#ifdef SPP_HAS_AMX
  constexpr double kStepCycles = 0.5;  // a processor begins two VPDPBUSD in a cycle
  const int32_t steps = (num_columns / g.groups + kColumnsOfStep - 1) / kColumnsOfStep;
  if (&best() == &kInt8Amx && !tiles_pay(g.filters / g.groups, steps, kStepCycles)) return kInt8Avx512Vnni;
#endif
  return best();
}

void check_zero(const char* name, int32_t zero) {
  check(zero >= 0 && zero <= 255, [&] {
    return std::string("The zero point of `") + name + "` must be in [0, 255], got " + std::to_string(zero) + ".";
  });
}

void check_finite(const char* name, const float* numbers, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    check(std::isfinite(numbers[i]), [&] { return std::string("`") + name + "` must be finite."; });
}

void check_scales(const Int8Scales& s) {
  check_zero("input", s.input_zero);
  check_zero("residual", s.residual_zero);
  check_zero("output", s.output_zero);
  check(std::isfinite(s.residual_scale), "The scale of `residual` must be finite.");
  check(std::isfinite(s.output_inverse) && s.output_inverse > 0, "The inverse scale of `output` must be finite and positive.");
  check(s.low <= s.high && !(s.low > 0 && std::isinf(s.low)) && !(s.high < 0 && std::isinf(s.high)),
        "The clamp must be two limits in order.");
}

void check_columns(const Geometry& g, const int32_t* columns, int32_t count) {
  check_geometry(g, columns, count);
  const int64_t of_group = int64_t{g.channels} / g.groups * g.kernel[0] * g.kernel[1];
  check(std::min<int64_t>(of_group, count) <= kMostInt8Columns, [&] {
    return "A conv group must have at most " + std::to_string(kMostInt8Columns) + " columns: int32 holds no larger sums.";
  });
}

}  // namespace
}  // namespace spp

using spp::check_count, spp::deref, spp::guarded, spp::Int8Plan, spp::Status;

SPP_EXPORT const char* spp_int8_isa() { return (spp::forced ? *spp::forced : spp::best()).name; }

SPP_EXPORT const char* spp_int8_plan_isa(const Int8Plan* plan) { return plan->kernel->name; }

// For tests: plans that are made from now on use this instruction set; "" lets each take the best one for it.
SPP_EXPORT Status spp_int8_set_isa(const char* name) {
  return guarded([&] {
    const spp::Int8Kernel* kernel = *name ? spp::choose(name) : nullptr;
    if (*name && kernel == nullptr)
      throw spp::Unsupported(std::string("There is no int8 kernel `") + name + "` for this processor.");
    spp::forced = kernel;
  });
}

// `multiplier` is the scale of the input times that of each filter's weights.
SPP_EXPORT Status spp_int8_create(const spp::Geometry* geometry, const int32_t* columns, int32_t num_columns,
                                  const int8_t* weight, int64_t weight_count, const float* multiplier,
                                  int64_t multiplier_count, const float* bias, int64_t bias_count,
                                  const spp::Int8Scales* scales, Int8Plan** plan) {
  return guarded([&] {
    const spp::Geometry& g = deref(geometry);
    spp::check_columns(g, columns, num_columns);
    spp::check_scales(deref(scales));
    check_count("weight", {weight, weight_count}, int64_t{g.filters / g.groups} * num_columns);
    check_count("multiplier", {multiplier, multiplier_count}, g.filters);
    check_count("bias", {bias, bias_count}, g.filters, true);
    spp::check_finite("multiplier", multiplier, multiplier_count);
    spp::check_finite("bias", bias, bias_count);
    *plan = new Int8Plan(g, columns, num_columns, weight, multiplier, bias, *scales, spp::kernel_of(g, num_columns));
  }, "There is no memory left for the weights of a convolution.");
}

SPP_EXPORT void spp_int8_free(Int8Plan* plan) { delete plan; }

// A residual must be there if the plan's scales have one.
SPP_EXPORT Status spp_int8_forward(const Int8Plan* plan, const spp::KernelConfig* config, const uint8_t* input,
                                   int64_t input_count, const uint8_t* residual, int64_t residual_count,
                                   void* output, int64_t output_count) {
  return guarded([&] {
    const spp::Int8Pass pass{deref(config), &deref(plan), input, residual, output};
    spp::check_sizes(plan->geometry, *config);
    const int64_t outputs = spp::conv_count(*plan, *config);
    check_count("input", {input, input_count}, spp::input_count(*plan, *config));
    check_count("residual", {residual, residual_count}, plan->scales.has_residual ? outputs : 0);
    check_count("output", {output, output_count}, outputs);
    plan->kernel->forward(pass);
  });
}
