// What stands between int8 layers: max pools of uint8, and floats rounded to uint8. Plain loops, which compilers
// vectorise: a byte is read once and takes less than an instruction.
#include <algorithm>
#include <cstring>
#include <vector>

#include "guard.h"
#include "int8_interface.h"
#include "int8_rounding.h"
#include "threads.h"

namespace spp {
namespace {

constexpr int64_t kBlock = 1 << 14;  // numbers that a thread rounds at a time

// Planes of a max pool, in and out.
struct Pool {
  const EpilogueOp& op;
  int height, width, out_height, out_width;

  // A row with its padding, as far as windows reach.
  int64_t row_bytes() const {
    const int64_t reach = int64_t{out_width - 1} * op.stride[1] + op.kernel[1];
    return std::max<int64_t>(reach, int64_t{width} + op.padding[1]);
  }
};

// For every column the largest number of the rows [begin, end) of a plane.
void largest_of_rows(const uint8_t* plane, int width, int begin, int end, uint8_t* out) {
  std::memcpy(out, plane + int64_t{begin} * width, width);
  for (int y = begin + 1; y < end; ++y) {
    const uint8_t* row = plane + int64_t{y} * width;
    for (int x = 0; x < width; ++x) out[x] = std::max(out[x], row[x]);
  }
}

template <int stride>
void largest_of_windows(const uint8_t* row, int kernel, int count, uint8_t* out) {
  for (int x = 0; x < count; ++x) out[x] = row[x * stride];
  for (int tap = 1; tap < kernel; ++tap)
    for (int x = 0; x < count; ++x) out[x] = std::max(out[x], row[x * stride + tap]);
}

void largest_of_windows(const uint8_t* row, int kernel, int64_t stride, int count, uint8_t* out) {
  if (stride == 1) return largest_of_windows<1>(row, kernel, count, out);
  if (stride == 2) return largest_of_windows<2>(row, kernel, count, out);
  for (int x = 0; x < count; ++x) out[x] = *std::max_element(row + x * stride, row + x * stride + kernel);
}

// Padding is 0, which never wins: every window has a pixel of the plane.
void pool_plane(const Pool& pool, const uint8_t* plane, uint8_t* row, uint8_t* out) {
  const EpilogueOp& op = pool.op;
  for (int y = 0; y < pool.out_height; ++y, out += pool.out_width) {
    const int64_t top = int64_t{y} * op.stride[0] - op.padding[0];
    const int begin = static_cast<int>(std::max<int64_t>(top, 0));
    const int end = static_cast<int>(std::min<int64_t>(top + op.kernel[0], pool.height));
    largest_of_rows(plane, pool.width, begin, end, row + op.padding[1]);
    largest_of_windows(row, op.kernel[1], op.stride[1], pool.out_width, out);
  }
}

void max_pool(const Pool& pool, const uint8_t* in, int64_t planes, int threads, uint8_t* out) {
  const int64_t bytes = pool.row_bytes() + 64;  // a line of the cache between two threads' rows
  std::vector<uint8_t> rows(bytes * threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < planes; ++i)
    pool_plane(pool, in + i * pool.height * pool.width, rows.data() + bytes * thread_index(),
               out + i * pool.out_height * pool.out_width);
}

}  // namespace
}  // namespace spp

using spp::check, spp::check_count, spp::deref, spp::guarded, spp::Status;

// The largest number of every window of planes of uint8.
SPP_EXPORT Status spp_int8_max_pool(const spp::EpilogueOp* op, int64_t planes, int32_t height, int32_t width,
                                    int32_t threads, const uint8_t* in, int64_t in_count, uint8_t* out,
                                    int64_t out_count) {
  return guarded([&] {
    check(deref(op).kind == spp::EpilogueKind::kMaxPool, "The operation must be a max pool.");
    const spp::PoolSize size = spp::check_pool(*op, planes, height, width, threads);
    check_count("in", {in, in_count}, planes * height * width);
    check_count("out", {out, out_count}, planes * size.height * size.width);
    const spp::Pool pool{*op, height, width, size.height, size.width};
    spp::max_pool(pool, in, planes, threads, out);
  });
}

// Rounds floats, times `inverse` and plus `zero`, to uint8.
SPP_EXPORT Status spp_int8_quantize(float inverse, int32_t zero, int32_t threads, const float* in, int64_t in_count,
                                    uint8_t* out, int64_t out_count) {
  return guarded([&] {
    spp::check_rounding(inverse, zero);
    check(threads > 0, "Threads must be positive.");
    check_count("in", {in, in_count}, in_count);
    check_count("out", {out, out_count}, in_count);
    const int64_t blocks = (in_count + spp::kBlock - 1) / spp::kBlock;
#pragma omp parallel for num_threads(threads) if (threads > 1 && blocks > 1)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * spp::kBlock;
      spp::round_block(in + begin, std::min(spp::kBlock, in_count - begin), inverse, zero, out + begin);
    }
  });
}
