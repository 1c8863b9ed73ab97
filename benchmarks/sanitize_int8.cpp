// The int8 kernels on random shapes, compared with exact sums. See sanitize.cpp.
#include <cmath>
#include <limits>

#include "int8_plan.h"
#include "sanitize.h"

extern "C" {
int32_t spp_int8_set_isa(const char*);
int32_t spp_int8_create(const spp::Geometry*, const int32_t*, int32_t, const int8_t*, int64_t, const float*, int64_t,
                        const float*, int64_t, const spp::Int8Scales*, void**);
void spp_int8_free(void*);
int32_t spp_int8_forward(const void*, const spp::KernelConfig*, const uint8_t*, int64_t, const uint8_t*, int64_t,
                         void*, int64_t);
}

namespace {

using Pixels = Tensor<uint8_t>;
using Weights = Tensor<int8_t>;

// Uniform, or of the two extremes.
template <typename Number>
Tensor<Number> integers(size_t count) {
  constexpr int kLow = std::numeric_limits<Number>::min(), kHigh = std::numeric_limits<Number>::max();
  const bool extremes = between(0, 2) == 0;
  Tensor<Number> out(count);
  for (size_t i = 0; i < count; ++i)
    out[i] = static_cast<Number>(!extremes ? between(kLow, kHigh) : between(0, 2) ? kHigh : kLow);
  return out;
}

struct Case {
  spp::Geometry g{};
  int size[2], out[2];
  int64_t batch;
  std::vector<int32_t> columns;
  spp::Int8Scales scales{};
  Weights weight;
  Tensor<float> multiplier, bias;
  Pixels x, residual;

  int64_t outputs() const { return batch * g.filters * out[0] * out[1]; }
};

Case drawn() {
  Case c;
  spp::Geometry& g = c.g;
  g.groups = between(0, 3) ? 1 : between(2, 3);
  g.channels = g.groups * between(1, between(0, 4) ? 6 : 60);
  g.filters = g.groups * between(1, between(0, 2) ? 9 : 70);
  const bool pointwise = between(0, 2) == 0;
  for (int d = 0; d < 2; ++d) {
    g.kernel[d] = pointwise ? 1 : between(1, 4);
    g.stride[d] = between(0, 1) ? 1 : between(1, 3);
    g.dilation[d] = between(0, 2) ? 1 : between(2, 3);
    g.padding[d] = pointwise && between(0, 3) ? 0 : between(0, 3);
    const int reach = g.dilation[d] * (g.kernel[d] - 1) + 1;
    c.size[d] = std::max(1, reach - 2 * g.padding[d]) + between(0, 24);
    c.out[d] = (c.size[d] + 2 * g.padding[d] - reach) / g.stride[d] + 1;
  }
  c.batch = between(1, 4);
  c.columns = some_columns(g.channels * g.kernel[0] * g.kernel[1], between(0, 4) / 4.0);
  c.scales = {between(0, 255), between(0, 1), between(0, 255), 0.25f, between(0, 1), between(0, 255), 0.5f, -20, 90};
  c.weight = integers<int8_t>(static_cast<size_t>(g.filters / g.groups) * c.columns.size());
  c.multiplier = Tensor<float>(g.filters);
  for (int f = 0; f < g.filters; ++f) c.multiplier[f] = static_cast<float>(between(1, 99)) / 1024;
  if (between(0, 1)) c.bias = Tensor<float>(g.filters);
  for (int f = 0; f < c.bias.count; ++f) c.bias[f] = static_cast<float>(between(-99, 99)) / 16;
  c.x = integers<uint8_t>(static_cast<size_t>(c.batch) * g.channels * c.size[0] * c.size[1]);
  if (c.scales.has_residual) c.residual = integers<uint8_t>(c.outputs());
  return c;
}

// The output at an image, a filter and a pixel, in real numbers.
float expected(const Case& c, int64_t b, int f, int i, int j) {
  const spp::Geometry& g = c.g;
  const int taps = g.kernel[0] * g.kernel[1], rows = g.filters / g.groups;
  int64_t sum = 0;
  for (size_t k = 0; k < c.columns.size(); ++k) {
    const int channel = c.columns[k] / taps, tap = c.columns[k] % taps;
    if (channel / (g.channels / g.groups) != f / rows) continue;
    const int row = i * g.stride[0] - g.padding[0] + tap / g.kernel[1] * g.dilation[0];
    const int col = j * g.stride[1] - g.padding[1] + tap % g.kernel[1] * g.dilation[1];
    if (row < 0 || row >= c.size[0] || col < 0 || col >= c.size[1]) continue;
    const int pixel = c.x[((b * g.channels + channel) * c.size[0] + row) * c.size[1] + col];
    sum += c.weight[f % rows * c.columns.size() + k] * (pixel - c.scales.input_zero);
  }
  // Each in a variable of its own: rounded once.
  const float product = static_cast<float>(sum) * c.multiplier[f];
  volatile float y = product;
  if (c.bias) y = y + c.bias[f];
  const int64_t at = ((b * g.filters + f) * c.out[0] + i) * c.out[1] + j;
  if (c.residual) y = y + static_cast<float>(c.residual[at] - c.scales.residual_zero) * c.scales.residual_scale;
  return std::min(c.scales.high, std::max(c.scales.low, static_cast<float>(y)));
}

template <typename Number>
void compare(const Case& c, const Tensor<Number>& found) {
  int64_t wrong = 0, at = 0;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int f = 0; f < c.g.filters; ++f)
      for (int i = 0; i < c.out[0]; ++i)
        for (int j = 0; j < c.out[1]; ++j, ++at) {
          float y = expected(c, b, f, i, j);
          if (c.scales.is_quantised)
            y = std::clamp(std::nearbyint(y * c.scales.output_inverse) + c.scales.output_zero, 0.0f, 255.0f);
          wrong += static_cast<float>(found[at]) != y;
        }
  if (wrong) std::printf("int8: %ld of %ld outputs differ\n", static_cast<long>(wrong), static_cast<long>(at)), ++failures;
}

