// Vectors of 8 floats, two registers each: the primitives that attention_simd.h is written in, for NEON.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "half.h"

#define SIMD_TARGET  // part of the architecture
#define SIMD_INLINE __attribute__((always_inline)) inline

namespace cpmbee {
namespace {

struct Vec {
  float32x4_t low;
  float32x4_t high;
};
constexpr int kWidth = 8;
constexpr int kPanelVectors = 2;  // 6 rows x 2 vectors of sums, 2 of inputs and a broadcast: 29 of 32 registers

SIMD_INLINE Vec broadcast(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
SIMD_INLINE Vec zero() { return broadcast(0.0f); }
SIMD_INLINE Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
SIMD_INLINE void store(float* p, Vec x) {
  vst1q_f32(p, x.low);
  vst1q_f32(p + 4, x.high);
}

// The same of numbers that are stored in fewer bits.
SIMD_INLINE Vec from_halves(uint16x8_t x) {
  const float16x8_t halves = vreinterpretq_f16_u16(x);
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
// Rounded to the nearest number that the type has, ties to even.
SIMD_INLINE uint16x8_t to_halves(Vec x) { return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.low), x.high)); }
SIMD_INLINE Vec load(const Half* p) { return from_halves(vld1q_u16(&p->bits)); }
SIMD_INLINE Vec load(const int8_t* p) {
  const int16x8_t words = vmovl_s8(vld1_s8(p));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))};
}
SIMD_INLINE void store(Half* p, Vec x) { vst1q_u16(&p->bits, to_halves(x)); }
SIMD_INLINE void store(int8_t* p, Vec x) {
  const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(x.low));
  vst1_s8(p, vqmovn_s16(vqmovn_high_s32(words, vcvtnq_s32_f32(x.high))));
}

// The first n < kWidth lanes; the others are zero, and their memory is not touched.
template <class T>
SIMD_INLINE Vec load_first(const T* p, int64_t n) {
  T whole[kWidth] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
template <class T>
SIMD_INLINE void store_first(T* p, Vec x, int64_t n) {
  T whole[kWidth];
  store(whole, x);
  std::memcpy(p, whole, n * sizeof(T));
}

SIMD_INLINE Vec add(Vec a, Vec b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
SIMD_INLINE Vec sub(Vec a, Vec b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
SIMD_INLINE Vec mul(Vec a, Vec b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
SIMD_INLINE Vec div(Vec a, Vec b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
SIMD_INLINE Vec fma(Vec a, Vec b, Vec c) {  // a * b + c
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
// b where one is NaN, unlike the instructions FMAX and FMAXNM.
SIMD_INLINE float32x4_t max(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
SIMD_INLINE float32x4_t min(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
SIMD_INLINE Vec max(Vec a, Vec b) { return {max(a.low, b.low), max(a.high, b.high)}; }
SIMD_INLINE Vec min(Vec a, Vec b) { return {min(a.low, b.low), min(a.high, b.high)}; }

SIMD_INLINE float sum_lanes(Vec x) { return vaddvq_f32(vaddq_f32(x.low, x.high)); }
SIMD_INLINE float max_lanes(Vec x) { return vmaxvq_f32(vmaxq_f32(x.low, x.high)); }

SIMD_INLINE Vec round_to_integer(Vec x) { return {vrndnq_f32(x.low), vrndnq_f32(x.high)}; }
SIMD_INLINE Vec round_to_half(Vec x) { return from_halves(to_halves(x)); }
// x * 2^n for integers n in [-126, 0].
SIMD_INLINE float32x4_t scale_by_power(float32x4_t x, float32x4_t n) {
  const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
  return vmulq_f32(x, vreinterpretq_f32_s32(exponent));
}
SIMD_INLINE Vec scale_by_power(Vec x, Vec n) { return {scale_by_power(x.low, n.low), scale_by_power(x.high, n.high)}; }
// x, but zero where a < b.
SIMD_INLINE float32x4_t zero_where_less(float32x4_t x, float32x4_t a, float32x4_t b) {
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), vcltq_f32(a, b)));
}
SIMD_INLINE Vec zero_where_less(Vec x, Vec a, Vec b) {
  return {zero_where_less(x.low, a.low, b.low), zero_where_less(x.high, a.high, b.high)};
}

// bias[relation[i]]. Far keys and other segments have one bucket for long stretches; there is no gather.
SIMD_INLINE Vec look_up(const float* bias, const int16_t* relation) {
  const uint16x8_t same = vceqq_s16(vld1q_s16(relation), vdupq_n_s16(relation[0]));
  if (vminvq_u16(same) != 0) return broadcast(bias[relation[0]]);
  float found[kWidth];
  for (int i = 0; i < kWidth; ++i) found[i] = bias[relation[i]];
  return load(found);
}

// Lane i of the result is the sum of the lanes of x[i].
SIMD_INLINE Vec sum_each(const Vec (&x)[kWidth]) {
  float32x4_t pairs[kWidth / 2];
#pragma GCC unroll 4
  for (int i = 0; i < kWidth / 2; ++i) {
    pairs[i] = vpaddq_f32(vaddq_f32(x[2 * i].low, x[2 * i].high), vaddq_f32(x[2 * i + 1].low, x[2 * i + 1].high));
  }
  return {vpaddq_f32(pairs[0], pairs[1]), vpaddq_f32(pairs[2], pairs[3])};
}

// Rows of a 4 x 4 block become columns.
SIMD_INLINE void transpose(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
  const float64x2_t low_ab = vreinterpretq_f64_f32(vzip1q_f32(a, b));
  const float64x2_t high_ab = vreinterpretq_f64_f32(vzip2q_f32(a, b));
  const float64x2_t low_cd = vreinterpretq_f64_f32(vzip1q_f32(c, d));
  const float64x2_t high_cd = vreinterpretq_f64_f32(vzip2q_f32(c, d));
  a = vreinterpretq_f32_f64(vzip1q_f64(low_ab, low_cd));
  b = vreinterpretq_f32_f64(vzip2q_f64(low_ab, low_cd));
  c = vreinterpretq_f32_f64(vzip1q_f64(high_ab, high_cd));
  d = vreinterpretq_f32_f64(vzip2q_f64(high_ab, high_cd));
}

// Rows become columns.
SIMD_INLINE void transpose(Vec (&x)[kWidth]) {
  transpose(x[0].low, x[1].low, x[2].low, x[3].low);
  transpose(x[0].high, x[1].high, x[2].high, x[3].high);
  transpose(x[4].low, x[5].low, x[6].low, x[7].low);
  transpose(x[4].high, x[5].high, x[6].high, x[7].high);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float32x4_t high = x[i].high;
    x[i].high = x[4 + i].low;
    x[4 + i].low = high;
  }
}

}  // namespace
}  // namespace cpmbee
