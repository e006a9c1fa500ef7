// Vectors of 8 floats: the primitives that attention_simd.h is written in, for AVX2 with FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "half.h"

#define SIMD_TARGET __attribute__((target("avx2,fma,f16c")))
#define SIMD_INLINE SIMD_TARGET __attribute__((always_inline)) inline

namespace cpmbee {
namespace {

using Vec = __m256;
constexpr int kWidth = 8;
constexpr int kPanelVectors = 2;  // 6 rows x 2 vectors of sums, 2 of inputs and a broadcast: 15 of 16 registers

SIMD_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

SIMD_INLINE Vec zero() { return _mm256_setzero_ps(); }
SIMD_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
SIMD_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
SIMD_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
// The first n < kWidth lanes; the others are zero, and their memory is not touched.
SIMD_INLINE Vec load_first(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
SIMD_INLINE void store_first(float* p, Vec x, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x); }

// The same of numbers that are stored in fewer bits.
SIMD_INLINE Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
SIMD_INLINE Vec load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
template <class T>
SIMD_INLINE Vec load_first(const T* p, int64_t n) {
  T whole[kWidth] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
// Rounded to the nearest number that the type has, ties to even.
SIMD_INLINE void store(Half* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
SIMD_INLINE void store(int8_t* p, Vec x) {
  const __m256i wide = _mm256_cvtps_epi32(x);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
template <class T>
SIMD_INLINE void store_first(T* p, Vec x, int64_t n) {
  T whole[kWidth];
  store(whole, x);
  std::memcpy(p, whole, n * sizeof(T));
}

SIMD_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
SIMD_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
SIMD_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
SIMD_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
SIMD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }  // a * b + c
SIMD_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }              // b where one is NaN
SIMD_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }              // b where one is NaN

SIMD_INLINE float sum_lanes(Vec x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
SIMD_INLINE float max_lanes(Vec x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

SIMD_INLINE Vec round_to_integer(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SIMD_INLINE Vec round_to_half(Vec x) { return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
// x * 2^n for integers n in [-126, 0].
SIMD_INLINE Vec scale_by_power(Vec x, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return mul(x, _mm256_castsi256_ps(exponent));
}
// x, but zero where a < b.
SIMD_INLINE Vec zero_where_less(Vec x, Vec a, Vec b) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ), x); }

// bias[relation[i]]. Far keys and other segments have one bucket for long stretches, and a gather is slow.
SIMD_INLINE Vec look_up(const float* bias, const int16_t* relation) {
  const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(relation));
  if (_mm_movemask_epi8(_mm_cmpeq_epi16(rows, _mm_set1_epi16(relation[0]))) == 0xffff) {
    return broadcast(bias[relation[0]]);
  }
  return _mm256_i32gather_ps(bias, _mm256_cvtepi16_epi32(rows), sizeof(float));
}

// Lane i of the result is the sum of the lanes of x[i].
SIMD_INLINE Vec sum_each(const Vec (&x)[kWidth]) {
  const Vec a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const Vec b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// Rows become columns.
SIMD_INLINE void transpose(Vec (&x)[kWidth]) {
  __m256 y[kWidth];  // y[4 * i + c] lane group g: column 4 * g + c of rows 4 * i .. 4 * i + 3
#pragma GCC unroll 4
  for (int i = 0; i < 2; ++i) {
    const Vec* r = x + 4 * i;
    const Vec a = _mm256_unpacklo_ps(r[0], r[1]);
    const Vec b = _mm256_unpackhi_ps(r[0], r[1]);
    const Vec c = _mm256_unpacklo_ps(r[2], r[3]);
    const Vec d = _mm256_unpackhi_ps(r[2], r[3]);
    y[4 * i + 0] = _mm256_shuffle_ps(a, c, 0x44);
    y[4 * i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    y[4 * i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    y[4 * i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    x[c] = _mm256_permute2f128_ps(y[c], y[4 + c], 0x20);
    x[4 + c] = _mm256_permute2f128_ps(y[c], y[4 + c], 0x31);
  }
}

}  // namespace
}  // namespace cpmbee
