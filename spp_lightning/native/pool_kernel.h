// Pools of planes behind no convolution: a window's rows are combined first, in vectors of pixels, then its columns.
#pragma once

#include "epilogue_rows.h"
#include "geometry.h"
#include "memory.h"
#include "threads.h"

namespace spp {
namespace SPP_ISA {

// Every kStride-th number from `p` on; 0 stands for any other stride.
template <int kStride>
inline Vector load_strided(const float* p, int64_t stride) {
  if constexpr (kStride == 1) return load(p);
  if constexpr (kStride == 2) {
#if SPP_LANES == 16
    return SPP_PICK(load(p), load(p + kLanes), 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif SPP_LANES == 8
    return SPP_PICK(load(p), load(p + kLanes), 0, 2, 4, 6, 8, 10, 12, 14);
#else
    return SPP_PICK(load(p), load(p + kLanes), 0, 2, 4, 6);
#endif
  }
  Vector v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i * stride];
  return v;
}

// out[0 .. count) = vector(x) for x = 0, kLanes, …; the last whole vector may overlap the one before.
template <typename Make>
inline void make_row(const Make& vector, int count, float* out) {
  if (count < kLanes) return store_lanes(out, vector(0), count);
  for (int x = 0; x + kLanes <= count; x += kLanes) store(out + x, vector(x));
  if (count % kLanes) store(out + count - kLanes, vector(count - kLanes));
}

// Planes of one size, in and out, and what all rows of a plane share.
struct PlanePool {
  const EpilogueOp& op;
  int height, width, out_height, out_width;

  bool is_max() const { return op.kind == EpilogueKind::kMaxPool; }

  // A row with its padding, as far as vectors of windows reach.
  size_t line_floats() const {
    const size_t reach = (out_width + kLanes) * static_cast<size_t>(op.stride[1]) + op.kernel[1] + kLanes;
    return std::max(reach, static_cast<size_t>(width) + op.padding[1] + kLanes);
  }

  // How many columns each window of a row counts.
  void count_columns(float* counts) const {
    for (int x = 0; x < out_width; ++x) counts[x] = static_cast<float>(Window(op, 1, x, width).count);
    std::fill_n(counts + out_width, kLanes, 1.0f);
  }
};

// The rows of a window, combined, behind the row's padding.
template <bool kMax>
inline void combine_rows_of(const PlanePool& pool, const float* plane, const Window& rows, float* line) {
  const int width = pool.width;
  const auto vector = [&](int x) {
    const float* in = plane + static_cast<int64_t>(rows.begin) * width + x;
    const auto read = [&] { return width < kLanes ? load_lanes(in, 0, width) : load(in); };
    Vector v = read();
    for (int i = rows.begin + 1; i < rows.end; ++i) {
      in += width;
      v = combine<kMax>(v, read());
    }
    return v;
  };
  make_row(vector, width, line + pool.op.padding[1]);
}

template <bool kMax, int kStride>
inline void pool_plane(const PlanePool& pool, const float* plane, const float* counts, float* line, float* out) {
  const int64_t stride = pool.op.stride[1];
  std::fill_n(line, pool.line_floats(), kMax ? -kInfinity : 0.0f);
  for (int y = 0; y < pool.out_height; ++y, out += pool.out_width) {
    const Window rows(pool.op, 0, y, pool.height);
    combine_rows_of<kMax>(pool, plane, rows, line);
    const auto vector = [&](int x) {
      const float* first = line + x * stride;
      Vector v = load_strided<kStride>(first, stride);
      for (int tap = 1; tap < pool.op.kernel[1]; ++tap)
        v = combine<kMax>(v, load_strided<kStride>(first + tap, stride));
      return kMax ? v : v / (static_cast<float>(rows.count) * load(counts + x));
    };
    make_row(vector, pool.out_width, out);
  }
}

template <bool kMax>
inline auto plane_kernel(int stride) {
  return stride == 1 ? pool_plane<kMax, 1> : stride == 2 ? pool_plane<kMax, 2> : pool_plane<kMax, 0>;
}

// Planes that are at least as large as a window.
inline void pool_planes(const EpilogueOp& op, const float* in, int64_t planes, int height, int width, int threads,
                        float* out) {
  PlanePool pool{op, height, width, height, width};
  size_after(op, pool.out_height, pool.out_width);
  const auto kernel = pool.is_max() ? plane_kernel<true>(op.stride[1]) : plane_kernel<false>(op.stride[1]);
  thread_local Buffer buffer;
  const size_t line = pool.line_floats(), counted = pool.out_width + kLanes;
  float* counts = buffer.get<float>(counted + threads * line);
  pool.count_columns(counts);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < planes; ++i)
    kernel(pool, in + i * height * width, counts, counts + counted + thread_index() * line,
           out + i * pool.out_height * pool.out_width);
}

}  // namespace SPP_ISA
}  // namespace spp
