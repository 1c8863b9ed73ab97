// Runs the CPU kernels on random shapes, every tensor in memory of its exact size, and compares with
// loops in double precision. What the sanitizers say is the point; see sanitize.py.
//
//     driver CASES [ISA ...] [int8-ISA ...]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "call_list.h"
#include "sanitize.h"

extern "C" {
int32_t spp_set_isa(const char*);
int32_t spp_has_pairs();
int32_t spp_set_pairs(const char*);
int32_t spp_plan_create(const spp::Geometry*, const int32_t*, int32_t, const float*, int64_t,
                        const float*, int64_t, float, float, spp::Activation, const spp::EpilogueOp*, int32_t,
                        int32_t, void**);
void spp_plan_free(void*);
int32_t spp_forward(const void*, const spp::KernelConfig*, const void*, int64_t, const void*, int64_t,
                    void*, int64_t);
int32_t spp_chain_create(const void* const*, const spp::KernelConfig* const*, int32_t, void**);
void spp_chain_free(void*);
int32_t spp_chain_forward(const void*, const void*, int64_t, const void*, int64_t, const spp::Linear*,
                          void*, int64_t);
int32_t spp_linear(const spp::Linear*, const float*, int64_t, int64_t, int32_t, float*, int64_t);
int32_t spp_backward(const void*, const spp::KernelConfig*, const float*, int64_t, const float*, int64_t,
                     const float*, int64_t, int32_t, float*, int64_t, float*, int64_t, float*, int64_t);
int32_t spp_ascending_order(const void*, int32_t, const double*, int64_t, int64_t*);
int32_t spp_gate(const spp::Gate*, const float*, int64_t, int64_t, int64_t, int32_t, float*, int64_t);
int32_t spp_plane_means(const float*, int64_t, int64_t, int64_t, int32_t, float*, int64_t);
int32_t spp_run_calls(const spp::ListedCall*, int32_t, const spp::Memory*, int32_t);
int32_t spp_norm(const spp::Norm*, const spp::ConcatPart*, int32_t, const uint8_t*, int64_t, int64_t, int32_t, float*,
                 int64_t);
int32_t spp_concat(const spp::ConcatPart*, int32_t, int64_t, int64_t, int32_t, float*, int64_t);
int32_t spp_add(const float*, int64_t, const float*, int64_t, int32_t, float*, int64_t);
int32_t spp_pool(const spp::EpilogueOp*, int64_t, int32_t, int32_t, int32_t, const float*, int64_t, float*, int64_t);
void spp_move(const int64_t*, const double*, int64_t, int64_t, double*);
}

namespace {

Floats memory(size_t count) { return Floats(count); }

Floats normal(size_t count) {
  std::normal_distribution<float> draw;
  Floats out(count);
  for (size_t i = 0; i < count; ++i) out[i] = draw(generator);
  return out;
}

// Limits of the output, or an activation.
struct Limits {
  float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
  spp::Activation activation = spp::Activation::kNone;