template <typename Number>
void run(const Case& c, const void* plan) {
  for (int threads = 1; threads <= 3; ++threads) {
    const Tensor<Number> out(c.outputs());
    const spp::KernelConfig how{c.batch, c.size[0], c.size[1], c.out[0], c.out[1], threads, {}, 0};
    const auto forward = [&](int64_t inputs, int64_t residuals, int64_t outputs) {
      return spp_int8_forward(plan, &how, c.x.get(), inputs, c.residual.get(), residuals, out.get(), outputs);
    };
    must_refuse(forward(c.x.count - 1, c.residual.count, out.count));
    must_refuse(forward(c.x.count, c.residual.count + 1, out.count));
    must_refuse(forward(c.x.count, c.residual.count, out.count + 1));
    must(forward(c.x.count, c.residual.count, out.count));
    compare(c, out);
  }
}

void run_case() {
  const Case c = drawn();
  void* plan = nullptr;
  const auto create = [&](int64_t weights, int64_t multipliers, int64_t biases) {
    return spp_int8_create(&c.g, c.columns.data(), static_cast<int32_t>(c.columns.size()), c.weight.get(), weights,
                           c.multiplier.get(), multipliers, c.bias.get(), biases, &c.scales, &plan);
  };
  must_refuse(create(c.weight.count + 1, c.multiplier.count, c.bias.count));
  must_refuse(create(c.weight.count, c.multiplier.count - 1, c.bias.count));
  must_refuse(create(c.weight.count, c.multiplier.count, c.bias.count + 1));
  must(create(c.weight.count, c.multiplier.count, c.bias.count));
  if (c.scales.is_quantised) run<uint8_t>(c, plan);
  else run<float>(c, plan);
  spp_int8_free(plan);
}

}  // namespace

bool run_int8(const char* isa, int cases) {
  if (spp_int8_set_isa(isa) != 0) return false;
  for (int n = 0; n < cases; ++n) run_case(), run_int8_planes();
  return true;
}
