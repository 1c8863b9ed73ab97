// The micro-kernel of vectors: sums of a few filters by a few vectors of pixels stay in registers.
#pragma once

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

// All filters of a task: full tiles of them, and one of fewer. It moves `weight` and `offset`: a copy of the task, which
// was just written, would wait for its parts.
inline void sum_filters(Int8Task& task) {
  int32_t* const sums = task.sums;
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
}

// Adds what the weights lack.
inline void add_excess(const Int8Task& task) {
  for (const Excess* it = task.excess; it != task.excess_end; ++it) {
    const int32_t* panel = task.panel + it->step * kTile;
    int32_t* sums = task.sums + it->filter * kTile;
    const Sums w = broadcast(it->word);
#pragma GCC unroll 8
    for (int v = 0; v < kTile; v += kLanes) store(sums + v, add_products(load(sums + v), load(panel + v), w));
  }
}

}  // namespace SPP_ISA
}  // namespace spp