  double of(double x) const {
    const double hard = std::clamp(x + 3, 0.0, 6.0) / 6, cubic = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
    switch (activation) {
      case spp::Activation::kNone: return std::min<double>(high, std::max<double>(low, x));
      case spp::Activation::kSigmoid: return 1 / (1 + std::exp(-x));
      case spp::Activation::kSilu: return x / (1 + std::exp(-x));
      case spp::Activation::kHardsigmoid: return hard;
      case spp::Activation::kHardswish: return x * hard;
      case spp::Activation::kGelu: return x * (1 + std::erf(x / std::sqrt(2.0))) / 2;
      case spp::Activation::kGeluTanh: return x * (1 + std::tanh(cubic)) / 2;
    }
    return x;
  }
};

void* make_plan(const spp::Geometry& g, const std::vector<int32_t>& columns, const Floats& weight,
                const Floats& bias, const Limits& limits, const std::vector<spp::EpilogueOp>& ops,
                bool bfloat16) {
  void* plan = nullptr;
  const auto create = [&](int64_t weights, int64_t biases) {
    return spp_plan_create(&g, columns.data(), static_cast<int32_t>(columns.size()), weight.get(), weights,
                           bias.get(), biases, limits.low, limits.high, limits.activation, ops.data(),
                           static_cast<int32_t>(ops.size()), bfloat16, &plan);
  };
  must_refuse(create(weight.count + 1, bias.count));
  must_refuse(create(weight.count, bias.count + 1));
  must(create(weight.count, bias.count));
  return plan;
}

// By a kernel, or as a chain of one layer.
template <typename Number>
void forward(const void* plan, const spp::KernelConfig& how, const Number* x, int64_t x_count,
             const Tensor<Number>& residual, const Tensor<Number>& out) {
  if (how.kernel != spp::Kernel::kChannelBlocked) {
    const auto run = [&](int64_t inputs, int64_t residuals, int64_t outputs) {
      return spp_forward(plan, &how, x, inputs, residual.get(), residuals, out.get(), outputs);
    };
    must_refuse(run(x_count - 1, residual.count, out.count));
    must_refuse(run(x_count, residual.count + 1, out.count));
    must_refuse(run(x_count, residual.count, out.count + 1));
    return must(run(x_count, residual.count, out.count));
  }
  const spp::KernelConfig* configs[] = {&how};
  void* chain = nullptr;
  must(spp_chain_create(&plan, configs, 1, &chain));
  const auto run = [&](int64_t inputs, int64_t residuals, int64_t outputs) {
    return spp_chain_forward(chain, x, inputs, residual.get(), residuals, nullptr, out.get(), outputs);
  };
  must_refuse(run(x_count - 1, residual.count, out.count));
  must_refuse(run(x_count, residual.count + 1, out.count));
  must_refuse(run(x_count, residual.count, out.count - 1));
  must(run(x_count, residual.count, out.count));
  spp_chain_free(chain);
}

struct Planes {
  int count, height, width;
  std::vector<double> values;
  double& at(int plane, int y, int x) {
    return values[(static_cast<size_t>(plane) * height + y) * width + x];
  }
};

Planes planes(int count, int height, int width) {
  return {count, height, width, std::vector<double>(static_cast<size_t>(count) * height * width)};
}

Planes apply(const spp::EpilogueOp& op, Planes& in) {
  if (op.kind == spp::EpilogueKind::kLocalResponseNorm) {
    Planes out = planes(in.count, in.height, in.width);
    for (int p = 0; p < in.count; ++p)
      for (int y = 0; y < in.height; ++y)
        for (int x = 0; x < in.width; ++x) {
          double squares = 0;
          for (int i = y - 1; i <= y + 1; ++i)
            for (int j = x - 1; j <= x + 1; ++j)
              if (i >= 0 && i < in.height && j >= 0 && j < in.width)
                squares += in.at(p, i, j) * in.at(p, i, j);
          out.at(p, y, x) = in.at(p, y, x) * std::pow(1 + op.alpha * squares / 9, -0.75);
        }
    return out;
  }
  const bool max = op.kind == spp::EpilogueKind::kMaxPool;
  const auto size = [&](int n, int d) {
    return spp::pool_size(n, op.kernel[d], op.stride[d], op.padding[d], op.ceil_mode);
  };
  Planes out = planes(in.count, size(in.height, 0), size(in.width, 1));
  for (int p = 0; p < out.count; ++p)
    for (int y = 0; y < out.height; ++y)
      for (int x = 0; x < out.width; ++x) {
        const int top = y * op.stride[0] - op.padding[0], left = x * op.stride[1] - op.padding[1];
        double sum = 0, most = -std::numeric_limits<double>::infinity();
        int seen = 0, all = 0;
        for (int i = top; i < top + op.kernel[0]; ++i)
          for (int j = left; j < left + op.kernel[1]; ++j) {
            all += i < in.height + op.padding[0] && j < in.width + op.padding[1];
            if (i < 0 || i >= in.height || j < 0 || j >= in.width) continue;
            ++seen;
            sum += in.at(p, i, j);
            most = std::max(most, in.at(p, i, j));
          }
        out.at(p, y, x) = max ? most : sum / (op.count_include_pad ? all : seen);
      }
  return out;
}

// sizes: the sums of the products' sizes, by which they are rounded.
void compare(const char* what, const Floats& got, const std::vector<double>& expected,
             const std::vector<double>& sizes) {
  double most = 1e-3, error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    most = std::max(most, sizes[i]);
    const double difference = std::abs(got[i] - expected[i]);
    if (!(difference <= error)) error = difference;  // a NaN stays
  }
  if (!(error <= 5e-6 * most)) {  // sums of some dozens of products, one after the other
    std::printf("%s: off by %g of %g\n", what, error, most);
    ++failures;
  }
}

