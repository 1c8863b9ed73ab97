// Epilogue operations and their gradients, on a channel block: rows of (pixel, channel). Pools and norms need no
// shuffles, since neighbouring pixels are vectors.
#pragma once

#include "standard.h"
#include "vectors.h"

namespace spp {
namespace SPP_ISA {

// ---- Pools ----

template <bool kMax>
inline Vector combine(Vector a, Vector b) {
  return kMax ? maximum(a, b) : a + b;
}

// The part [begin, end) of a window along one axis that lies inside the image, and how many pixels an average
// counts along it.
struct Window {
  int begin, end, count;

  Window(const EpilogueOp& op, int axis, int place, int size) {
    const int start = place * op.stride[axis] - op.padding[axis];
    begin = std::max(start, 0);
    end = std::max(begin, std::min(start + op.kernel[axis], size));
    count = end - begin;
    if (op.count_include_pad) count = std::min(start + op.kernel[axis], size + op.padding[axis]) - start;
  }
};

// line = the rows, combined one after the other.
template <bool kMax, typename Row>
inline void combine_rows(const Row& row, const Window& rows, int floats, float* line) {
  if (rows.begin == rows.end) std::fill_n(line, floats, kMax ? -kInfinity : 0.0f);
  constexpr int kAtOnce = 3;
  for (int i = rows.begin; i < rows.end; i += kAtOnce) {
    const int count = std::min(kAtOnce, rows.end - i);
    const float* in[kAtOnce];
    for (int n = 0; n < kAtOnce; ++n) in[n] = row(i + std::min(n, count - 1));
    for (int x = 0; x < floats; x += kLanes) {
      Vector v = load(in[0] + x);
      if (i > rows.begin) v = combine<kMax>(load(line + x), v);
      if (count > 1) v = combine<kMax>(v, load(in[1] + x));
      if (count > 2) v = combine<kMax>(v, load(in[2] + x));
      store(line + x, v);
    }
  }
}

// A row of a pool whose windows are two or three pixels wide and two apart, without padding: the pixel that two
// windows share stays in a register. `in` are kRows rows.
template <bool kMax, int kRows>
inline void pool_row_by_two(const EpilogueOp& op, const float* const* in, int rows, int width, int out_width,
                            float* out) {
  const bool three = op.kernel[1] == 3;
  for (int part = 0; part < kChannelBlock; part += kLanes) {
    const auto down = [&](int x) {
      Vector v = load(in[0] + x * kChannelBlock + part);
#pragma GCC unroll 2
      for (int i = 1; i < kRows; ++i) v = combine<kMax>(v, load(in[i] + x * kChannelBlock + part));
      return v;
    };
    Vector first = down(0);
    for (int x = 0; x < out_width; ++x) {
      const int left = 2 * x;
      Vector v = first;
      if (left + 1 < width) v = combine<kMax>(v, down(left + 1));
      if (left + 2 < width) {
        first = down(left + 2);
        if (three) v = combine<kMax>(v, first);
      }
      if (!kMax) v /= static_cast<float>(rows) * static_cast<float>(Window(op, 1, x, width).count);
      store(out + x * kChannelBlock + part, v);
    }
  }
}

// Row y of a pool: down the columns, then along the row.
template <bool kMax, typename Row>
inline void pool_row(const EpilogueOp& op, const Row& row, int height, int width, int y, float* out) {
  const Window rows(op, 0, y, height);
  const int out_width = pool_size(width, op.kernel[1], op.stride[1], op.padding[1], op.ceil_mode);
  const int taps = op.kernel[1], count = rows.end - rows.begin;
  if (op.stride[1] == 2 && (taps == 2 || taps == 3) && op.padding[1] == 0 && count >= 1 && count <= 3) {
    const float* in[3];
    for (int i = 0; i < count; ++i) in[i] = row(rows.begin + i);
    const auto pool = count == 3   ? pool_row_by_two<kMax, 3>
                      : count == 2 ? pool_row_by_two<kMax, 2>
                                   : pool_row_by_two<kMax, 1>;
    return pool(op, in, rows.count, width, out_width, out);
  }
  thread_local Buffer line_buffer;
  float* line = line_buffer.get<float>(static_cast<size_t>(width) * kChannelBlock);
  combine_rows<kMax>(row, rows, width * kChannelBlock, line);
  for (int x = 0; x < out_width; ++x, out += kChannelBlock) {
    const Window columns(op, 1, x, width);
    const float number = static_cast<float>(rows.count) * static_cast<float>(columns.count);
#pragma GCC unroll 4
    for (int part = 0; part < kChannelBlock; part += kLanes) {
      const float* at = line + part;
      Vector v = columns.begin < columns.end ? load(at + columns.begin * kChannelBlock)
                                             : broadcast(kMax ? -kInfinity : 0.0f);
      for (int i = columns.begin + 1; i < columns.end; ++i)
        v = combine<kMax>(v, load(at + i * kChannelBlock));
      store(out + part, kMax ? v : v / number);
    }
  }
}

// What a window still has to give goes to the first of its largest pixels; of an average, to each.
template <bool kMax>
inline Vector take(Vector& rest, Vector value, Vector most) {
  if (!kMax) return rest;
  const Bits is_most = value == most;
  const Vector given = masked(rest, is_most);
  rest = masked(rest, ~is_most);
  return given;
}

template <bool kMax>
inline void pool_gradient(const EpilogueOp& op, const float* in, const float* grad, int height, int width,
                          float* out) {
  int out_height = height, out_width = width;
  size_after(op, out_height, out_width);
  std::fill_n(out, static_cast<int64_t>(height) * width * kChannelBlock, 0.0f);
  for (int y = 0; y < out_height; ++y) {
    const Window rows(op, 0, y, height);
    for (int x = 0; x < out_width; ++x, grad += kChannelBlock) {
      const Window columns(op, 1, x, width);
      const float number = static_cast<float>(rows.count) * static_cast<float>(columns.count);
      for (int part = 0; part < kChannelBlock; part += kLanes) {
        const auto each_pixel = [&](const auto& use) {
          for (int i = rows.begin; i < rows.end; ++i)
            for (int j = columns.begin; j < columns.end; ++j)
              use((static_cast<int64_t>(i) * width + j) * kChannelBlock + part);
        };
        Vector rest = load(grad + part), most = broadcast(-kInfinity);
        if (kMax) each_pixel([&](int64_t at) { most = maximum(most, load(in + at)); });
        else rest /= number;
        each_pixel([&](int64_t at) {
          store(out + at, load(out + at) + take<kMax>(rest, load(in + at), most));
        });
      }
    }
  }
}

// ---- The local response norm ----

// s^(-3/4), for s ≥ 1.
inline Vector inverse_three_quarters(Vector s) {
#if SPP_LANES == 4
  for (int i = 0; i < kLanes; ++i) s[i] = 1.0f / std::sqrt(s[i] * std::sqrt(s[i]));
  return s;
#else
  // Beyond 1e25 what is below would overflow; 0 is right there, and a NaN stays one.
  const Bits large = s > 1e25f;
#if SPP_LANES == 16
  // s^(-1/2) squared, times s^(1/4), each to 14 bits: no square root, which takes several times as
  // long. A step of Newton's method for y^(-4) = s^3 doubles the bits.
  const Vector root = _mm512_rsqrt14_ps(s);
  Vector r = root * root * Vector(_mm512_rsqrt14_ps(root));
  const Vector t = s * r;
  r *= 1.25f - 0.25f * (t * t) * (t * r);
#else
  const Vector q = s * Vector(_mm256_sqrt_ps(s));
  Vector r = _mm256_rsqrt_ps(q);  // 12 bits; Newton's method doubles them
  r *= 1.5f - 0.5f * q * r * r;
#endif
  return masked(r, ~large);
#endif
}

// Calls use(at, sum) for every vector of row y, with the sums of value(row, at) over the size × size pixels
// around it: down the columns, then along the row.
template <typename Value, typename Use>
inline void sum_windows(int size, int height, int width, int y, const Value& value, const Use& use) {
  const int half = size / 2, above = std::max(y - half, 0), below = std::min(y - half + size, height);
  const auto down = [&](int at) {
    Vector v{};  // from 0 on: each product is rounded together with the sum
    v += value(above, at);
    if (above + 1 < below) v += value(above + 1, at);
    if (above + 2 < below) v += value(above + 2, at);
    for (int i = above + 3; i < below; ++i) v += value(i, at);
    return v;
  };
  if (size == 3) {  // the sums of three columns stay in registers
    for (int part = 0; part < kChannelBlock; part += kLanes) {
      Vector left{}, middle = down(part);
      for (int x = 0; x < width; ++x) {
        const int at = x * kChannelBlock + part;
        const Vector right = x + 1 < width ? down(at + kChannelBlock) : Vector{};
        use(at, left + middle + right);
        left = middle;
        middle = right;
      }
    }
    return;
  }
  thread_local Buffer sum_buffer;
  float* sums = sum_buffer.get<float>(static_cast<size_t>(width) * kChannelBlock);
  for (int at = 0; at < width * kChannelBlock; at += kLanes) store(sums + at, down(at));
  for (int x = 0; x < width; ++x) {
    const int begin = std::max(x - half, 0), end = std::min(x - half + size, width);
    for (int part = 0; part < kChannelBlock; part += kLanes) {
      Vector v = load(sums + begin * kChannelBlock + part);
      for (int i = begin + 1; i < end; ++i) v += load(sums + i * kChannelBlock + part);
      use(x * kChannelBlock + part, v);
    }
  }
}

inline float scale_of(const EpilogueOp& op) {
  return op.alpha / static_cast<float>(op.kernel[0] * op.kernel[0]);
}

template <typename Row>
inline void norm_row(const EpilogueOp& op, const Row& row, int height, int width, int y, float* out) {
  thread_local Buffer rows_buffer;
  const int size = op.kernel[0], above = std::max(y - size / 2, 0);
  const float** rows = rows_buffer.get<const float*>(size);
  for (int i = above; i < std::min(y - size / 2 + size, height); ++i) rows[i - above] = row(i);
  const float scale = scale_of(op), *in = row(y);
  sum_windows(size, height, width, y,
              [&](int i, int at) { return load(rows[i - above] + at) * load(rows[i - above] + at); },
              [&](int at, Vector sum) {
                store(out + at, load(in + at) * inverse_three_quarters(scale * sum + 1.0f));
              });
}

// With s = 1 + scale · Σ x², y = x · s^(-3/4), and g the gradient of y:
// dx = g · s^(-3/4) - 3/2 · scale · x · Σ g · x · s^(-7/4), the sum over the same window.
inline void norm_gradient(const EpilogueOp& op, const float* in, const float* grad, int height, int width,
                          float* out) {
  thread_local Buffer weighted_buffer;
  const int64_t pitch = static_cast<int64_t>(width) * kChannelBlock;
  float* weighted = weighted_buffer.get<float>(height * pitch);
  const float scale = scale_of(op);
  for (int y = 0; y < height; ++y)
    sum_windows(op.kernel[0], height, width, y,
                [&](int i, int at) { return load(in + i * pitch + at) * load(in + i * pitch + at); },
                [&](int at, Vector sum) {
                  const int64_t here = y * pitch + at;
                  const Vector s = scale * sum + 1.0f, g = load(grad + here) * inverse_three_quarters(s);
                  store(out + here, g);
                  store(weighted + here, g * load(in + here) / s);
                });
  for (int y = 0; y < height; ++y)
    sum_windows(op.kernel[0], height, width, y, [&](int i, int at) { return load(weighted + i * pitch + at); },
                [&](int at, Vector sum) {
                  const int64_t here = y * pitch + at;
                  store(out + here, load(out + here) - 1.5f * scale * load(in + here) * sum);
                });
}

// ---- Any operation ----

// Row y of the output; row(i) is a row of the input, of which there are `height` of `width` pixels.
template <typename Row>
inline void epilogue_row(const EpilogueOp& op, const Row& row, int height, int width, int y, float* out) {
  if (op.kind == EpilogueKind::kMaxPool) pool_row<true>(op, row, height, width, y, out);
  else if (op.kind == EpilogueKind::kAveragePool) pool_row<false>(op, row, height, width, y, out);
  else norm_row(op, row, height, width, y, out);
}

inline void op_gradient(const EpilogueOp& op, const float* in, const float* grad, int height, int width,
                        float* out) {
  if (op.kind == EpilogueKind::kMaxPool) pool_gradient<true>(op, in, grad, height, width, out);
  else if (op.kind == EpilogueKind::kAveragePool) pool_gradient<false>(op, in, grad, height, width, out);
  else norm_gradient(op, in, grad, height, width, out);
}

}  // namespace SPP_ISA
}  // namespace spp
