// Activation functions of a vector. Errors against exact numbers are a few units in the last place of the larger of
// result and input; tests/compaction/kernels/test_activations.py says how many. A NaN stays a NaN.
#pragma once

#include "geometry.h"
#include "vectors.h"

namespace spp {
namespace SPP_ISA {

// e^x = 2^n · e^r with |r| ≤ ln(2) / 2, by Cephes' polynomial. Infinite from 88.4 on, and not below e^-87.
inline Vector exponential(Vector x) {
  constexpr float kRounding = 12582912.0f;  // 1.5 · 2^23: numbers of its size have no fraction
  x = clamp(x, -87.0f, 89.0f);
  const Vector shifted = x * 1.44269504f + kRounding, n = shifted - kRounding;
  const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Words power = (reinterpret_cast<Words>(shifted) << 23) + 0x3f800000u;
  return (p * (r * r) + r + 1.0f) * reinterpret_cast<Vector>(power);
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

inline Vector hardsigmoid(Vector x) { return clamp(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f); }

// x · Φ(x), where Φ(-|x|) = erfc(|x| / √2) / 2 = t · e^(-x² / 2 + p(t)) / 2. The polynomial is that of Numerical
// Recipes' erfcc.
inline Vector gelu(Vector x) {
  const Vector z = (x < 0.0f ? -x : x) * 0.707106781f;
  const Vector t = 1.0f / (z * 0.5f + 1.0f);
  Vector p = t * 0.17087277f - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const Vector tail = t * 0.5f * exponential(p - z * z);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

inline Vector gelu_tanh(Vector x) {
  return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
}

// As types: the pointers that lambdas convert to would be functions of another instruction set.
struct Sigmoid { Vector operator()(Vector x) const { return sigmoid(x); } };
struct Silu { Vector operator()(Vector x) const { return x / (1.0f + exponential(-x)); } };
struct Hardsigmoid { Vector operator()(Vector x) const { return hardsigmoid(x); } };
struct Hardswish { Vector operator()(Vector x) const { return x * hardsigmoid(x); } };
struct Gelu { Vector operator()(Vector x) const { return gelu(x); } };
struct GeluTanh { Vector operator()(Vector x) const { return gelu_tanh(x); } };

template <typename Function>
inline void apply_to_row(const Function& function, float* row, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(row + i, function(load(row + i)));
}

// In place; `count` is a multiple of kLanes.
inline void activate_row(Activation kind, float* row, int64_t count) {
  switch (kind) {
    case Activation::kNone: return;
    case Activation::kSigmoid: return apply_to_row(Sigmoid(), row, count);
    case Activation::kSilu: return apply_to_row(Silu(), row, count);
    case Activation::kHardsigmoid: return apply_to_row(Hardsigmoid(), row, count);
    case Activation::kHardswish: return apply_to_row(Hardswish(), row, count);
    case Activation::kGelu: return apply_to_row(Gelu(), row, count);
    case Activation::kGeluTanh: return apply_to_row(GeluTanh(), row, count);
  }
}

}  // namespace SPP_ISA
}  // namespace spp
