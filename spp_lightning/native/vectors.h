// Vectors of SPP_LANES numbers, and what the kernels do to their lanes.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "isa.h"

namespace spp {
namespace SPP_ISA {

// Whether large outputs are written by non-temporal stores, which need no line of the cache. Not with fewer
// lanes, where a pixel-vectorised tile ends in the middle of a line. Tests define this as 1 for all instruction sets.
#ifndef SPP_STORES_NON_TEMPORAL
#define SPP_STORES_NON_TEMPORAL (SPP_LANES == 16)
#endif
constexpr bool kStoresNonTemporal = SPP_STORES_NON_TEMPORAL;

constexpr int kLanes = SPP_LANES;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

typedef int32_t Bits __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

typedef uint32_t Words __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

// A vector of the output. A non-temporal store needs an aligned address, and other threads see it after
// finish_stores().
inline void store_output(float* p, Vector v, [[maybe_unused]] bool non_temporal) {
#if SPP_LANES == 16
  if (kStoresNonTemporal && non_temporal) return _mm512_stream_ps(p, v);
#elif SPP_LANES == 8
  if (kStoresNonTemporal && non_temporal) return _mm256_stream_ps(p, v);
#endif
  store(p, v);
}

inline void finish_stores() {
#if SPP_LANES > 4
  if (kStoresNonTemporal) _mm_sfence();
#endif
}

// One number in all lanes. Compilers drop the subtraction of 0; a sum with 0 they would compute, since it makes
// -0 a 0.
inline Vector broadcast(float x) { return x - Vector{}; }

// Zeros where the mask has them.
inline Vector masked(Vector x, Bits mask) {
  return reinterpret_cast<Vector>(reinterpret_cast<Bits>(x) & mask);
}

// Limits; a NaN stays a NaN.
inline Vector not_below(Vector x, float low) {
  const Vector least = broadcast(low);
#if SPP_LANES == 16
  return _mm512_max_ps(least, x);
#elif SPP_LANES == 8
  return _mm256_max_ps(least, x);
#else
  return x < least ? least : x;
#endif
}

inline Vector not_above(Vector x, float high) {
  const Vector most = broadcast(high);
#if SPP_LANES == 16
  return _mm512_min_ps(most, x);
#elif SPP_LANES == 8
  return _mm256_min_ps(most, x);
#else
  return x > most ? most : x;
#endif
}

inline Vector clamp(Vector x, float low, float high) { return not_above(not_below(x, low), high); }

// The larger numbers; NaN where either is one.
inline Vector maximum(Vector a, Vector b) {
#if SPP_LANES == 16
  // Of two operands of which one is a NaN, max_ps takes the second.
  return _mm512_mask_max_ps(b, _mm512_cmp_ps_mask(b, b, _CMP_ORD_Q), b, a);
#elif SPP_LANES == 8
  return _mm256_blendv_ps(_mm256_max_ps(b, a), b, _mm256_cmp_ps(b, b, _CMP_UNORD_Q));
#else
  const Vector larger = a < b ? b : a;  // a NaN of `a` stays, since the comparison fails
  return b == b ? larger : b;
#endif
}

// The lanes of two vectors one after the other, of which some are picked.
#if defined(__clang__) || __GNUC__ >= 12
#define SPP_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SPP_PICK(a, b, ...) __builtin_shuffle(a, b, Bits{__VA_ARGS__})
#endif

// The lanes of two vectors, alternating.
inline void interleave(Vector a, Vector b, Vector& first, Vector& second) {
#if SPP_LANES == 16
  first = SPP_PICK(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  second = SPP_PICK(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31);
#elif SPP_LANES == 8
  first = SPP_PICK(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  second = SPP_PICK(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  first = SPP_PICK(a, b, 0, 4, 1, 5);
  second = SPP_PICK(a, b, 2, 6, 3, 7);
#endif
}

// Two vectors of what lies at p: the even numbers, and the odd ones.
inline void load_alternating(const float* p, Vector& even, Vector& odd) {
#if SPP_LANES == 8
  // Halves that are put together when they are loaded leave one instruction for either result.
  const __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 8), 1);
  const __m256 b = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 4)), _mm_loadu_ps(p + 12), 1);
  even = _mm256_shuffle_ps(a, b, 0x88);
  odd = _mm256_shuffle_ps(a, b, 0xdd);
#else
  const Vector a = load(p), b = load(p + kLanes);
#if SPP_LANES == 16
  even = SPP_PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  odd = SPP_PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  even = SPP_PICK(a, b, 0, 2, 4, 6);
  odd = SPP_PICK(a, b, 1, 3, 5, 7);
#endif
#endif
}

