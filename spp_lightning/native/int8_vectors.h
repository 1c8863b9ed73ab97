// Vectors of the int8 kernel: sums of int32, the products that are added to them, and what turns them into outputs.
//
// SPP_LANES are the sums of a vector. A word of 32 bits has a byte for each of four columns: pixels without a sign, or
// weights with one. The instructions that multiply words are VPDPBUSD of AVX-512 or AVX VNNI (SPP_INT8_VNNI), VPMADDUBSW
// of AVX2, PMADDWD of SSE2, or loops that compute the same numbers. Where a processor lacks VPDPBUSD, tests run the
// loops in its place (SPP_INT8_EMULATED) and all the rest of the kernel as it is.
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

// Which instructions there are: a pragma that sets a target doesn't define all of the compiler's macros.
#ifdef SPP_INT8_EMULATED
#elif SPP_LANES == 16
#define SPP_INT8_AVX512
#elif SPP_LANES == 8
#define SPP_INT8_AVX2
#elif defined(__SSE2__)
#define SPP_INT8_SSE2
#endif

constexpr int kLanes = SPP_LANES;
constexpr int kPackPixels = 16;  // pixels that are packed at once, and finished

// Whether products of two columns meet in int16.
#if defined(SPP_INT8_AVX2) && !defined(SPP_INT8_VNNI)
constexpr bool kSumsInInt16 = true;
#else
constexpr bool kSumsInInt16 = false;
#endif

#define SPP_INLINE inline __attribute__((always_inline))

typedef int32_t Sums __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float Floats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint8_t LaneBytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(kPackPixels), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kPackPixels), aligned(1), may_alias));

SPP_INLINE Sums broadcast(int32_t x) { return x - Sums{}; }
SPP_INLINE Floats broadcast(float x) { return x - Floats{}; }
SPP_INLINE Sums load(const int32_t* p) { return *reinterpret_cast<const Sums*>(p); }
SPP_INLINE void store(int32_t* p, Sums x) { *reinterpret_cast<Sums*>(p) = x; }

// No part of the unrolled loops, which would be long.
__attribute__((noinline)) inline void add_emulated(Sums& sum, const Sums& pixels, const Sums& weights) {
  for (int i = 0; i < 4; ++i) sum += (pixels >> (8 * i) & 255) * (weights << (24 - 8 * i) >> 24);
}

// sum + Σ pixels · weights over the columns of a step.
SPP_INLINE Sums add_products(Sums sum, Sums pixels, Sums weights) {
#ifdef SPP_INT8_AVX512
  return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(pixels),
                                                    reinterpret_cast<__m512i>(weights)));
#elif defined(SPP_INT8_VNNI)
  return reinterpret_cast<Sums>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(pixels), reinterpret_cast<__m256i>(weights)));
#elif defined(SPP_INT8_AVX2)
  const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(pixels), reinterpret_cast<__m256i>(weights));
  return sum + reinterpret_cast<Sums>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(SPP_INT8_SSE2)
  const __m128i x = reinterpret_cast<__m128i>(pixels), w = reinterpret_cast<__m128i>(weights);
  const __m128i even = _mm_madd_epi16(_mm_and_si128(x, _mm_set1_epi16(255)), _mm_srai_epi16(_mm_slli_epi16(w, 8), 8));
  const __m128i odd = _mm_madd_epi16(_mm_srli_epi16(x, 8), _mm_srai_epi16(w, 8));
  return sum + reinterpret_cast<Sums>(even) + reinterpret_cast<Sums>(odd);
#else
  add_emulated(sum, pixels, weights);
  return sum;
#endif
}

#ifdef SPP_INT8_AVX2
// The same of two steps at once: their products meet in int16.
SPP_INLINE Sums add_two_products(Sums sum, Sums pixels, Sums weights, Sums next_pixels, Sums next_weights) {
  const __m256i first = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(pixels), reinterpret_cast<__m256i>(weights));
  const __m256i next =
      _mm256_maddubs_epi16(reinterpret_cast<__m256i>(next_pixels), reinterpret_cast<__m256i>(next_weights));
  const __m256i pairs = _mm256_madd_epi16(_mm256_add_epi16(first, next), _mm256_set1_epi16(1));
  return sum + reinterpret_cast<Sums>(pairs);
}
#else
Sums add_two_products(Sums sum, Sums pixels, Sums weights, Sums next_pixels, Sums next_weights);
#endif

// Limits; `x` where it is within them.
SPP_INLINE Floats not_above(Floats x, float high) {
  const Floats most = broadcast(high);
#ifdef SPP_INT8_AVX512
  return _mm512_min_ps(x, most);
#elif defined(SPP_INT8_AVX2)
  return _mm256_min_ps(x, most);
#elif defined(SPP_INT8_SSE2)
  return _mm_min_ps(x, most);
#else
  return x < most ? x : most;
#endif
}
SPP_INLINE Floats clamp(Floats x, Floats low, Floats high) {
  x = x > low ? x : low;
  return x < high ? x : high;
}
constexpr float kMostRounded = 1 << 30;  // larger numbers have no int32

