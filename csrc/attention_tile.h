// Prefill: one head, a tile of queries, keys in packed tiles, sums in registers. Included after attention_simd.h.
#pragma once

#include "attention_simd.h"

namespace cpmbee {
namespace {

constexpr int kRows = 6;  // queries whose sums are in registers at one time
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

// Keys of one tile to (panels, dim_head, kPanel): for each of dim_head numbers, the keys side by side.
SIMD_TARGET void pack_keys(const float* const* rows, int64_t count, int64_t dim_head, float* packed) {
  for (int64_t j = 0; j < kKeyTile; j += kWidth) {
    float* column = packed + j / kPanel * kPanel * dim_head + j % kPanel;
    for (int64_t d = 0; d < dim_head; d += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, dim_head - d);
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        block[i] = j + i >= count ? zero() : n == kWidth ? load(rows[j + i] + d) : load_first(rows[j + i] + d, n);
      }
      transpose(block);
      for (int64_t i = 0; i < n; ++i) store(column + (d + i) * kPanel, block[i]);
    }
  }
}

// Values of one tile to (panels, kKeyTile, kPanel), zeros after dim_head.
SIMD_TARGET void pack_values(const float* const* rows, int64_t count, int64_t dim_head, float* packed) {
  for (int64_t d = 0; d < padded_dim(dim_head); d += kWidth) {
    float* column = packed + d / kPanel * kPanel * kKeyTile + d % kPanel;
    const int64_t n = std::clamp<int64_t>(dim_head - d, 0, kWidth);
    for (int64_t j = 0; j < count; ++j) {
      store(column + j * kPanel, n == kWidth ? load(rows[j] + d) : n == 0 ? zero() : load_first(rows[j] + d, n));
    }
  }
}

size_t tile_scratch_floats(const AttentionProblem& p) {
  return kQueryTile * p.dim_head + kQueryTile * padded_dim(p.dim_head)  // queries, context
         + kKeyTile * p.dim_head + kKeyTile * padded_dim(p.dim_head);   // keys, values
}

SIMD_TARGET void attend_tile(const AttentionProblem& p, int64_t b, int64_t h, int64_t q_begin, int64_t q_end,
                             const uint8_t* key_tiles, float* scratch) {
  const int64_t dim = p.dim_head;
  const int64_t wide = padded_dim(dim);
  float* keys = scratch;
  float* values = keys + kKeyTile * dim;
  float* contexts = values + kKeyTile * wide;
  float* queries = contexts + kQueryTile * wide;
  SoftmaxState states[kQueryTile];
  const int64_t num_queries = q_end - q_begin;
  for (int64_t q = 0; q < num_queries; ++q) copy_scaled(queries + q * dim, p.query(b, q_begin + q, h), dim, p.scale);
  std::fill(contexts, contexts + num_queries * wide, 0.0f);

  for (int64_t k_begin = 0; k_begin < p.keys; k_begin += kKeyTile) {
    if (!key_tiles[k_begin / kKeyTile]) continue;
    const int64_t count = std::min(kKeyTile, p.keys - k_begin);
    const int32_t* slots = p.slots + b * p.keys + k_begin;
    const float* rows[kKeyTile];
    for (int64_t j = 0; j < count; ++j) rows[j] = p.key_cache + slots[j] * p.row_size() + h * dim;
    pack_keys(rows, count, dim, keys);
    for (int64_t j = 0; j < count; ++j) rows[j] = p.value_cache + slots[j] * p.row_size() + h * dim;
    pack_values(rows, count, dim, values);

    for (int64_t q = 0; q < num_queries; q += kRows) {
      const int64_t n = std::min<int64_t>(kRows, num_queries - q);
      alignas(64) float scores[kRows * kKeyTile];
      float factors[kRows];
      for (int64_t j = 0; j < kKeyTile; j += kPanel) {
        choose_panel(n, kPanelVectors)(dim, queries + q * dim, dim, keys + j * dim, scores + j, kKeyTile, nullptr);
      }
      for (int64_t r = 0; r < n; ++r) {
        int16_t padded[kKeyTile];
        const int16_t* relation = whole_tile(p.relation_row(b, q_begin + q + r) + k_begin, count, padded);
        factors[r] = weigh(scores + r * kKeyTile, relation, p.bias->head(h), states[q + r]);
      }
      for (int64_t d = 0; d < dim; d += kPanel) {
        const int64_t vectors = std::min<int64_t>(kPanelVectors, (dim - d + kWidth - 1) / kWidth);
        choose_panel(n, vectors)(count, scores, kKeyTile, values + d * kKeyTile, contexts + q * wide + d, wide, factors);
      }
    }
  }
  for (int64_t q = 0; q < num_queries; ++q) {
    const float inverse = states[q].sum == 0.0f ? 0.0f : 1.0f / states[q].sum;
    copy_scaled(p.context_row(b, q_begin + q, h), contexts + q * wide, dim, inverse);
  }
}

}  // namespace
}  // namespace cpmbee