// A layer behind another one: both at once give what one after the other does, bit for bit.
void run_chain(const void* first, spp::KernelConfig how, const spp::Geometry& before, const int* size,
               const Floats& x) {
  spp::Geometry g{};
  const auto is_depthwise = [](const spp::Geometry& of) {
    return of.groups > 1 && of.groups == of.channels && of.groups == of.filters;
  };
  const bool fills = before.groups == 1 || is_depthwise(before) || before.filters / before.groups % 16 == 0;
  const bool depthwise = before.filters > 1 && fills && between(0, 2) == 0;
  g.groups = depthwise ? before.filters : before.filters % 2 || before.filters == 2 || between(0, 2) ? 1 : 2;
  g.channels = before.filters;
  g.filters = depthwise ? g.channels : g.groups * between(1, 20);
  int out[2];
  for (int d = 0; d < 2; ++d) {
    g.kernel[d] = between(1, 4);
    g.stride[d] = d && !depthwise ? 1 : between(1, 3);
    g.dilation[d] = between(1, 2);
    const int reach = g.dilation[d] * (g.kernel[d] - 1) + 1;
    g.padding[d] = std::max(between(0, 3), (reach - size[d] + 1) / 2);
    out[d] = (size[d] + 2 * g.padding[d] - reach) / g.stride[d] + 1;
  }
  const auto columns = some_columns(g.channels * g.kernel[0] * g.kernel[1], 0.5);
  const Floats weight = normal(g.filters / g.groups * columns.size());
  std::vector<spp::EpilogueOp> pools;
  if (between(0, 1))
    pools.push_back({spp::EpilogueKind::kMaxPool, {2, 2}, {2, 2}, {1, 1}, between(0, 1), 1, 0});
  void* second = make_plan(g, columns, weight, Floats(), {0, 1e9f}, pools, false);
  int last[2];
  for (int d = 0; d < 2; ++d)
    last[d] = pools.empty() ? out[d] : spp::pool_size(out[d], 2, 2, 1, pools[0].ceil_mode);
  const size_t between_floats = how.batch * before.filters * size[0] * size[1];
  const size_t conv_floats = how.batch * g.filters * out[0] * out[1];
  const size_t floats = how.batch * g.filters * last[0] * last[1];
  const Floats middle = memory(between_floats), residual = between(0, 1) ? normal(conv_floats) : Floats();
  const Floats one_by_one = memory(floats);
  how.kernel = spp::Kernel::kPixelVectorised;
  spp::KernelConfig next{how.batch, size[0], size[1], out[0], out[1], how.threads, how.kernel, 0};
  forward(first, how, x.get(), x.count, Floats(), middle);
  forward(second, next, middle.get(), middle.count, residual, one_by_one);
  const int features = static_cast<int>(floats / how.batch), scores = between(1, 9);
  const Floats matrix = normal(features * scores), bias = between(0, 1) ? normal(scores) : Floats();
  spp::Linear linear{matrix.get(), matrix.count, bias.get(), bias.count, features, scores};
  const Floats expected = memory(how.batch * scores);
  must(spp_linear(&linear, one_by_one.get(), one_by_one.count, how.batch, how.threads, expected.get(),
                  expected.count));
  how.kernel = next.kernel = spp::Kernel::kChannelBlocked;
  for (int threads = 1; threads <= 3; ++threads) {
    how.threads = next.threads = threads;
    const void* plans[] = {first, second};
    const spp::KernelConfig* configs[] = {&how, &next};
    void* chain = nullptr;
    must(spp_chain_create(plans, configs, 2, &chain));
    const auto run = [&](const spp::Linear* behind, const Floats& made) {
      return spp_chain_forward(chain, x.get(), x.count, residual.get(), residual.count, behind, made.get(),
                               made.count);
    };
    const Floats at_once = memory(floats), found = memory(how.batch * scores);
    must(run(nullptr, at_once));
    if (!std::equal(at_once.get(), at_once.get() + floats, one_by_one.get()))
      std::printf("a chain on %d threads\n", threads), ++failures;
    must(run(&linear, found));
    if (!std::equal(found.get(), found.get() + how.batch * scores, expected.get()))
      std::printf("a chain and a linear layer on %d threads\n", threads), ++failures;
    linear.bias_count += 1;
    must_refuse(run(&linear, found));
    linear.bias_count -= 1;
    spp_chain_free(chain);
  }
  spp_plan_free(second);
}

