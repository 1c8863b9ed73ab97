// Pools and norms between int8 layers: planes of floats, which are rounded to uint8 in the end. Every operation is
// rounded as torch rounds it on one core: sums run along the rows of a window, then along its columns.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "guard.h"
#include "int8_interface.h"
#include "int8_rounding.h"
#include "threads.h"

namespace spp {
namespace {

// A plane, and the memory that its operations use.
struct Plane {
  int height, width;
  float *numbers, *result, *squares, *row;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Largest {
  static constexpr float kStart = -kInfinity;
  static float join(float a, float b) { return a > b ? a : b; }
};

struct Sum {
  static constexpr float kStart = 0;
  static float join(float a, float b) { return a + b; }
};

template <typename Join, int stride>
void join_taps(const float* row, int kernel, int count, float* out) {
  for (int tap = 0; tap < kernel; ++tap)
    for (int x = 0; x < count; ++x) out[x] = Join::join(out[x], row[x * stride + tap]);
}

template <typename Join>
void join_taps(const float* row, int kernel, int stride, int count, float* out) {
  if (stride == 1) return join_taps<Join, 1>(row, kernel, count, out);
  if (stride == 2) return join_taps<Join, 2>(row, kernel, count, out);
  for (int tap = 0; tap < kernel; ++tap)
    for (int x = 0; x < count; ++x) out[x] = Join::join(out[x], row[int64_t{x} * stride + tap]);
}

// The largest number of every column of some rows.
void largest_of_rows(const float* rows, int count, int width, float* out) {
  std::copy_n(rows, width, out);
  for (int i = 1; i < count; ++i)
    for (int x = 0; x < width; ++x) out[x] = Largest::join(out[x], rows[int64_t{i} * width + x]);
}

// The sum or the largest number of every window.
template <typename Join>
void join_windows(const EpilogueOp& op, const Plane& plane, const float* in, int out_height, int out_width, float* out) {
  const int64_t reach = int64_t{out_width - 1} * op.stride[1] + op.kernel[1];
  std::fill_n(plane.row, std::max<int64_t>(reach, plane.width + op.padding[1]), Join::kStart);
  for (int y = 0; y < out_height; ++y, out += out_width) {
    std::fill_n(out, out_width, Join::kStart);
    const int begin = std::max(y * op.stride[0] - op.padding[0], 0);
    const int end = std::min(y * op.stride[0] - op.padding[0] + op.kernel[0], plane.height);
    const auto join = [&] { join_taps<Join>(plane.row, op.kernel[1], op.stride[1], out_width, out); };
    float* row = plane.row + op.padding[1];
    if constexpr (std::is_same_v<Join, Largest>) {  // in any order
      largest_of_rows(in + int64_t{begin} * plane.width, end - begin, plane.width, row);
      join();
    } else {
      for (int i = begin; i < end; ++i) {
        std::copy_n(in + int64_t{i} * plane.width, plane.width, row);
        join();
      }
    }
  }
}

// How many numbers of an axis a window counts.
int counted(const EpilogueOp& op, int axis, int place, int size) {
  const int begin = place * op.stride[axis] - op.padding[axis];
  const int end = std::min(begin + op.kernel[axis], size + op.padding[axis]);
  return op.count_include_pad ? end - begin : std::min(end, size) - std::max(begin, 0);
}

void average(const EpilogueOp& op, const Plane& plane, int out_height, int out_width) {
  join_windows<Sum>(op, plane, plane.numbers, out_height, out_width, plane.result);
  float* out = plane.result;
  for (int y = 0; y < out_height; ++y) {
    const int rows = counted(op, 0, y, plane.height);
    for (int x = 0; x < out_width; ++x) *out++ /= static_cast<float>(rows * counted(op, 1, x, plane.width));
  }
}

// x · (1 + alpha · mean(x²))^(-3/4), the mean over a window around each pixel.
void norm(const EpilogueOp& op, const Plane& plane) {
  const int pixels = plane.height * plane.width, size = op.kernel[0];
  const EpilogueOp window{EpilogueKind::kAveragePool, {size, size}, {1, 1}, {size / 2, size / 2}, 0, 1, 0};
  for (int i = 0; i < pixels; ++i) plane.squares[i] = plane.numbers[i] * plane.numbers[i];
  join_windows<Sum>(window, plane, plane.squares, plane.height, plane.width, plane.result);
  const float count = static_cast<float>(size * size);
  for (int i = 0; i < pixels; ++i) {
    const float scale = 1 + op.alpha * (plane.result[i] / count);
    plane.result[i] = plane.numbers[i] * (1 / std::sqrt(scale * std::sqrt(scale)));
  }
}

// Runs the operations one after the other; `plane` then has the result as its numbers.
void run(const EpilogueOp* ops, int count, Plane& plane) {
  for (int i = 0; i < count; ++i) {
    int height = plane.height, width = plane.width;
    size_after(ops[i], height, width);
    if (ops[i].kind == EpilogueKind::kLocalResponseNorm) norm(ops[i], plane);
    else if (ops[i].kind == EpilogueKind::kAveragePool) average(ops[i], plane, height, width);
    else join_windows<Largest>(ops[i], plane, plane.numbers, height, width, plane.result);
    std::swap(plane.numbers, plane.result);
    plane.height = height, plane.width = width;
  }
}

struct Post {
  const EpilogueOp* ops;
  int count, height, width;
  float inverse;
  int zero;
};

// The largest plane between two operations, and the longest padded row.
struct Room {
  int64_t pixels, row;
};

void run_planes(const Post& post, const float* in, int64_t planes, int64_t out_pixels, const Room& room, int threads,
                uint8_t* out) {
  const int64_t pixels = int64_t{post.height} * post.width, own = 3 * room.pixels + room.row;
  std::vector<float> memory(own * threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < planes; ++i) {
    float* at = memory.data() + own * thread_index();
    Plane plane{post.height, post.width, at, at + room.pixels, at + 2 * room.pixels,
                at + 3 * room.pixels};
    std::copy_n(in + i * pixels, pixels, plane.numbers);
    run(post.ops, post.count, plane);
    round_block(plane.numbers, out_pixels, post.inverse, post.zero, out + i * out_pixels);
  }
}

constexpr int32_t kMostWindow = 1 << 15;

// Checks that there are windows in the planes before them; in ceil mode a window may be larger than a plane.
Room check_planes(const EpilogueOp* ops, int count, int& height, int& width) {
  Room room{int64_t{height} * width, 0};
  for (const EpilogueOp* op = ops; op < ops + count; ++op) {
    const int size[2] = {height, width};
    for (int axis : {0, 1}) {
      check(op->kernel[axis] <= kMostWindow && op->stride[axis] <= kMostWindow && size[axis] <= kMostWindow,
            "Planes, windows and strides must be at most 2^15 wide and high.");
    }
    room.row = std::max(room.row, int64_t{width} + 2 * (op->kernel[1] + op->stride[1]));
    size_after(*op, height, width);
    check(height > 0 && width > 0, "The planes must be at least as large as a window.");
    room.pixels = std::max(room.pixels, int64_t{height} * width);
  }
  return room;
}

}  // namespace
}  // namespace spp

using spp::check, spp::check_count, spp::guarded, spp::Status;

// Pools and norms of planes of floats, then rounded, times `inverse` and plus `zero`, to uint8.
SPP_EXPORT Status spp_int8_post(const spp::EpilogueOp* ops, int32_t count, int64_t planes, int32_t height,
                                int32_t width, float inverse, int32_t zero, int32_t threads, const float* in,
                                int64_t in_count, uint8_t* out, int64_t out_count) {
  return guarded([&] {
    spp::check_epilogue(ops, count);
    spp::check_rounding(inverse, zero);
    check(planes >= 0 && planes < int64_t{1} << 32 && height > 0 && width > 0 && threads > 0,
          "Height, width and threads must be positive, and the planes at least 0.");
    int out_height = height, out_width = width;
    const spp::Room room = spp::check_planes(ops, count, out_height, out_width);
    const int64_t out_pixels = int64_t{out_height} * out_width;
    check_count("in", {in, in_count}, planes * height * width);
    check_count("out", {out, out_count}, planes * out_pixels);
    spp::run_planes({ops, count, height, width, inverse, zero}, in, planes, out_pixels, room, threads, out);
  });
}
