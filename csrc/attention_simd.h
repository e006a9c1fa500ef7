// What both vector regimes share. Included by one source per instruction set, after its simd_*.h.
//
// Everything is in an unnamed namespace: each of those sources gets its own copy, compiled for its own target.
#pragma once

#include <algorithm>
#include <limits>

#include "attention_kernel.h"

namespace cpmbee {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// exp(x) for x <= 0 to 2 ulp (Cephes' polynomial); zero below -87.3, where the result would be subnormal; NaN stays.
SIMD_INLINE Vec exp_nonpositive(Vec x) {
  const Vec lowest = broadcast(-87.3365447504f);
  const Vec y = max(lowest, x);
  const Vec n = round_to_integer(mul(y, broadcast(1.44269504088896341f)));
  Vec r = fma(n, broadcast(-0.693359375f), y);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), broadcast(1.0f));
  return zero_where_less(scale_by_power(p, n), x, lowest);
}

SIMD_INLINE void scale_row(float* row, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(row + i, mul(load(row + i), broadcast(factor)));
  if (i < n) store_first(row + i, mul(load_first(row + i, n - i), broadcast(factor)), n - i);
}

SIMD_INLINE void copy_scaled(float* to, const float* from, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, mul(load(from + i), broadcast(factor)));
  if (i < n) store_first(to + i, mul(load_first(from + i, n - i), broadcast(factor)), n - i);
}

// The relations of one query to the keys of a tile; a tile cut short by the end of the keys is filled up with -1.
SIMD_INLINE const int16_t* whole_tile(const int16_t* relation, int64_t count, int16_t (&padded)[kKeyTile]) {
  if (count == kKeyTile) return relation;
  std::fill(std::copy(relation, relation + count, padded), padded + kKeyTile, int16_t{-1});
  return padded;
}

// Running softmax of one query and head.
struct SoftmaxState {
  float max = kMinusInfinity;
  float sum = 0.0f;
};

// Turns the q.k of one tile into weights exp(score - running max), in place, and updates the state. The result is the
// factor for everything that was accumulated before.
SIMD_INLINE float weigh(float* scores, const int16_t* relation, const float* bias, SoftmaxState& state) {
  constexpr int kVectors = kKeyTile / kWidth;
  Vec s[kVectors];
  Vec top = broadcast(kMinusInfinity);
  for (int i = 0; i < kVectors; ++i) {
    s[i] = add(load(scores + i * kWidth), look_up(bias, relation + i * kWidth));
    top = max(top, s[i]);
  }
  const float max_before = state.max;
  const float max_now = std::max(max_before, max_lanes(top));
  if (max_now == kMinusInfinity) {  // nothing seen yet: -inf - -inf must not become NaN
    for (int i = 0; i < kVectors; ++i) store(scores + i * kWidth, zero());
    return 1.0f;
  }
  Vec total = zero();
  for (int i = 0; i < kVectors; ++i) {
    s[i] = exp_nonpositive(sub(s[i], broadcast(max_now)));
    store(scores + i * kWidth, s[i]);
    total = add(total, s[i]);
  }
  float factor = 1.0f;
  if (max_now != max_before) {
    alignas(64) float lanes[kWidth];
    store(lanes, exp_nonpositive(broadcast(max_before - max_now)));
    factor = lanes[0];
  }
  state.max = max_now;
  state.sum = state.sum * factor + sum_lanes(total);
  return factor;
}

}  // namespace
}  // namespace cpmbee