void run_case() {
  spp::Geometry g{};
  g.groups = between(0, 3) ? 1 : between(2, 3);
  g.channels = g.groups * between(1, between(0, 9) ? 4 : 40);
  g.filters = g.groups * between(1, 9);
  const bool in_place = between(0, 1);  // rows of one length: read where they are
  const bool winograd = between(0, 3) == 0;
  if (winograd) g.channels = between(1, 20), g.filters = between(1, 70), g.groups = 1;
  else if (between(0, 4) == 0) g.channels = g.filters = g.groups = between(2, 40);  // depthwise
  // Depthwise layers have kernels of their own for these squares.
  const bool square = g.groups > 1 && g.groups == g.channels && g.groups == g.filters && between(0, 1);
  const int side = 2 * between(1, 3) + 1, step = between(1, 2);
  int size[2], out[2];
  for (int d = 0; d < 2; ++d) {
    g.kernel[d] = in_place && d ? 2 * between(0, 2) + 1 : between(1, 4);
    g.stride[d] = in_place ? 1 : between(1, 3);
    g.dilation[d] = between(0, 2) ? 1 : between(2, 3);
    if (square) g.kernel[d] = side, g.stride[d] = step, g.dilation[d] = 1;
    if (winograd) g.kernel[d] = 3, g.stride[d] = g.dilation[d] = 1;
    g.padding[d] = in_place && d ? g.dilation[d] * (g.kernel[d] / 2) : between(0, 5);
    const int reach = g.dilation[d] * (g.kernel[d] - 1) + 1;
    size[d] = std::max(1, reach - 2 * g.padding[d]) + between(0, between(0, 3) ? 12 : 40);
    out[d] = (size[d] + 2 * g.padding[d] - reach) / g.stride[d] + 1;
  }
  const int taps = g.kernel[0] * g.kernel[1], rows = g.filters / g.groups;
  const int group_channels = g.channels / g.groups;
  const double share = between(0, 4) / 4.0;  // none to all of the columns
  const auto columns = some_columns(g.channels * taps, share);
  const int count = static_cast<int>(columns.size());
  const int64_t batch = between(1, 4);
  const int in_plane = size[0] * size[1], out_plane = out[0] * out[1];
  const size_t outputs = batch * g.filters * out_plane;
  const Floats x = normal(batch * g.channels * in_plane), weight = normal(rows * count);
  const Floats bias = between(0, 1) ? normal(g.filters) : Floats();
  const Floats residual = between(0, 1) ? normal(outputs) : Floats();
  const float infinity = std::numeric_limits<float>::infinity();
  const bool limited = between(0, 1);
  Limits limits{limited ? 0 : -infinity, limited ? 3 : infinity};
  if (!limited) limits.activation = static_cast<spp::Activation>(between(0, spp::kActivations - 1));

  std::vector<spp::EpilogueOp> post;
  int now[2] = {out[0], out[1]};
  for (int n = between(0, 2); n > 0; --n) {
    spp::EpilogueOp op{};
    op.kind = static_cast<spp::EpilogueKind>(between(0, 2));
    op.alpha = 5e-5f;
    op.ceil_mode = between(0, 1);
    op.count_include_pad = between(0, 1);
    for (int d = 0; d < 2; ++d) {
      const bool norm = op.kind == spp::EpilogueKind::kLocalResponseNorm;
      op.kernel[d] = norm ? 3 : between(1, std::min(4, now[d]));
      op.stride[d] = norm ? 1 : between(1, 3);
      op.padding[d] = norm ? 0 : between(0, op.kernel[d] / 2);
      if (!norm)
        now[d] = spp::pool_size(now[d], op.kernel[d], op.stride[d], op.padding[d], op.ceil_mode);
    }
    post.push_back(op);
  }

  // The convolution and its gradients: every product once.
  const Floats grad = normal(outputs);
  double largest = 1;  // of the sums
  Planes y = planes(static_cast<int>(batch) * g.filters, out[0], out[1]);
  std::vector<double> grad_x(batch * g.channels * in_plane), grad_weight(rows * count);
  std::vector<double> size_x(grad_x.size()), size_weight(grad_weight.size());
  for (int b = 0; b < batch; ++b)
    for (int f = 0; f < g.filters; ++f)
      for (int i = 0; i < out[0]; ++i)
        for (int j = 0; j < out[1]; ++j) {
          const size_t at = (b * g.filters + f) * static_cast<size_t>(out_plane) + i * out[1] + j;
          double sum = bias ? bias[f] : 0;
          for (int k = 0; k < count; ++k) {
            const int channel = columns[k] / taps, tap = columns[k] % taps;
            if (channel / group_channels != f / rows) continue;
            const int row = i * g.stride[0] - g.padding[0] + tap / g.kernel[1] * g.dilation[0];
            const int col = j * g.stride[1] - g.padding[1] + tap % g.kernel[1] * g.dilation[1];
            if (row < 0 || row >= size[0] || col < 0 || col >= size[1]) continue;
            const size_t from = (b * g.channels + channel) * static_cast<size_t>(in_plane) +
                                row * size[1] + col;
            const size_t w = static_cast<size_t>(f % rows) * count + k;
            sum += static_cast<double>(weight[w]) * x[from];
            grad_x[from] += static_cast<double>(weight[w]) * grad[at];
            grad_weight[w] += static_cast<double>(x[from]) * grad[at];
            size_x[from] += std::abs(static_cast<double>(weight[w]) * grad[at]);
            size_weight[w] += std::abs(static_cast<double>(x[from]) * grad[at]);
          }
          if (residual) sum += residual[at];
          largest = std::max(largest, std::abs(sum));
          y.values[at] = limits.of(sum);
        }
  for (const spp::EpilogueOp& op : post) y = apply(op, y);
  double most = 1;
  for (const double value : y.values) most = std::max(most, std::abs(value));
  const std::vector<double> size_y(y.values.size(), 5 * most);  // 1e-5 of the greatest output

  void* plan = make_plan(g, columns, weight, bias, limits, post, false);
  const auto way = [&](int threads, spp::Kernel variant, int bfloat16) {
    return spp::KernelConfig{batch, size[0], size[1], out[0], out[1], threads, variant, bfloat16};
  };
  for (const spp::Kernel variant : {spp::Kernel::kPixelVectorised, spp::Kernel::kChannelBlocked})
    for (int threads = 1; threads <= 3; ++threads) {
      const Floats result = memory(y.values.size());
      const spp::KernelConfig how = way(threads, variant, 0);
      forward(plan, how, x.get(), x.count, residual, result);
      compare(variant == spp::Kernel::kChannelBlocked ? "channel-blocked" : "pixel-vectorised", result, y.values, size_y);
    }
  for (const spp::Kernel variant : {spp::Kernel::kWinograd4, spp::Kernel::kWinograd2})
    for (int threads = 1; winograd && threads <= 3; ++threads) {
      const Floats result = memory(y.values.size());
      const spp::KernelConfig how = way(threads, variant, 0);
      forward(plan, how, x.get(), x.count, residual, result);
      // Its sums are rounded by their own size, whatever is left of them by the limits.
      compare("winograd", result, y.values, std::vector<double>(y.values.size(), 5 * largest));
    }
  run_chain(plan, way(1, spp::Kernel::kPixelVectorised, 0), g, now, x);
  const Floats given = normal(y.values.size());
  for (int threads = 1; threads <= 2; ++threads)
    for (const bool fused : {false, true}) {
      if (fused && limits.activation != spp::Activation::kNone) continue;  // torch computes those gradients
      const Floats of_x = memory(grad_x.size()), of_weight = memory(grad_weight.size());
      const Floats of_bias = memory(g.filters);
      const spp::KernelConfig how = way(threads, spp::Kernel::kPixelVectorised, 0);
      const Floats& of_output = fused ? given : grad;
      const auto run = [&](int64_t grads) {
        return spp_backward(plan, &how, weight.get(), weight.count, x.get(), x.count, of_output.get(), grads,
                            fused, of_x.get(), of_x.count, of_weight.get(), of_weight.count, of_bias.get(),
                            of_bias.count);
      };
      must_refuse(run(of_output.count + 1));
      must(run(of_output.count));
      if (!fused) {
        compare("gradient of the input", of_x, grad_x, size_x);
        compare("gradient of the weights", of_weight, grad_weight, size_weight);
        continue;
      }
      // Of what is fused the memory, and that there are numbers.
      double sum = 0;
      for (size_t i = 0; i < grad_x.size(); ++i) sum += of_x[i];
      for (size_t i = 0; i < grad_weight.size(); ++i) sum += of_weight[i];
      for (int f = 0; f < g.filters; ++f) sum += of_bias[f];
      if (!std::isfinite(sum)) std::printf("gradient of what is fused: %g\n", sum), ++failures;
    }
  spp_plan_free(plan);

  // The same in bfloat16: the upper halves of the numbers, rounded towards 0.
  const auto halves = [](const Floats& from, size_t count) {
    Halves to(count);
    for (size_t i = 0; i < count; ++i) {
      uint32_t word;
      std::memcpy(&word, &from[i], sizeof word);
      to[i] = static_cast<uint16_t>(word >> 16);
    }
    return to;
  };
  const auto widened = [](float x) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    word &= 0xffff0000u;
    std::memcpy(&x, &word, sizeof x);
    return x;
  };
  const Floats upper = memory(rows * count);
  for (size_t i = 0; i < static_cast<size_t>(rows) * count; ++i) upper[i] = widened(weight[i]);
  const auto x16 = halves(x, batch * g.channels * in_plane);
  const auto residual16 = residual ? halves(residual, outputs) : Halves();
  must(spp_set_pairs(between(0, 1) ? "amx_emulated" : ""));
  plan = make_plan(g, columns, upper, bias, limits, post, true);
  for (const spp::Kernel variant :
       {spp::Kernel::kPixelVectorised, spp::Kernel::kChannelBlocked, spp::Kernel::kBfloat16Pairs})
    for (int threads = 1; threads <= 3; ++threads) {
      if (variant == spp::Kernel::kBfloat16Pairs && !spp_has_pairs()) continue;
      const bool depthwise = g.groups > 1 && g.groups == g.channels && g.groups == g.filters;
      if (variant == spp::Kernel::kChannelBlocked && depthwise) continue;  // in float32 only
      const Halves result(y.values.size());
      const spp::KernelConfig how = way(threads, variant, 1);
      forward(plan, how, x16.get(), x16.count, residual16, result);
      const Floats wide = memory(y.values.size());
      for (size_t i = 0; i < y.values.size(); ++i) {
        const uint32_t word = static_cast<uint32_t>(result[i]) << 16;
        std::memcpy(&wide[i], &word, sizeof word);
      }
      // What was cut off is up to a 128th of each number.
      compare("bfloat16", wide, y.values, std::vector<double>(y.values.size(), 4e4 * most));
    }
  spp_plan_free(plan);
}

