// What the parts of the sanitizers' driver share: random numbers, tensors of exact size, and failures.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "geometry.h"

extern "C" const char* spp_error();

inline std::mt19937 generator(1);

inline int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// A tensor in memory that ends where it ends, and holds no number before it is written; or none.
template <typename Number>
struct Tensor {
  std::unique_ptr<Number[]> data;
  int64_t count = 0;

  Tensor() = default;
  explicit Tensor(size_t size) : data(new Number[size]), count(static_cast<int64_t>(size)) {}
  Number* get() const { return data.get(); }
  Number& operator[](size_t i) const { return data[i]; }
  explicit operator bool() const { return data != nullptr; }
};
using Floats = Tensor<float>;
using Halves = Tensor<uint16_t>;
inline int failures = 0;

inline void must(int32_t status) {
  if (status != 0) std::printf("status %d: %s\n", status, spp_error()), ++failures;
}

// What doesn't fit is refused, and nothing is read or written.
inline void must_refuse(int32_t status) {
  if (status != 2) std::printf("status %d, but a tensor doesn't fit\n", status), ++failures;
}

// Each of the columns with a chance of `share`.
inline std::vector<int32_t> some_columns(int all, double share) {
  std::vector<int32_t> columns;
  for (int k = 0; k < all; ++k)
    if (std::uniform_real_distribution<>(0, 1)(generator) < share) columns.push_back(k);
  columns.shrink_to_fit();
  return columns;
}

// In sanitize_int8.cpp: random shapes by an int8 kernel; false if this machine hasn't got it.
bool run_int8(const char* isa, int cases);
// In sanitize_int8_planes.cpp: what stands between int8 layers.
void run_int8_planes();
