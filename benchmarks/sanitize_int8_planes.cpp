// What stands between int8 layers on random planes: max pools of uint8 and roundings to uint8 exactly, pools and norms
// before a rounding within a step of double precision. See sanitize.cpp.
#include <cmath>
#include <limits>

#include "int8_interface.h"
#include "sanitize.h"

namespace {

using Pixels = Tensor<uint8_t>;
using Planes = std::vector<double>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

int32_t code(spp::Status status) { return static_cast<int32_t>(status); }

spp::EpilogueOp drawn_op(spp::EpilogueKind kind) {
  spp::EpilogueOp op{kind, {}, {1, 1}, {}, between(0, 1), between(0, 1), 0.01f};
  for (int axis : {0, 1}) {
    op.kernel[axis] = between(1, 5), op.stride[axis] = between(1, 3);
    op.padding[axis] = between(0, op.kernel[axis] / 2);
  }
  if (kind == spp::EpilogueKind::kLocalResponseNorm) op.kernel[0] = op.kernel[1] = 2 * between(0, 2) + 1;
  return op;
}

spp::EpilogueOp drawn_op() {
  const int kind = between(0, 2);
  return drawn_op(kind == 0   ? spp::EpilogueKind::kMaxPool
                  : kind == 1 ? spp::EpilogueKind::kAveragePool
                              : spp::EpilogueKind::kLocalResponseNorm);
}

// The largest number of a window of a plane, or its mean over what the window counts.
double pooled(const spp::EpilogueOp& op, const double* plane, const int (&size)[2], int y, int x) {
  const int place[2] = {y, x};
  int begin[2], end[2], counted = 1;
  for (int axis : {0, 1}) {
    begin[axis] = place[axis] * op.stride[axis] - op.padding[axis];
    end[axis] = std::min(begin[axis] + op.kernel[axis], size[axis] + op.padding[axis]);
    const int inside = std::min(end[axis], size[axis]) - std::max(begin[axis], 0);
    counted *= op.count_include_pad ? end[axis] - begin[axis] : inside;
  }
  double largest = -kInfinity, sum = 0;
  for (int i = std::max(begin[0], 0); i < std::min(end[0], size[0]); ++i)
    for (int j = std::max(begin[1], 0); j < std::min(end[1], size[1]); ++j) {
      largest = std::max(largest, plane[i * size[1] + j]);
      sum += plane[i * size[1] + j];
    }
  return op.kind == spp::EpilogueKind::kMaxPool ? largest : sum / counted;
}

double normed(const spp::EpilogueOp& op, const double* plane, const int (&size)[2], int y, int x) {
  Planes squares(plane, plane + size[0] * size[1]);
  for (double& number : squares) number *= number;
  const int window = op.kernel[0];
  const spp::EpilogueOp mean{spp::EpilogueKind::kAveragePool, {window, window}, {1, 1}, {window / 2, window / 2}, 0, 1, 0};
  return plane[y * size[1] + x] * std::pow(1 + op.alpha * pooled(mean, squares.data(), size, y, x), -0.75);
}

// What an operation makes of planes, whose size becomes that of the result.
Planes after(const spp::EpilogueOp& op, const Planes& in, int planes, int (&size)[2]) {
  const bool is_norm = op.kind == spp::EpilogueKind::kLocalResponseNorm;
  int out[2] = {size[0], size[1]};
  spp::size_after(op, out[0], out[1]);
  Planes made;
  for (int plane = 0; plane < planes; ++plane)
    for (int y = 0; y < out[0]; ++y)
      for (int x = 0; x < out[1]; ++x) {
        const double* own = in.data() + static_cast<size_t>(plane) * size[0] * size[1];
        made.push_back(is_norm ? normed(op, own, size, y, x) : pooled(op, own, size, y, x));
      }
  size[0] = out[0], size[1] = out[1];
  return made;
}

// That roundings are at most `steps` off.
void compare(const char* what, const Pixels& found, const Planes& expected, double scale, int zero, double steps) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < found.count; ++i) {
    const double q = std::clamp(std::nearbyint(expected[i] * scale) + zero, 0.0, 255.0);
    wrong += !(std::abs(found[i] - q) <= steps);
  }
  if (wrong) std::printf("%s: %ld of %ld differ\n", what, static_cast<long>(wrong), static_cast<long>(found.count)), ++failures;
}