spp::Memory span(const Floats& x) { return {reinterpret_cast<uint8_t*>(x.get()), x.count * 4}; }

// A gate and the mean of the planes that it makes, as one call; its results are those of the two.
void run_list(const spp::Gate& gate, const Floats& x, int batch, int pixels, int threads, const Floats& gated) {
  const int64_t planes = x.count / pixels;
  const Floats middles = memory(x.count), found = memory(planes), expected = memory(planes);
  must(spp_plane_means(gated.get(), gated.count, planes, pixels, threads, expected.get(), planes));
  const spp::Place in{0, 0, x.count}, middle{1, 0, x.count}, out{2, 0, planes}, none{-1, 0, 0};
  spp::ListedCall calls[] = {
      {spp::CallKind::kGate, threads, &gate, nullptr, batch, pixels, 1, in, none, middle, nullptr, 0},
      {spp::CallKind::kMeans, threads, nullptr, nullptr, planes, pixels, 1, middle, none, out, nullptr, 0}};
  const spp::Memory memories[] = {span(x), span(middles), span(found)};
  must(spp_run_calls(calls, 2, memories, 3));
  for (int64_t i = 0; i < found.count; ++i)
    if (found[i] != expected[i]) std::printf("a list of calls: %g, not %g\n", found[i], expected[i]), ++failures;
  must_refuse(spp_run_calls(calls, 2, memories, 2));
  calls[1].input.offset = 1;
  must_refuse(spp_run_calls(calls, 2, memories, 3));
}

