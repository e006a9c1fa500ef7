// Vectors of 16 floats: the primitives that attention_simd.h is written in, for AVX-512.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"  // clang does not know the next one
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 about its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

#include "attention_kernel.h"
#include "half.h"

#define SIMD_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define SIMD_INLINE SIMD_TARGET __attribute__((always_inline)) inline

namespace cpmbee {
namespace {

using Vec = __m512;
constexpr int kWidth = 16;
constexpr int kPanelVectors = 4;  // 6 rows x 4 vectors of sums, 4 of inputs and a broadcast: 29 of 32 registers

SIMD_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

SIMD_INLINE Vec zero() { return _mm512_setzero_ps(); }
SIMD_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
SIMD_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
SIMD_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
// The first n < kWidth lanes; the others are zero, and their memory is not touched.
SIMD_INLINE Vec load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
SIMD_INLINE void store_first(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }

// The same of numbers that are stored in fewer bits.
SIMD_INLINE Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
SIMD_INLINE Vec load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
SIMD_INLINE Vec load_first(const Half* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
SIMD_INLINE Vec load_first(const int8_t* p, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}
// Rounded to the nearest number that the type has, ties to even.
SIMD_INLINE void store(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
SIMD_INLINE void store(int8_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}
SIMD_INLINE void store_first(Half* p, Vec x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
SIMD_INLINE void store_first(int8_t* p, Vec x, int64_t n) {
  _mm_mask_storeu_epi8(p, first_lanes(n), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

SIMD_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
SIMD_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
SIMD_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
SIMD_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
SIMD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
SIMD_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }              // b where one is NaN
SIMD_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }              // b where one is NaN
SIMD_INLINE float sum_lanes(Vec x) { return _mm512_reduce_add_ps(x); }
SIMD_INLINE float max_lanes(Vec x) { return _mm512_reduce_max_ps(x); }

SIMD_INLINE Vec round_to_integer(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SIMD_INLINE Vec round_to_half(Vec x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
// x * 2^n for integers n in [-126, 0].
SIMD_INLINE Vec scale_by_power(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
// x, but zero where a < b.
SIMD_INLINE Vec zero_where_less(Vec x, Vec a, Vec b) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), x);
}

// bias[relation[i]]. Keys side by side mostly have buckets side by side, and a gather is slow: where all buckets are
// within 15 of the first one, the 32 floats around that one are a table in two registers.
SIMD_INLINE Vec look_up(const float* bias, const int16_t* relation) {
  const int first = relation[0] - (BiasTable::kMargin - 1);
  const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(relation));
  const __m256i near = _mm256_sub_epi16(rows, _mm256_set1_epi16(static_cast<int16_t>(first)));
  if (_mm256_cmplt_epu16_mask(near, _mm256_set1_epi16(32)) == 0xffff) {
    return _mm512_permutex2var_ps(load(bias + first), _mm512_cvtepu16_epi32(near), load(bias + first + 16));
  }
  return _mm512_i32gather_ps(_mm512_cvtepi16_epi32(rows), bias, sizeof(float));
}

// Lane i of the result is the sum of the lanes of x[i].
SIMD_INLINE Vec sum_each(const Vec (&x)[kWidth]) {
  __m512 quads[4];  // quads[i] lane group g: partial sums of x[4 * i .. 4 * i + 3] over lane group g
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec* y = x + 4 * i;
    const Vec a = add(_mm512_unpacklo_ps(y[0], y[1]), _mm512_unpackhi_ps(y[0], y[1]));
    const Vec b = add(_mm512_unpacklo_ps(y[2], y[3]), _mm512_unpackhi_ps(y[2], y[3]));
    quads[i] = add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  const Vec low = add(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88), _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
  const Vec high = add(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88), _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
  return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// Rows become columns.
SIMD_INLINE void transpose(Vec (&x)[kWidth]) {
  __m512 y[kWidth];  // y[4 * i + c] lane group g: column 4 * g + c of rows 4 * i .. 4 * i + 3
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec* r = x + 4 * i;
    const Vec a = _mm512_unpacklo_ps(r[0], r[1]);
    const Vec b = _mm512_unpackhi_ps(r[0], r[1]);
    const Vec c = _mm512_unpacklo_ps(r[2], r[3]);
    const Vec d = _mm512_unpackhi_ps(r[2], r[3]);
    y[4 * i + 0] = _mm512_shuffle_ps(a, c, 0x44);
    y[4 * i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    y[4 * i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    y[4 * i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Vec even_low = _mm512_shuffle_f32x4(y[c], y[4 + c], 0x88);
    const Vec odd_low = _mm512_shuffle_f32x4(y[c], y[4 + c], 0xdd);
    const Vec even_high = _mm512_shuffle_f32x4(y[8 + c], y[12 + c], 0x88);
    const Vec odd_high = _mm512_shuffle_f32x4(y[8 + c], y[12 + c], 0xdd);
    x[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    x[4 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    x[8 + c] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    x[12 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

}  // namespace
}  // namespace cpmbee
