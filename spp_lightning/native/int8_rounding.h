// Floats rounded to uint8, in plain loops, which compilers vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "checks.h"

namespace spp {

constexpr float kRounds = 12582912.0f;  // 1.5 · 2²³: a sum with it is rounded to an integer, halves to the even one
constexpr int32_t kRoundsBits = 0x4B400000;

// `in`, times `inverse` and plus `zero`. A NaN becomes the least number.
inline void round_block(const float* in, int64_t count, float inverse, int zero, uint8_t* out) {
  const float low = static_cast<float>(-zero), high = static_cast<float>(255 - zero);
  for (int64_t i = 0; i < count; ++i) {
    float steps = in[i] * inverse;
    steps = steps > low ? steps : low;
    steps = (steps < high ? steps : high) + kRounds;
    int32_t bits;
    std::memcpy(&bits, &steps, sizeof bits);
    out[i] = static_cast<uint8_t>(bits - kRoundsBits + zero);
  }
}

inline void check_rounding(float inverse, int32_t zero) {
  check(std::isfinite(inverse) && inverse > 0, "The inverse of the scale must be finite and positive.");
  check(zero >= 0 && zero <= 255, "The zero point must be in [0, 255].");
}

}  // namespace spp
