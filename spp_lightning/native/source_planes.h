// Copies of input channels into padded source planes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "shapes.h"
#include "vectors.h"

namespace spp {
namespace SPP_ISA {

#ifdef SPP_PIXEL_TILES
constexpr int kVectors = 32 / kLanes;  // two registers of AMX
#else
constexpr int kVectors = 3;  // of a tile of pixels
#endif
constexpr int kTile = kLanes * kVectors;  // pixels

// The elements [begin, end) of a row of `width`, and zeros before and behind them. Element is float, or uint16_t
// for bfloat16.
template <typename Element>
inline void copy_inside(float* out, const Element* in, int begin, int end, int width) {
  if constexpr (kLanes == 16 && std::is_same_v<Element, float>) {
    for (int x = 0; x < width; x += kLanes) {
      const auto lane = [x](int at) { return std::clamp(at - x, 0, kLanes); };
      store_lanes(out + x, load_lanes(in + x, lane(begin), lane(end)), width - x);
    }
    return;
  }
  if (std::max(begin, width - end) <= kLanes && kLanes <= width) {  // a vector covers either end
    store(out, Vector{});
    store(out + width - kLanes, Vector{});
  } else {
    std::fill(out, out + begin, 0.0f);
    std::fill(out + end, out + width, 0.0f);
  }
  copy_row(out + begin, in + begin, end - begin);
}

// Likewise of every stride-th element.
template <typename Element>
inline void copy_strided(float* out, const Element* in, int stride, int begin, int end, int width) {
  std::fill(out, out + begin, 0.0f);
  std::fill(out + end, out + width, 0.0f);
  if (stride == 2) {
    for (int x = begin; x < end; ++x) out[x] = widen(in[2 * x]);
  } else {
    for (int x = begin; x < end; ++x) out[x] = widen(in[static_cast<int64_t>(x) * stride]);
  }
}

// Rows [first, last) of a source plane.
template <typename Element>
inline void copy_plane(const Geometry& g, const SourcePlane& source, const Element* input, int height,
                       int width, const Shapes& s, int first, int last, float* out) {
  const auto [begin, end] = Inside(g, source, width, s);
  for (int y = first; y < last; ++y, out += s.width) {
    const int row = y * g.stride[0] + source.phase[0] - g.padding[0];
    if (row < 0 || row >= height) {
      std::memset(out, 0, sizeof(float) * s.width);
      continue;
    }
    const Element* in = input + static_cast<int64_t>(row) * width + source.phase[1] - g.padding[1];
    if (g.stride[1] == 1) copy_inside(out, in, begin, end, s.width);
    else copy_strided(out, in, g.stride[1], begin, end, s.width);
  }
}

// A thread's part of an image's source planes; `input` is the image.
template <typename Element>
inline void copy_sources(const Plan& plan, const KernelConfig& config, const Shapes& s,
                         const Element* input, const Partition& part, float* sources) {
  const int count = static_cast<int>(plan.sources.size());
  for (int i = part.begin(count); i < part.end(count); ++i)
    copy_plane(plan.geometry, plan.sources[i], input + plan.sources[i].channel * s.input_plane,
               config.height, config.width, s, 0, s.height, sources + i * s.source_plane);
}

}  // namespace SPP_ISA
}  // namespace spp
