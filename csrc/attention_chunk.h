// Decode: few queries, all heads, a chunk of keys whose cache rows are read once. Included after attention_simd.h.
#pragma once

#include <type_traits>

#include "attention_simd.h"

namespace cpmbee {
namespace {

constexpr int kValueRows = 8;  // value rows added up at one time
constexpr int kAhead = 512;    // bytes; sixteen rows at a time are more than a hardware prefetcher follows well

// Asks for what a loop over a row will read some steps later, once for each cache line.
template <class T>
SIMD_INLINE void prefetch_ahead(const T* row, int64_t d) {
  constexpr int64_t kNumbers = kLine / sizeof(T);
  if (kNumbers <= kWidth || d % kNumbers == 0) __builtin_prefetch(row + d + kAhead / sizeof(T));
}

size_t chunk_scratch_floats(const AttentionProblem& p) {
  const int64_t scales = p.cache_type == CacheType::int8 ? 2 * p.heads * kKeyTile : 0;
  return p.queries * p.row_size() + p.queries * p.heads * kKeyTile + scales;  // scaled queries, scores
}

// q.k of one query and head with kWidth keys.
template <class T>
SIMD_INLINE Vec multiply_keys(const float* query, const T* const* keys, int64_t offset, int64_t dim) {
  Vec sums[kWidth];
  for (int j = 0; j < kWidth; ++j) sums[j] = zero();
  int64_t d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    const Vec x = load(query + d);
#pragma GCC unroll 16
    for (int j = 0; j < kWidth; ++j) {
      prefetch_ahead(keys[j] + offset, d);
      sums[j] = fma(x, load(keys[j] + offset + d), sums[j]);
    }
  }
  if (d < dim) {
    const Vec x = load_first(query + d, dim - d);
#pragma GCC unroll 16
    for (int j = 0; j < kWidth; ++j) sums[j] = fma(x, load_first(keys[j] + offset + d, dim - d), sums[j]);
  }
  return sum_each(sums);
}

// context += weights . values for one query and head and kValueRows keys.
template <class T>
SIMD_INLINE void add_values(float* context, const float* weights, const T* const* values, int64_t offset,
                            int64_t dim) {
  int64_t d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    Vec sum = load(context + d);
#pragma GCC unroll 8
    for (int j = 0; j < kValueRows; ++j) {
      prefetch_ahead(values[j] + offset, d);
      sum = fma(broadcast(weights[j]), load(values[j] + offset + d), sum);
    }
    store(context + d, sum);
  }
  if (d < dim) {
    const int64_t n = dim - d;
    Vec sum = load_first(context + d, n);
#pragma GCC unroll 8
    for (int j = 0; j < kValueRows; ++j) sum = fma(broadcast(weights[j]), load_first(values[j] + offset + d, n), sum);
    store_first(context + d, sum, n);
  }
}

// Scales (rows, heads) of a tile's rows as (heads, kKeyTile), of heads [h_begin, h_end).
SIMD_TARGET void turn_scales(const float* scales, const int32_t (&rows)[kKeyTile], int64_t heads, int64_t h_begin,
                             int64_t h_end, float* by_head) {
  for (int64_t j = 0; j < kKeyTile; j += kWidth) {
    for (int64_t h = h_begin; h < h_end; h += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, h_end - h);
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const float* row = scales + rows[j + i] * heads + h;
        block[i] = n == kWidth ? load(row) : load_first(row, n);
      }
      transpose(block);
      for (int64_t i = 0; i < n; ++i) store(by_head + (h + i) * kKeyTile + j, block[i]);
    }
  }
}

// Does any query see any of these keys?
bool sees_any(const AttentionProblem& p, int64_t b, int64_t k, int64_t count) {
  int16_t best = -1;
  for (int64_t q = 0; q < p.queries; ++q) {
    const int16_t* relation = p.relation_row(b, q) + k;
    for (int64_t j = 0; j < count; ++j) best = relation[j] > best ? relation[j] : best;
  }
  return best >= 0;
}

