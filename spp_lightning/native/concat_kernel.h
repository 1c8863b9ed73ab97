// Concatenations along the channels, and sums of two tensors.
#pragma once

#include <cstring>

#include "geometry.h"
#include "vectors.h"

namespace spp {
namespace SPP_ISA {

constexpr int64_t kNumbersAlone = 1 << 15;  // that a thread moves sooner than others can be woken

// Parts that lie where they belong already are left there.
inline void concat_parts(const ConcatPart* parts, int count, int64_t batch, int64_t pixels, int threads, float* out) {
  int64_t channels = 0;
  for (int i = 0; i < count; ++i) channels += parts[i].channels;
  const bool shared = threads > 1 && batch > 1 && batch * channels * pixels > kNumbersAlone;
#pragma omp parallel for num_threads(threads) if (shared)
  for (int64_t image = 0; image < batch; ++image) {
    float* to = out + image * channels * pixels;
    for (int i = 0; i < count; ++i) {
      const int64_t numbers = parts[i].channels * pixels;
      const float* from = parts[i].data + image * numbers;
      if (from != to) std::memcpy(to, from, numbers * sizeof(float));
      to += numbers;
    }
  }
}

inline void add(const float* x, const float* y, int64_t count, int threads, float* out) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > kNumbersAlone)
  for (int64_t i = 0; i < count / kLanes; ++i) store(out + i * kLanes, load(x + i * kLanes) + load(y + i * kLanes));
  for (int64_t i = count / kLanes * kLanes; i < count; ++i) out[i] = x[i] + y[i];
}

}  // namespace SPP_ISA
}  // namespace spp
