// Vectors of the int8 kernel: sums of int32, the products that are added to them, and what turns them into outputs.
//
// SPP_LANES are the sums of a vector. A word of 32 bits has the pixels, or the weights, of a few columns: two of
// int16, or with SPP_INT8_QUADS four of 8 bits, pixels without and weights with a sign. The instructions that multiply
// them are SPP_INT8_VNNI of AVX-512 or AVX, PMADDWD of SSE2 or AVX2, or loops that compute the same numbers: where a
// processor lacks an instruction, tests run all the rest.
//
// Floats are rounded once per operation: the files of this kernel are compiled without contraction to fused
// multiply-adds, so that all instruction sets make the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace spp {
namespace SPP_ISA {

#ifdef SPP_INT8_QUADS
constexpr int kColumnsAtOnce = 4;
#else
constexpr int kColumnsAtOnce = 2;
#endif

constexpr int kLanes = SPP_LANES;
constexpr int kPackPixels = 16;  // pixels that are packed at once

#define SPP_INLINE inline __attribute__((always_inline))

typedef int32_t Sums __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float Floats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint8_t LaneBytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(kPackPixels), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kPackPixels), aligned(1), may_alias));
typedef uint16_t WideHalves __attribute__((vector_size(2 * kPackPixels), aligned(1), may_alias));

SPP_INLINE Sums broadcast(int32_t x) { return x - Sums{}; }
SPP_INLINE Floats broadcast(float x) { return x - Floats{}; }
SPP_INLINE Sums load(const int32_t* p) { return *reinterpret_cast<const Sums*>(p); }
SPP_INLINE void store(int32_t* p, Sums x) { *reinterpret_cast<Sums*>(p) = x; }

// sum + Σ pixels · weights over the columns of a word.
SPP_INLINE Sums add_products(Sums sum, Sums pixels, Sums weights) {
#if defined(SPP_INT8_QUADS) && defined(SPP_INT8_VNNI) && SPP_LANES == 16
  return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(pixels),
                                                    reinterpret_cast<__m512i>(weights)));
#elif defined(SPP_INT8_QUADS) && defined(SPP_INT8_VNNI)
  return reinterpret_cast<Sums>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(pixels), reinterpret_cast<__m256i>(weights)));
#elif defined(SPP_INT8_QUADS)
  for (int shift = 0; shift < 32; shift += 8) sum += (pixels >> shift & 255) * (weights << (24 - shift) >> 24);
  return sum;
#elif SPP_LANES == 8
  return sum + reinterpret_cast<Sums>(
                   _mm256_madd_epi16(reinterpret_cast<__m256i>(pixels), reinterpret_cast<__m256i>(weights)));
#elif defined(__SSE2__)
  return sum + reinterpret_cast<Sums>(
                   _mm_madd_epi16(reinterpret_cast<__m128i>(pixels), reinterpret_cast<__m128i>(weights)));
#else
  return sum + (pixels & 0xffff) * (weights << 16 >> 16) + (pixels >> 16) * (weights >> 16);
#endif
}

// Limits; `x` where it is within them.
SPP_INLINE Floats clamp(Floats x, Floats low, Floats high) {
#if SPP_LANES == 16 && defined(SPP_INT8_VNNI)
  return _mm512_min_ps(_mm512_max_ps(x, low), high);
#elif SPP_LANES == 8 && defined(__AVX__)
  return _mm256_min_ps(_mm256_max_ps(x, low), high);
#else
  x = x > low ? x : low;
  return x < high ? x : high;
#endif
}

SPP_INLINE Floats to_floats(Sums x) { return __builtin_convertvector(x, Floats); }

// Rounded to the nearest integer, to the even one of two; of numbers within ±2²².
SPP_INLINE Sums round_to_even(Floats x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 · 2²³: of sums with it the last bit counts ones
  return reinterpret_cast<Sums>(x + kMagic) - reinterpret_cast<Sums>(broadcast(kMagic));
}

// The first `count` lanes.
SPP_INLINE Sums load_bytes(const uint8_t* p, int count) {
  LaneBytes bytes{};
  if (count >= kLanes) bytes = *reinterpret_cast<const LaneBytes*>(p);
  else std::memcpy(&bytes, p, count);
  return __builtin_convertvector(bytes, Sums);
}

// Of numbers in [0, 255].
SPP_INLINE void store_bytes(uint8_t* p, Sums x, int count) {
  const LaneBytes bytes = __builtin_convertvector(x, LaneBytes);
  if (count >= kLanes) *reinterpret_cast<LaneBytes*>(p) = bytes;
  else std::memcpy(p, &bytes, count);
}

SPP_INLINE void store_floats(float* p, Floats x, int count) {
  if (count >= kLanes) *reinterpret_cast<Floats*>(p) = x;
  else std::memcpy(p, &x, sizeof(float) * count);
}

// The elements of two vectors, alternating: those of their lower halves, or of their upper ones.
#if defined(__clang__) || __GNUC__ >= 12
#define SPP_PICK_OF(Mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SPP_PICK_OF(Mask, a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif
SPP_INLINE Bytes interleave_lower(Bytes a, Bytes b) {
  return SPP_PICK_OF(Bytes, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
SPP_INLINE Bytes interleave_upper(Bytes a, Bytes b) {
  return SPP_PICK_OF(Bytes, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
SPP_INLINE Halves interleave_lower(Halves a, Halves b) { return SPP_PICK_OF(Halves, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
SPP_INLINE Halves interleave_upper(Halves a, Halves b) { return SPP_PICK_OF(Halves, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }

// The words of 16 pixels under the columns that are multiplied at once: `in` has a pointer to each column's pixels.
SPP_INLINE void pack_words(const uint8_t* const (&in)[kColumnsAtOnce], int32_t* out) {
  Bytes x[kColumnsAtOnce];
#pragma GCC unroll 4
  for (int i = 0; i < kColumnsAtOnce; ++i) x[i] = *reinterpret_cast<const Bytes*>(in[i]);
  const Bytes lower = interleave_lower(x[0], x[1]), upper = interleave_upper(x[0], x[1]);
#ifdef SPP_INT8_QUADS
  const Bytes lower2 = interleave_lower(x[2], x[3]), upper2 = interleave_upper(x[2], x[3]);
  Halves* words = reinterpret_cast<Halves*>(out);
  words[0] = interleave_lower(reinterpret_cast<Halves>(lower), reinterpret_cast<Halves>(lower2));
  words[1] = interleave_upper(reinterpret_cast<Halves>(lower), reinterpret_cast<Halves>(lower2));
  words[2] = interleave_lower(reinterpret_cast<Halves>(upper), reinterpret_cast<Halves>(upper2));
  words[3] = interleave_upper(reinterpret_cast<Halves>(upper), reinterpret_cast<Halves>(upper2));
#else
  WideHalves* words = reinterpret_cast<WideHalves*>(out);
  words[0] = __builtin_convertvector(lower, WideHalves);
  words[1] = __builtin_convertvector(upper, WideHalves);
#endif
}

}  // namespace SPP_ISA
}  // namespace spp
