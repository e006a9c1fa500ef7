// Decode: few queries, all heads, a chunk of keys whose cache rows are read once. Included after attention_simd.h.
#pragma once

#include "attention_simd.h"

namespace cpmbee {
namespace {

constexpr int kValueRows = 8;  // value rows added up at one time
constexpr int kAhead = 128;    // floats; sixteen rows at a time are more than a hardware prefetcher follows well

size_t chunk_scratch_floats(const AttentionProblem& p) {
  return p.queries * p.row_size() + p.queries * p.heads * kKeyTile;  // scaled queries, scores
}

// q.k of one query and head with kWidth keys.
SIMD_INLINE Vec multiply_keys(const float* query, const float* const* keys, int64_t offset, int64_t dim) {
  Vec sums[kWidth];
  for (int j = 0; j < kWidth; ++j) sums[j] = zero();
  int64_t d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    const Vec x = load(query + d);
#pragma GCC unroll 16
    for (int j = 0; j < kWidth; ++j) {
      __builtin_prefetch(keys[j] + offset + d + kAhead);
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
SIMD_INLINE void add_values(float* context, const float* weights, const float* const* values, int64_t offset,
                            int64_t dim) {
  int64_t d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    Vec sum = load(context + d);
#pragma GCC unroll 8
    for (int j = 0; j < kValueRows; ++j) {
      __builtin_prefetch(values[j] + offset + d + kAhead);
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

// Does any query see any of these keys?
bool sees_any(const AttentionProblem& p, int64_t b, int64_t k, int64_t count) {
  int16_t best = -1;
  for (int64_t q = 0; q < p.queries; ++q) {
    const int16_t* relation = p.relation_row(b, q) + k;
    for (int64_t j = 0; j < count; ++j) best = relation[j] > best ? relation[j] : best;
  }
  return best >= 0;
}

SIMD_TARGET void attend_chunk(const AttentionProblem& p, int64_t b, int64_t k_begin, int64_t k_end, int64_t h_begin,
                              int64_t h_end, const AttentionPartial& result, float* scratch) {
  const int64_t dim = p.dim_head;
  const int64_t entries = p.queries * p.heads;
  const int64_t heads = h_end - h_begin;
  float* queries = scratch;  // (queries, heads, dim_head)
  float* scores = queries + entries * dim;
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
    const float* keys[kKeyTile];
    const float* values[kKeyTile];
    for (int64_t j = 0; j < kKeyTile; ++j) {
      const int64_t row = slots[std::min(j, count - 1)] * p.row_size();
      keys[j] = p.key_cache + row;
      values[j] = p.value_cache + row;
    }
    if (count < kKeyTile) std::fill(scores, scores + entries * kKeyTile, 0.0f);
    for (int64_t j = 0; j < count; j += kWidth) {
      for (int64_t h = h_begin; h < h_end; ++h) {
        for (int64_t e = h; e < entries; e += p.heads) {
          store(scores + e * kKeyTile + j, multiply_keys(queries + e * dim, keys + j, h * dim, dim));
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
