// Prefill: one head, a tile of queries, keys in packed tiles, sums in registers. Included after attention_simd.h.
#pragma once

#include <type_traits>

#include "attention_simd.h"

namespace cpmbee {
namespace {

constexpr int kPanel = kPanelVectors * kWidth;

int64_t padded_dim(int64_t dim_head) { return (dim_head + kPanel - 1) / kPanel * kPanel; }

// c[r] = c[r] * factor[r] + sum over k of a[r][k] * panel[k], for R rows and V vectors; without factors c is replaced.
template <int R, int V>
SIMD_TARGET void multiply_panel(int64_t depth, const float* a, int64_t a_stride, const float* panel, float* c,
                                int64_t c_stride, const float* factors) {
  Vec sums[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sums[r][v] =
          factors == nullptr ? zero() : mul(load(c + r * c_stride + v * kWidth), broadcast(factors[r]));
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load(panel + k * kPanel + v * kWidth);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const Vec x = broadcast(a[r * a_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = fma(x, b[v], sums[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kWidth, sums[r][v]);
  }
}

using MultiplyPanel = void (*)(int64_t, const float*, int64_t, const float*, float*, int64_t, const float*);

template <int V>
MultiplyPanel multiply_rows(int64_t rows) {
  constexpr MultiplyPanel kByRows[kRows] = {multiply_panel<1, V>, multiply_panel<2, V>, multiply_panel<3, V>,
                                            multiply_panel<4, V>, multiply_panel<5, V>, multiply_panel<6, V>};
  return kByRows[rows - 1];
}

// The kernel for `rows` (1 .. kRows) rows and `vectors` (1 .. kPanelVectors) vectors.
MultiplyPanel choose_panel(int64_t rows, int64_t vectors) {
  if constexpr (kPanelVectors > 2) {
    if (vectors == 4) return multiply_rows<4>(rows);
    if (vectors == 3) return multiply_rows<3>(rows);
  }
  return vectors == 2 ? multiply_rows<2>(rows) : multiply_rows<1>(rows);
}

// Rows (kKeyTile, dim_head) to (panels, dim_head, kPanel): for each of dim_head numbers, the keys side by side.
SIMD_TARGET void pack_keys(const float* rows, int64_t dim_head, float* packed) {
  for (int64_t j = 0; j < kKeyTile; j += kWidth) {
    float* column = packed + j / kPanel * kPanel * dim_head + j % kPanel;
    Vec block[kWidth];
    int64_t d = 0;
    for (; d + kWidth <= dim_head; d += kWidth) {
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) block[i] = load(rows + (j + i) * dim_head + d);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(column + (d + i) * kPanel, block[i]);
    }
    if (d < dim_head) {
      for (int i = 0; i < kWidth; ++i) block[i] = load_first(rows + (j + i) * dim_head + d, dim_head - d);
      transpose(block);
      for (int64_t i = 0; d + i < dim_head; ++i) store(column + (d + i) * kPanel, block[i]);
    }
  }
}

// Only int8 numbers have a factor.
template <class T>
SIMD_INLINE Vec times(Vec x, Vec factor) {
  return std::is_same_v<T, int8_t> ? mul(x, factor) : x;
}

// One row of values times `factor` to its place in (panels, kKeyTile, kPanel); the last vector is filled up with zeros.
template <class T>
SIMD_INLINE void pack_value(const T* row, int64_t j, int64_t dim_head, float factor, float* packed) {
  const Vec x = broadcast(factor);
  int64_t d = 0;
  for (; d + kWidth <= dim_head; d += kWidth) {
    store(packed + d / kPanel * kPanel * kKeyTile + j * kPanel + d % kPanel, times<T>(load(row + d), x));
  }
  if (d < dim_head) {
    const Vec last = times<T>(load_first(row + d, dim_head - d), x);
    store(packed + d / kPanel * kPanel * kKeyTile + j * kPanel + d % kPanel, last);
  }
}

// Copies keys [begin, end) of the tile that starts at key `first`, and their values, out of the cache: keys as rows
// (kKeyTile, dim_head), values packed. Past the end the last key is repeated: those weights will be zero.
//
// Cache rows lie far apart, often a power of two apart, where they push each other out of the processor's caches. So
// they are fetched a few at a time, while the tile before is computed, and the next few are asked for in advance.
template <class T>
SIMD_TARGET void fetch_rows(const AttentionProblem& p, int64_t b, int64_t h, int64_t first, int64_t begin, int64_t end,
                            float* keys, float* values) {
  constexpr bool kScaled = std::is_same_v<T, int8_t>;
  const int32_t* slots = p.slots + b * p.keys;
  const auto head_of = [&](int64_t j) { return slots[std::min(first + j, p.keys - 1)] * p.heads + h; };
  for (int64_t j = end; j < std::min(2 * end - begin, kKeyTile); ++j) {
    const int64_t head = head_of(j);
    for (int64_t d = 0; d < p.dim_head; d += kLine / sizeof(T)) {
      __builtin_prefetch(p.key_cache.as<T>() + head * p.dim_head + d);
      __builtin_prefetch(p.value_cache.as<T>() + head * p.dim_head + d);
    }
    if constexpr (kScaled) {
      __builtin_prefetch(p.key_cache.scales + head);
      __builtin_prefetch(p.value_cache.scales + head);
    }
  }
  for (int64_t j = begin; j < end; ++j) {
    const int64_t head = head_of(j);
    float key_scale = 1.0f;
    float value_scale = 1.0f;
    if constexpr (kScaled) {
      key_scale = p.key_cache.scales[head];
      value_scale = p.value_cache.scales[head];
    }
    copy_scaled(keys + j * p.dim_head, p.key_cache.as<T>() + head * p.dim_head, p.dim_head, key_scale);
    pack_value(p.value_cache.as<T>() + head * p.dim_head, j, p.dim_head, value_scale, values);
  }
}

// The first key of the next tile after the one at `k` that some query sees, or `keys` when there is none.
int64_t next_tile(const uint8_t* key_tiles, int64_t k, int64_t keys) {
  do {
    k += kKeyTile;
  } while (k < keys && !key_tiles[k / kKeyTile]);
  return std::min(k, keys);
}

size_t tile_scratch_floats(const AttentionProblem& p) {
  return kQueryTile * (p.dim_head + padded_dim(p.dim_head))       // queries, context
         + kKeyTile * (2 * p.dim_head + 2 * padded_dim(p.dim_head));  // keys as rows and packed, values of two tiles
}

template <class T>
SIMD_TARGET void attend_tile(const AttentionProblem& p, int64_t b, int64_t h, int64_t q_begin, int64_t q_end,
                             const uint8_t* key_tiles, float* scratch) {
  const int64_t dim = p.dim_head;
  const int64_t wide = padded_dim(dim);
  float* keys = scratch;
  float* next_keys = keys + kKeyTile * dim;
  float* values = next_keys + kKeyTile * dim;
  float* next_values = values + kKeyTile * wide;
  float* contexts = next_values + kKeyTile * wide;
  float* queries = contexts + kQueryTile * wide;
  const float* const head_bias = p.bias->head(h);
  const float* const bias[kRows] = {head_bias, head_bias, head_bias, head_bias, head_bias, head_bias};
  float maxima[kQueryTile];
  float sums[kQueryTile];
  const int64_t num_queries = q_end - q_begin;
  std::fill(maxima, maxima + num_queries, kNothingSeen);
  std::fill(sums, sums + num_queries, 0.0f);
  std::fill(contexts, contexts + num_queries * wide, 0.0f);
  for (int64_t q = 0; q < num_queries; ++q) copy_scaled(queries + q * dim, p.query(b, q_begin + q, h), dim, p.scale);

  int64_t k = next_tile(key_tiles, -kKeyTile, p.keys);
  if (k < p.keys) fetch_rows<T>(p, b, h, k, 0, kKeyTile, next_keys, next_values);
  while (k < p.keys) {
    const int64_t count = std::min(kKeyTile, p.keys - k);
    const int64_t next = next_tile(key_tiles, k, p.keys);
    pack_keys(next_keys, dim, keys);
    std::swap(values, next_values);

    for (int64_t q = 0; q < num_queries; q += kRows) {
      const int64_t n = std::min<int64_t>(kRows, num_queries - q);
      if (next < p.keys) {
        fetch_rows<T>(p, b, h, next, kKeyTile * q / num_queries, kKeyTile * (q + n) / num_queries, next_keys,
                      next_values);
      }
      alignas(64) float scores[kRows * kKeyTile];
      for (int64_t j = 0; j < kKeyTile; j += kPanel) {
        choose_panel(n, kPanelVectors)(dim, queries + q * dim, dim, keys + j * dim, scores + j, kKeyTile, nullptr);
      }
      int16_t padded[kRows][kKeyTile];
      const int16_t* relation[kRows];
      for (int64_t r = 0; r < n; ++r) {
        const int16_t* row = p.relation_row(b, q_begin + q + r) + k;
        relation[r] = whole_tile(row, count, padded[r]);
        if (q + r + kRows < num_queries) {
          __builtin_prefetch(row + kRows * p.keys);
          __builtin_prefetch(row + kRows * p.keys + kKeyTile / 2);
        }
      }
      float factors[kRows];
      weigh(n, scores, relation, bias, maxima + q, sums + q, factors);
      for (int64_t d = 0; d < dim; d += kPanel) {
        const int64_t vectors = std::min<int64_t>(kPanelVectors, (dim - d + kWidth - 1) / kWidth);
        float* context = contexts + q * wide + d;
        choose_panel(n, vectors)(count, scores, kKeyTile, values + d * kKeyTile, context, wide, factors);
      }
    }
    k = next;
  }
  for (int64_t q = 0; q < num_queries; ++q) {
    const float inverse = sums[q] == 0.0f ? 0.0f : 1.0f / sums[q];
    copy_scaled(p.context_row(b, q_begin + q, h), contexts + q * wide, dim, inverse);
  }
}

}  // namespace
}  // namespace cpmbee
