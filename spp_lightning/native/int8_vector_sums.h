// The micro-kernel of vectors: sums of a few filters by a few vectors of pixels stay in registers.
#pragma once

#include <array>
#include <utility>

#include "int8_task.h"

namespace spp {
namespace SPP_ISA {

constexpr bool kAddsOffsetLast = false;  // a sum starts with its offset

// What a thread needs while it computes: nothing.
struct KernelRegisters {};

// kAtOnce: steps whose products meet in int16, or 1.
template <int kFilters, int kV, int kAtOnce>
SPP_INLINE void add_steps(const int32_t* weight, const int32_t* panel, int steps, Sums (&sum)[kFilters][kV]) {
  for (int k = 0; k < steps; k += kAtOnce, weight += kAtOnce * kInt8TileFilters, panel += kAtOnce * kTile) {
#pragma GCC unroll 8
    for (int r = 0; r < kFilters; ++r) {
      const Sums w = broadcast(weight[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        const Sums x = load(panel + v * kLanes);
        if constexpr (kAtOnce == 1)
          sum[r][v] = add_products(sum[r][v], x, w);
        else
          sum[r][v] = add_two_products(sum[r][v], x, w, load(panel + kTile + v * kLanes),
                                       broadcast(weight[kInt8TileFilters + r]));
      }
    }
  }
}

// The parts [first, last) of a tile of pixels, kV vectors each, and kFilters filters at a time: of full tiles of
// filters, or of the one that has fewer.
template <int kFilters, int kV, int kAtOnce>
void sum_parts(const Int8Task& task, int first, int last) {
  const int32_t* weight = task.weight;
  for (int f = 0; f < task.filters; f += kFilters, weight += task.steps * kInt8TileFilters)
    for (int part = first; part < last; ++part) {
      int32_t* sums = task.sums + f * kTile + part * kPart;
      Sums sum[kFilters][kV];
#pragma GCC unroll 8
      for (int r = 0; r < kFilters; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v)
          sum[r][v] = task.first ? broadcast(task.offset[f + r]) : load(sums + r * kTile + v * kLanes);
      add_steps<kFilters, kV, kAtOnce>(weight, task.panel + part * kPart, task.steps, sum);
#pragma GCC unroll 8
      for (int r = 0; r < kFilters; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) store(sums + r * kTile + v * kLanes, sum[r][v]);
    }
}

using SumParts = void (*)(const Int8Task&, int first, int last);

// By filters and vectors of pixels, both counted from 1.
struct SumFunctions {
  SumParts by_size[kInt8TileFilters * kVectors];
};
template <int kAtOnce, size_t... i>
constexpr SumFunctions sum_functions(std::index_sequence<i...>) {
  return {{sum_parts<i / kVectors + 1, i % kVectors + 1, kAtOnce>...}};
}
constexpr auto kSizes = std::make_index_sequence<kInt8TileFilters * kVectors>();
constexpr SumFunctions kSumOne = sum_functions<1>(kSizes), kSumTwo = sum_functions<kSumsInInt16 ? 2 : 1>(kSizes);

// All pixels of a tile: whole parts, and one of fewer vectors. `filters` are computed together.
inline void sum_pixels(const Int8Task& task, int filters) {
  const SumParts* functions = (task.steps_at_once == 2 ? kSumTwo : kSumOne).by_size + (filters - 1) * kVectors - 1;
  const int whole = task.pixels / kPart, vectors = (task.pixels % kPart + kLanes - 1) / kLanes;
  if (whole > 0) functions[kVectors](task, 0, whole);
  if (vectors > 0) functions[vectors](task, whole, whole + 1);
}

// Where a vector would have at most so many pixels, its lanes are the filters of a tile instead.
constexpr int kFewPixels = kInt8TileFilters * 2 / 3;

// kPixels pixels from `first` on, and all filters of a task. Lanes without a filter of the tile aren't stored.
template <int kPixels, int kAtOnce>
void sum_few_pixels(const Int8Task& task, int first) {
  const int32_t* weight = task.weight;
  for (int f = 0; f < task.filters; f += kInt8TileFilters) {
    Sums sum[kPixels] = {};
    const int32_t* x = task.panel + first;
    for (int k = 0; k < task.steps; k += kAtOnce, weight += kAtOnce * kInt8TileFilters, x += kAtOnce * kTile) {
      const Sums w = load(weight);
#pragma GCC unroll 4
      for (int p = 0; p < kPixels; ++p) {
        if constexpr (kAtOnce == 1)
          sum[p] = add_products(sum[p], broadcast(x[p]), w);
        else
          sum[p] = add_two_products(sum[p], broadcast(x[p]), w, broadcast(x[kTile + p]), load(weight + kInt8TileFilters));
      }
    }
    for (int p = 0; p < kPixels; ++p) {
      int32_t lanes[kLanes];
      store(lanes, sum[p]);
      for (int r = 0; r < std::min(kInt8TileFilters, task.filters - f); ++r) {
        int32_t& to = task.sums[(f + r) * kTile + first + p];
        to = lanes[r] + (task.first ? task.offset[f + r] : to);
      }
    }
  }
}

template <int kAtOnce, size_t... i>
constexpr auto few_functions(std::index_sequence<i...>) {
  using Function = void (*)(const Int8Task&, int);
  return std::array<Function, kFewPixels>{sum_few_pixels<i + 1, kAtOnce>...};
}
constexpr auto kPixelCounts = std::make_index_sequence<kFewPixels>();
constexpr auto kFewOne = few_functions<1>(kPixelCounts), kFewTwo = few_functions<kSumsInInt16 ? 2 : 1>(kPixelCounts);

// All filters of a task: full tiles of them, and one of fewer. It moves `weight` and `offset`: a copy of the task, which
// was just written, would wait for its parts.
inline void sum_filters(Int8Task& task) {
  int32_t* const sums = task.sums;
  const int pixels = task.pixels, few = pixels % kLanes;
  if (few > 0 && few <= kFewPixels) {
    task.pixels -= few;
    (task.steps_at_once == 2 ? kFewTwo : kFewOne)[few - 1](task, task.pixels);
  }
  const int filters = task.filters, rest = filters % kInt8TileFilters;
  task.filters -= rest;
  if (task.filters > 0) sum_pixels(task, kInt8TileFilters);
  if (rest > 0) {
    task.weight += static_cast<size_t>(task.filters) * task.steps;
    task.offset += task.filters;
    task.sums += task.filters * kTile;
    task.filters = rest;
    sum_pixels(task, rest);
  }
  task.sums = sums;
  task.filters = filters;
  task.pixels = pixels;
}

// Adds what the weights lack.
inline void add_excess(const Int8Task& task) {
  for (const Excess* it = task.excess; it != task.excess_end; ++it) {
    const int32_t* panel = task.panel + it->step * kTile;
    int32_t* sums = task.sums + it->filter * kTile;
    const Sums w = broadcast(it->word);
    const auto add = [&](int v) { store(sums + v, add_products(load(sums + v), load(panel + v), w)); };
    if (task.pixels <= kPart) {
      for (int v = 0; v < task.pixels; v += kLanes) add(v);
      continue;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kTile; v += kLanes) add(v);
  }
}

}  // namespace SPP_ISA
}  // namespace spp