template <class T>
SIMD_TARGET void attend_chunk(const AttentionProblem& p, int64_t b, int64_t k_begin, int64_t k_end, int64_t h_begin,
                              int64_t h_end, const AttentionPartial& result, float* scratch) {
  const int64_t dim = p.dim_head;
  const int64_t entries = p.queries * p.heads;
  const int64_t heads = h_end - h_begin;
  float* queries = scratch;  // (queries, heads, dim_head)
  float* scores = queries + entries * dim;
  float* key_scales = scores + entries * kKeyTile;  // of int8 rows, (heads, kKeyTile)
  float* value_scales = key_scales + p.heads * kKeyTile;
  constexpr bool kScaled = std::is_same_v<T, int8_t>;
  for (int64_t q = 0; q < p.queries; ++q) {
    const int64_t e = q * p.heads + h_begin;
    copy_scaled(queries + e * dim, p.query(b, q, h_begin), heads * dim, p.scale);
    std::fill(result.max + e, result.max + e + heads, kNothingSeen);
    std::fill(result.sum + e, result.sum + e + heads, 0.0f);
    std::fill(result.context + e * dim, result.context + (e + heads) * dim, 0.0f);
  }

  for (int64_t k = k_begin; k < k_end; k += kKeyTile) {
    const int64_t count = std::min(kKeyTile, k_end - k);
    if (!sees_any(p, b, k, count)) continue;
    const int32_t* slots = p.slots + b * p.keys + k;
    // Past the end the last key is repeated: its relation there is -1, its weight zero.
    int32_t rows[kKeyTile];
    const T* keys[kKeyTile];
    const T* values[kKeyTile];
    for (int64_t j = 0; j < kKeyTile; ++j) {
      rows[j] = slots[std::min(j, count - 1)];
      keys[j] = p.key_cache.as<T>() + rows[j] * p.row_size();
      values[j] = p.value_cache.as<T>() + rows[j] * p.row_size();
    }
    if constexpr (kScaled) {
      turn_scales(p.key_cache.scales, rows, p.heads, h_begin, h_end, key_scales);
      turn_scales(p.value_cache.scales, rows, p.heads, h_begin, h_end, value_scales);
    }
    if (count < kKeyTile) std::fill(scores, scores + entries * kKeyTile, 0.0f);
    for (int64_t j = 0; j < count; j += kWidth) {
      for (int64_t h = h_begin; h < h_end; ++h) {
        for (int64_t e = h; e < entries; e += p.heads) {
          Vec products = multiply_keys(queries + e * dim, keys + j, h * dim, dim);
          if constexpr (kScaled) products = mul(products, load(key_scales + h * kKeyTile + j));
          store(scores + e * kKeyTile + j, products);
        }
      }
    }
    for (int64_t q = 0; q < p.queries; ++q) {
      int16_t padded[kKeyTile];
      const int16_t* relation[kRows];
      std::fill(relation, relation + kRows, whole_tile(p.relation_row(b, q) + k, count, padded));
      for (int64_t h = h_begin; h < h_end; h += kRows) {
        const int64_t n = std::min<int64_t>(kRows, h_end - h);
        const int64_t e = q * p.heads + h;
        const float* bias[kRows];
        for (int64_t r = 0; r < n; ++r) bias[r] = p.bias->head(h + r);
        float factors[kRows];
        weigh(n, scores + e * kKeyTile, relation, bias, result.max + e, result.sum + e, factors);
        for (int64_t r = 0; r < n; ++r) {
          if (factors[r] != 1.0f) scale_row(result.context + (e + r) * dim, dim, factors[r]);
          if constexpr (kScaled) {  // the values' scales go into their weights
            float* weights = scores + (e + r) * kKeyTile;
            const float* scales = value_scales + (h + r) * kKeyTile;
            for (int64_t j = 0; j < kKeyTile; j += kWidth) store(weights + j, mul(load(weights + j), load(scales + j)));
          }
        }
      }
    }
    for (int64_t j = 0; j < count; j += kValueRows) {
      for (int64_t h = h_begin; h < h_end; ++h) {
        for (int64_t e = h; e < entries; e += p.heads) {
          add_values(result.context + e * dim, scores + e * kKeyTile + j, values + j, h * dim, dim);
        }
      }
    }
  }
}

}  // namespace
}  // namespace cpmbee
