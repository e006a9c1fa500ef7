// What both vector regimes share. Included by one source per instruction set, after its simd_*.h.
//
// Everything is in an unnamed namespace: each of those sources gets its own copy, compiled for its own target.
#pragma once

#include <algorithm>

#include "attention_kernel.h"
#include "simd_exp2.h"

namespace cpmbee {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int kRows = 6;  // rows (queries, or heads in decode) that are worked on at one time; fewer than kWidth

SIMD_INLINE void scale_row(float* row, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(row + i, mul(load(row + i), broadcast(factor)));
  if (i < n) store_first(row + i, mul(load_first(row + i, n - i), broadcast(factor)), n - i);
}

template <class T>
SIMD_INLINE void copy_scaled(float* to, const T* from, int64_t n, float factor) {
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

// Turns q.k of `rows` rows with the keys of one tile into weights 2^(score - running max), in place, and updates each
// row's running max and sum. factors[r] is what everything that row r accumulated before must be multiplied with.
// A max that starts at kNothingSeen rather than -inf makes rows that see no key come out as zeros without a branch.
SIMD_INLINE void weigh(int64_t rows, float* scores, const int16_t* const* relation, const float* const* bias,
                       float* maxima, float* sums, float* factors) {
  constexpr int kVectors = kKeyTile / kWidth;
  alignas(64) float tops[kWidth] = {};
  alignas(64) float totals[kWidth] = {};
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * kKeyTile;
    Vec top = broadcast(kNothingSeen);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const Vec s = add(load(row + i * kWidth), look_up(bias[r], relation[r] + i * kWidth));
      store(row + i * kWidth, s);
      top = max(top, s);
    }
    tops[r] = max_lanes(top);
  }
  const Vec before = load_first(maxima, rows);
  const Vec now = max(before, load(tops));
  const Vec factor = exp2_nonpositive(sub(before, now));
  store_first(maxima, now, rows);
  store_first(factors, factor, rows);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * kKeyTile;
    const Vec row_max = broadcast(maxima[r]);
    Vec total = zero();
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const Vec weight = exp2_nonpositive(sub(load(row + i * kWidth), row_max));
      store(row + i * kWidth, weight);
      total = add(total, weight);
    }
    totals[r] = sum_lanes(total);
  }
  store_first(sums, fma(load_first(sums, rows), factor, load(totals)), rows);
}

}  // namespace
}  // namespace cpmbee
