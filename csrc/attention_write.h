// Rounding new rows to the type of the cache. Included after attention_simd.h.
#pragma once

#include <type_traits>

#include "attention_simd.h"

namespace cpmbee {
namespace {

// The largest magnitude among n numbers.
SIMD_INLINE float largest_magnitude(const float* row, int64_t n) {
  Vec largest = zero();
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec x = load(row + i);
    largest = max(max(x, sub(zero(), x)), largest);
  }
  if (i < n) {
    const Vec x = load_first(row + i, n - i);
    largest = max(max(x, sub(zero(), x)), largest);
  }
  return max_lanes(largest);
}

// What is stored for x: half precision saturates, int8 counts in units of `scale`.
template <class T>
SIMD_INLINE Vec stored(Vec x, Vec scale) {
  if constexpr (std::is_same_v<T, Half>) return max(broadcast(-kLargestHalf), min(broadcast(kLargestHalf), x));
  if constexpr (std::is_same_v<T, int8_t>) return max(div(x, scale), broadcast(-127.0f));
  return x;
}

template <class T>
SIMD_TARGET void write_heads(const float* values, int64_t heads, int64_t dim_head, void* numbers, float* scales) {
  T* to = static_cast<T*>(numbers);
  for (int64_t h = 0; h < heads; ++h) {
    Vec scale = broadcast(1.0f);
    if constexpr (std::is_same_v<T, int8_t>) {
      scales[h] = int8_scale(largest_magnitude(values, dim_head));
      scale = broadcast(scales[h]);
    }
    int64_t d = 0;
    for (; d + kWidth <= dim_head; d += kWidth) store(to + d, stored<T>(load(values + d), scale));
    if (d < dim_head) {
      const int64_t n = dim_head - d;
      store_first(to + d, stored<T>(load_first(values + d, n), scale), n);
    }
    values += dim_head;
    to += dim_head;
  }
}

}  // namespace
}  // namespace cpmbee