// A concatenation of two tensors, of which the second one is made in its place, and their sum with themselves, as one
// call; and each by itself.
void run_concat(const Floats& front, const Floats& back, int batch, int pixels, int threads) {
  const int64_t count = front.count + back.count;
  const spp::ConcatPart parts[] = {{front.get(), front.count, front.count / batch / pixels},
                                   {back.get(), back.count, back.count / batch / pixels}};
  const Floats whole = memory(count), twice = memory(count), found = memory(count), middle = memory(count);
  must(spp_concat(parts, 2, batch, pixels, threads, whole.get(), count));
  must_refuse(spp_concat(parts, 2, batch, pixels, threads, whole.get(), count + 1));
  must(spp_add(whole.get(), count, whole.get(), count, threads, twice.get(), count));
  must_refuse(spp_add(whole.get(), count, whole.get(), count - 1, threads, twice.get(), count));
  const spp::Place places[] = {{0, 0, front.count}, {1, 0, back.count}}, in_place{2, 4 * front.count, back.count};
  const spp::Place middles{2, 0, count}, out{3, 0, count}, none{-1, 0, 0}, copied[] = {places[0], in_place};
  spp::ListedCall calls[] = {
      {spp::CallKind::kConcat, threads, nullptr, nullptr, batch, pixels, 1, none, none, in_place, places + 1, 1},
      {spp::CallKind::kConcat, threads, nullptr, nullptr, batch, pixels, 1, none, none, middles,
       batch == 1 ? copied : places, 2},
      {spp::CallKind::kAdd, threads, nullptr, nullptr, 0, 0, 0, middles, middles, out, nullptr, 0}};
  const spp::Memory memories[] = {span(front), span(back), span(middle), span(found)};
  must(spp_run_calls(calls, 3, memories, 4));
  for (int64_t i = 0; i < count; ++i)
    if (found[i] != twice[i]) std::printf("a concatenation: %g, not %g\n", found[i], twice[i]), ++failures;
  must_refuse(spp_run_calls(calls, 3, memories, 3));
  calls[1].num_parts = 1;
  must_refuse(spp_run_calls(calls, 3, memories, 4));
}