// Copies `count` numbers, fewer than a vector, in pieces of constant length: no call of memcpy.
inline void copy_few(float* out, const float* in, int count) {
#pragma GCC unroll 4
  for (int n = kLanes / 2; n > 0; n /= 2)
    if (count & n) {
      std::memcpy(out, in, sizeof(float) * n);
      out += n;
      in += n;
    }
}

// Copies a row; memcpy takes longer for rows of a few vectors than the copy itself.
inline void copy_row(float* out, const float* in, int count) {
  if (count < kLanes) {
    copy_few(out, in, count);
    return;
  }
  int done = 0;
  for (; done + 4 * kLanes <= count; done += 4 * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store(out + done + i * kLanes, load(in + done + i * kLanes));
  for (; done + kLanes < count; done += kLanes) store(out + done, load(in + done));
  store(out + count - kLanes, load(in + count - kLanes));  // may overlap the one before
}

// bfloat16 is the upper half of a float.
inline float widen(uint16_t half) {
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}
inline float widen(float x) { return x; }

inline void copy_row(float* out, const uint16_t* in, int64_t count) {
  int64_t done = 0;
  for (; done + kLanes <= count; done += kLanes) {
    const Halves halves = *reinterpret_cast<const Halves*>(in + done);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    store(out + done, reinterpret_cast<Vector>(words));
  }
  for (; done < count; ++done) out[done] = widen(in[done]);
}

// Rounded to the nearest, to the even one of two; a NaN stays one.
inline Halves narrow(Vector x) {
  const Words words = reinterpret_cast<Words>(x), odd = words >> 16 & 1;
  const Words rounded = words + 0x7fff + odd, nan = words | 0x400000;
  const Words is_number = reinterpret_cast<Words>(x == x);
  return __builtin_convertvector(((rounded & is_number) | (nan & ~is_number)) >> 16, Halves);
}

inline void narrow_row(uint16_t* out, const float* in, int64_t count) {
  int64_t done = 0;
  for (; done + kLanes <= count; done += kLanes)
    *reinterpret_cast<Halves*>(out + done) = narrow(load(in + done));
  for (; done < count; ++done) out[done] = narrow(broadcast(in[done]))[0];
}

// Two columns of bfloat16 in the place of one: of every lane the first in its lower half.
inline Vector pair_up(Vector first, Vector second) {
  return reinterpret_cast<Vector>(reinterpret_cast<Words>(first) >> 16 |
                                  (reinterpret_cast<Words>(second) & 0xffff0000u));
}

// sum + first · the pair's first weight + second · its second.
#if defined(SPP_BFLOAT16) && !defined(SPP_PIXEL_TILES)
inline Vector add_pair_products(Vector sum, Vector pairs, const float* weights) {
  uint32_t word;
  std::memcpy(&word, weights, sizeof word);
  const Words w = Words{} + word;
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pairs), reinterpret_cast<__m512bh>(w));
}
#else
Vector add_pair_products(Vector sum, Vector pairs, const float* weights);
#endif

// The lanes [begin, end) of what lies at p, and zeros; the others aren't read.
inline Vector load_lanes(const float* p, int begin, int end) {
#if SPP_LANES == 16
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << end) - (1u << begin)), p);
#else
  if (end - begin == kLanes) return load(p);
  float part[kLanes] = {};
  if (begin < end) copy_few(part + begin, p + begin, end - begin);
  return load(part);
#endif
}

// Stores the first `count` lanes.
inline void store_lanes(float* out, Vector v, int count) {
  if (count >= kLanes) {
    store(out, v);
    return;
  }
#if SPP_LANES == 16
  _mm512_mask_storeu_ps(out, static_cast<__mmask16>((1u << count) - 1), v);
#else
  float part[kLanes];
  store(part, v);
  copy_few(out, part, count);
#endif
}

}  // namespace SPP_ISA
}  // namespace spp