void run_max_pool() {
  const spp::EpilogueOp op = drawn_op(spp::EpilogueKind::kMaxPool);
  const int planes = between(0, 4);
  int size[2] = {between(1, 20), between(1, 40)};
  const Pixels x(static_cast<size_t>(planes) * size[0] * size[1]);
  for (int64_t i = 0; i < x.count; ++i) x[i] = static_cast<uint8_t>(between(0, 255));
  int out[2] = {size[0], size[1]};
  spp::size_after(op, out[0], out[1]);
  const bool fits = out[0] > 0 && out[1] > 0;
  const Pixels found(fits ? static_cast<size_t>(planes) * out[0] * out[1] : 1);
  const auto pool = [&](int threads, int64_t in_count, int64_t out_count) {
    return code(spp_int8_max_pool(&op, planes, size[0], size[1], threads, x.get(), in_count, found.get(), out_count));
  };
  if (!fits) return must_refuse(pool(1, x.count, found.count));
  const int whole[2] = {size[0], size[1]};
  const Planes expected = after(op, Planes(x.get(), x.get() + x.count), planes, size);
  size[0] = whole[0], size[1] = whole[1];
  for (int threads = 1; threads <= 3; ++threads) {
    must(pool(threads, x.count, found.count));
    compare("a max pool of uint8", found, expected, 1, 0, 0);
    must_refuse(pool(threads, x.count + 1, found.count));
    must_refuse(pool(threads, x.count, found.count - 1));
  }
}

Floats drawn_floats(size_t count) {
  Floats x(count);
  // Multiples of 1/4, halves of steps among them.
  for (int64_t i = 0; i < x.count; ++i) x[i] = static_cast<float>(between(-300, 300)) / 4;
  return x;
}

void run_quantize() {
  const Floats x = drawn_floats(between(0, 3) ? between(0, 300) : between(16000, 50000));
  for (int64_t i = 0; i < x.count; i += 97) x[i] = between(0, 1) ? 1e30f : -std::numeric_limits<float>::infinity();
  const Planes expected(x.get(), x.get() + x.count);
  const Pixels found(x.count);
  const int zero = between(0, 255);
  for (int threads = 1; threads <= 3; ++threads) {
    must(code(spp_int8_quantize(2, zero, threads, x.get(), x.count, found.get(), found.count)));
    compare("a rounding", found, expected, 2, zero, 0);
    must_refuse(code(spp_int8_quantize(2, zero, threads, x.get(), x.count, found.get(), found.count + 1)));
  }
  must_refuse(code(spp_int8_quantize(2, 256, 1, x.get(), x.count, found.get(), found.count)));
}

void run_post() {
  std::vector<spp::EpilogueOp> ops;
  for (int i = between(0, 3); i > 0; --i) ops.push_back(drawn_op());
  const int planes = between(0, 4), count = static_cast<int>(ops.size());
  const int size[2] = {between(1, 20), between(1, 40)};
  const Floats x = drawn_floats(static_cast<size_t>(planes) * size[0] * size[1]);
  int out[2] = {size[0], size[1]};
  bool fits = true;
  for (const spp::EpilogueOp& op : ops) {
    spp::size_after(op, out[0], out[1]);
    if (!(fits = out[0] > 0 && out[1] > 0)) break;
  }
  const Pixels found(fits ? static_cast<size_t>(planes) * out[0] * out[1] : 1);
  const auto post = [&](int threads, int64_t in_count, int64_t out_count) {
    return code(spp_int8_post(ops.data(), count, planes, size[0], size[1], 2, 100, threads, x.get(), in_count, found.get(),
                              out_count));
  };
  if (!fits) return must_refuse(post(1, x.count, found.count));
  Planes expected(x.get(), x.get() + x.count);
  out[0] = size[0], out[1] = size[1];
  for (const spp::EpilogueOp& op : ops) expected = after(op, expected, planes, out);
  for (int threads = 1; threads <= 3; ++threads) {
    must(post(threads, x.count, found.count));
    compare("pools and norms", found, expected, 2, 100, ops.empty() ? 0 : 1);
    must_refuse(post(threads, x.count + 1, found.count));
    must_refuse(post(threads, x.count, found.count + 1));
  }
}

}  // namespace

void run_int8_planes() { run_max_pool(), run_quantize(), run_post(); }