// Squeeze and excitation, and a concatenation that is normed.
void run_between() {
  const int channels = between(1, 40), squeezed = between(1, 20), batch = between(1, 3), pixels = between(1, 50);
  const auto columns = some_columns(channels, 0.5), all = some_columns(squeezed, 1);
  const int kept = static_cast<int>(columns.size());
  const Floats x = normal(batch * channels * pixels), first = normal(squeezed * kept), biases = normal(squeezed);
  const Floats second = normal(channels * squeezed);
  spp::Gate gate{{first.get(), first.count, biases.get(), columns.data(), kept, squeezed, 0, 1e9f, {}},
                 {second.get(), second.count, nullptr, all.data(), squeezed, channels,
                  -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity(),
                  spp::Activation::kSigmoid},
                 channels};
  const Floats mean = normal(channels), variance = normal(channels), scale = normal(channels);
  for (int c = 0; c < channels; ++c) variance[c] = std::abs(variance[c]);
  const spp::Norm norm{mean.get(), variance.get(), scale.get(), nullptr, channels, 0.1f, 0, 1e9f};
  const int head = between(1, channels), images = between(1, 3);
  const Floats front = normal(images * head * pixels), back = normal(images * (channels - head) * pixels);
  const spp::ConcatPart parts[] = {{front.get(), front.count, head}, {back.get(), back.count, channels - head}};
  for (int threads = 1; threads <= 3; ++threads) {
    const Floats gated = memory(x.count), normed = memory(images * channels * pixels);
    must(spp_gate(&gate, x.get(), x.count, batch, pixels, threads, gated.get(), gated.count));
    must_refuse(spp_gate(&gate, x.get(), x.count, batch, pixels + 1, threads, gated.get(), gated.count));
    must(spp_norm(&norm, parts, head < channels ? 2 : 1, nullptr, images, pixels, threads, normed.get(), normed.count));
    must_refuse(spp_norm(&norm, parts, 1, nullptr, images, pixels + 1, threads, normed.get(), normed.count));
    const Floats means = memory(batch * channels);
    must(spp_plane_means(x.get(), x.count, means.count, pixels, threads, means.get(), means.count));
    must_refuse(spp_plane_means(x.get(), x.count, means.count, pixels + 1, threads, means.get(), means.count));
    run_list(gate, x, batch, pixels, threads, gated);
    if (head < channels) run_concat(front, back, images, pixels, threads);
    for (int64_t i = 0; i < gated.count; ++i)  // a sigmoid is between 0 and 1
      if (!(std::abs(gated[i]) <= std::abs(x[i]))) std::printf("a gate: %g of %g\n", gated[i], x[i]), ++failures;
    for (int64_t i = 0; i < normed.count; ++i)
      if (!(normed[i] >= 0)) std::printf("a norm: %g\n", normed[i]), ++failures;
  }
}