SPP_INLINE Floats to_floats(Sums x) { return __builtin_convertvector(x, Floats); }

// GCC converts a vector of bytes number by number.
SPP_INLINE Sums widen(const uint8_t* p) {
#ifdef SPP_INT8_AVX512
  return reinterpret_cast<Sums>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(SPP_INT8_AVX2)
  return reinterpret_cast<Sums>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(SPP_INT8_SSE2)
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  const __m128i zeros = _mm_setzero_si128(), halves = _mm_unpacklo_epi8(_mm_cvtsi32_si128(word), zeros);
  return reinterpret_cast<Sums>(_mm_unpacklo_epi16(halves, zeros));
#else
  return __builtin_convertvector(*reinterpret_cast<const LaneBytes*>(p), Sums);
#endif
}

// The limits and the zero point of a quantised output.
struct ByteLimits {
  int32_t low, high, zero;
};

// 16 numbers rounded to integers, to the even one of two, plus the zero point; within the limits.
constexpr int kPackVectors = kPackPixels / kLanes;
SPP_INLINE void store_rounded(const Floats (&x)[kPackVectors], const ByteLimits& limits, uint8_t* out) {
#if defined(SPP_INT8_AVX512) || defined(SPP_INT8_AVX2) || defined(SPP_INT8_SSE2)
  __m128i bytes;
#ifdef SPP_INT8_AVX512
  const __m512i sums = _mm512_add_epi32(_mm512_cvtps_epi32(not_above(x[0], kMostRounded)), _mm512_set1_epi32(limits.zero));
  bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(sums, _mm512_setzero_si512()));
#elif defined(SPP_INT8_AVX2)
  const __m256i halves = _mm256_packs_epi32(_mm256_cvtps_epi32(not_above(x[0], kMostRounded)),
                                            _mm256_cvtps_epi32(not_above(x[1], kMostRounded)));
  const __m256i moved = _mm256_adds_epi16(_mm256_permute4x64_epi64(halves, 0xd8), _mm256_set1_epi16(limits.zero));
  bytes = _mm_packus_epi16(_mm256_castsi256_si128(moved), _mm256_extracti128_si256(moved, 1));
#else
  __m128i halves[2];
  for (int i = 0; i < 2; ++i)
    halves[i] = _mm_adds_epi16(_mm_packs_epi32(_mm_cvtps_epi32(not_above(x[2 * i], kMostRounded)),
                                               _mm_cvtps_epi32(not_above(x[2 * i + 1], kMostRounded))),
                               _mm_set1_epi16(limits.zero));
  bytes = _mm_packus_epi16(halves[0], halves[1]);
#endif
  bytes = _mm_max_epu8(bytes, _mm_set1_epi8(static_cast<char>(limits.low)));
  bytes = _mm_min_epu8(bytes, _mm_set1_epi8(static_cast<char>(limits.high)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
#else
  for (int i = 0; i < kPackVectors; ++i) {
    // Sums with 1.5 · 2²³ are rounded to integers, which their last bits count.
    constexpr float kMagic = 12582912.0f;
    constexpr int32_t kMagicBits = 0x4b400000;
    const Floats in_range = clamp(x[i], broadcast(-256.0f), broadcast(256.0f));
    Sums sum = reinterpret_cast<Sums>(in_range + kMagic) - (kMagicBits - limits.zero);
    sum = sum > limits.low ? sum : broadcast(limits.low);
    sum = sum < limits.high ? sum : broadcast(limits.high);
    *reinterpret_cast<LaneBytes*>(out + i * kLanes) = __builtin_convertvector(sum, LaneBytes);
  }
#endif
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

// The words of 16 pixels under the columns of a step: `in` has a pointer to each column's pixels.
SPP_INLINE void pack_words(const uint8_t* const (&in)[4], int32_t* out) {
  Bytes x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const Bytes*>(in[i]);
  const auto first = reinterpret_cast<Halves>(interleave_lower(x[0], x[1]));
  const auto second = reinterpret_cast<Halves>(interleave_lower(x[2], x[3]));
  const auto third = reinterpret_cast<Halves>(interleave_upper(x[0], x[1]));
  const auto fourth = reinterpret_cast<Halves>(interleave_upper(x[2], x[3]));
  Halves* words = reinterpret_cast<Halves*>(out);
  words[0] = interleave_lower(first, second);
  words[1] = interleave_upper(first, second);
  words[2] = interleave_lower(third, fourth);
  words[3] = interleave_upper(third, fourth);
}

}  // namespace SPP_ISA
}  // namespace spp