// A pool behind no convolution.
void run_pool() {
  spp::EpilogueOp op{};
  op.kind = between(0, 1) ? spp::EpilogueKind::kMaxPool : spp::EpilogueKind::kAveragePool;
  op.ceil_mode = between(0, 1), op.count_include_pad = between(0, 1);
  int size[2];
  for (int d = 0; d < 2; ++d) {
    op.kernel[d] = between(1, 5), op.stride[d] = between(1, 4), op.padding[d] = between(0, op.kernel[d] / 2);
    size[d] = std::max(1, op.kernel[d] - 2 * op.padding[d]) + between(0, 40);
  }
  Planes in = planes(between(1, 5), size[0], size[1]);
  const Floats x = normal(in.values.size());
  std::copy_n(x.get(), x.count, in.values.begin());
  const std::vector<double> expected = apply(op, in).values;
  for (int threads = 1; threads <= 3; ++threads) {
    const Floats out = memory(expected.size());
    const auto run = [&](int64_t outputs) {
      return spp_pool(&op, in.count, size[0], size[1], threads, x.get(), x.count, out.get(), outputs);
    };
    must_refuse(run(out.count + 1));
    must(run(out.count));
    compare("pool", out, expected, std::vector<double>(expected.size(), 1));
  }
}

// An update of pruning probabilities: the order of the groups, and how many are chosen.
template <typename Float>
void run_update() {
  const size_t count = between(0, 3000), needed = between(0, 3000);
  const std::unique_ptr<Float[]> importance(new Float[count]);
  const std::unique_ptr<double[]> probability(new double[count]), change(new double[count]);
  const std::unique_ptr<int64_t[]> order(new int64_t[count]);
  std::vector<int64_t> expected(count);
  size_t alive = 0;
  for (size_t i = 0; i < count; ++i) {
    importance[i] = static_cast<Float>(between(0, 500)) / 7;
    probability[i] = between(0, 4) / 4.0;
    change[i] = between(-2, 4) / 4.0;
    alive += probability[i] < 1;
    expected[i] = static_cast<int64_t>(i);
  }
  std::stable_sort(expected.begin(), expected.end(), [&](int64_t i, int64_t j) {
    const bool i_out = probability[i] >= 1, j_out = probability[j] >= 1;
    return i_out != j_out ? j_out : !i_out && importance[i] < importance[j];
  });
  must(spp_ascending_order(importance.get(), sizeof(Float) == 8, probability.get(), count, order.get()));
  if (!std::equal(expected.begin(), expected.end(), order.get()))
    std::printf("order of %zu groups\n", count), ++failures;
  size_t reach = 0, reached = 0;
  for (size_t r = 0; r < alive; ++r) reach += probability[order[r]] + change[r] >= 1;
  spp_move(order.get(), change.get(), alive, needed, probability.get());
  for (size_t r = 0; r < alive; ++r) reached += probability[order[r]] == 1;
  if (reached != std::min(reach, needed)) std::printf("%zu reached 1\n", reached), ++failures;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  for (int i = 2; i < argc; ++i) {
    generator.seed(1);
    if (std::strncmp(argv[i], "int8-", 5) == 0) {
      if (run_int8(argv[i] + 5, cases)) std::printf("%s: %d shapes\n", argv[i], cases);
      continue;
    }
    if (spp_set_isa(argv[i]) != 0) continue;
    for (int n = 0; n < cases; ++n) run_case(), run_between(), run_pool(), run_update<float>(), run_update<double>();
    std::printf("%s: %d shapes\n", argv[i], cases);
  }
  // The memory of threads that OpenMP is letting go would look leaked.
  std::this_thread::sleep_for(std::chrono::seconds(1));
  return failures != 0;
}
