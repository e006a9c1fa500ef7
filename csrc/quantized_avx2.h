// The quantized kernels in vectors of 32 bytes, for AVX2 and for AVX-VNNI. Whoever includes this defines before it
//
//   KERNEL_TARGET   the functions' target attribute
//   add_products<Bits, Rows>()   see multiply_panel()
#pragma once

#include <algorithm>

#include "quantized_block.h"
#include "quantized_kernel.h"
#include "weight_stream.h"

namespace cpmbee {
namespace {

constexpr int64_t kFloats = 8;     // of a vector
constexpr int64_t kChunk = 32;     // inputs whose products are added in one go: every block has a multiple
constexpr int kPanelRows = 4;      // 4 rows x 8 outputs of sums, their inputs and temporaries: 16 registers

KERNEL_TARGET int32_t sum_lanes(__m256i x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

KERNEL_TARGET int32_t largest_lane(__m256i x) {
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

template <int Block>
KERNEL_TARGET void quantize_block(const QuantizedMatrix& m, const ActivationPanel& panel, int64_t r, int64_t b,
                                  const float* block) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i even_odd =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  __m256i largest = _mm256_setzero_si256();
  for (int i = 0; i < Block; i += kFloats) {
    const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(block + i));
    largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, magnitude));
  }
  const BlockScale scale = block_scale(largest_lane(largest));
  const __m256 inverse = _mm256_set1_ps(scale.inverse);
  const __m256i any = _mm256_set1_epi32(scale.inverse == 0.0f ? 0 : -1);
  __m256i sum = _mm256_setzero_si256();
  alignas(kVector) int8_t bytes[Block];
  for (int i = 0; i < Block; i += kChunk) {
    __m256i rounded[4];
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(block + i + part * kFloats), inverse);
      rounded[part] = _mm256_and_si256(_mm256_cvtps_epi32(scaled), any);
      sum = _mm256_add_epi32(sum, rounded[part]);
    }
    const __m256i low = _mm256_packs_epi32(rounded[0], rounded[1]);  // fours of inputs, out of order
    const __m256i high = _mm256_packs_epi32(rounded[2], rounded[3]);
    __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), in_order);
    if (m.bits == 4) packed = _mm256_shuffle_epi8(packed, even_odd);
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes + i), packed);
  }
  store_block<Block>(m, panel, r, b, scale.scale, bytes, sum_lanes(sum));
}

}  // namespace
}  // namespace cpmbee

#include "quantized_rows.h"

namespace cpmbee {
namespace {

// The rows of one panel times one group of outputs, 8 of its 16 outputs at a time within each block.
template <int Bits, int Rows>
KERNEL_TARGET void multiply_panel(const QuantizedMatrix& m, const ActivationPanel& panel, int64_t group,
                                  float* result) {
  constexpr int64_t kVectors = kChunk * Bits / 32;  // of a chunk
  const uint8_t* weight = m.group_weight(group);
  const uint16_t* scales = m.group_scales(group);
  const int8_t* values = panel.values;
  __m256 totals[2][Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) totals[0][r] = totals[1][r] = _mm256_setzero_ps();
  for (int64_t b = 0; b < m.blocks(); ++b) {
    look_up_ahead(weight, m.block_bytes());
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256i sums[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sums[r] = _mm256_set1_epi32(first_sum<Bits>(panel.starts[b * Rows + r]));
      for (int64_t i = 0; i < m.block; i += kChunk) {
        const uint8_t* chunk = weight + i / kChunk * kVectors * kVector;
        if (half == 0) {
          for (int64_t v = 0; v < kVectors; ++v) fetch_ahead(chunk + v * kVector);
        }
        add_products<Bits, Rows>(chunk + half * kVector / 2, values + i * Rows, sums);
      }
      const __m256 weight_scale =
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + b * kLanes + half * kFloats)));
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const __m256 scale = _mm256_mul_ps(weight_scale, _mm256_set1_ps(panel.scales[b * Rows + r]));
        totals[half][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r]), scale, totals[half][r]);
      }
    }
    weight += m.block_bytes();
    values += m.block * Rows;
  }
  const int64_t lanes = std::min(kLanes, m.out_features - group * kLanes);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    alignas(kVector) float outputs[kLanes];
    _mm256_store_ps(outputs, totals[0][r]);
    _mm256_store_ps(outputs + kFloats, totals[1][r]);
    std::copy(outputs, outputs + lanes, result + r * m.out_features + group * kLanes);
  }
}

using MultiplyPanel = void (*)(const QuantizedMatrix&, const ActivationPanel&, int64_t group, float* result);

template <int Bits>
constexpr MultiplyPanel kMultiplyPanel[kPanelRows] = {multiply_panel<Bits, 1>, multiply_panel<Bits, 2>,
                                                      multiply_panel<Bits, 3>, multiply_panel<Bits, 4>};

void multiply_groups(const QuantizedMatrix& m, const QuantizedRows& rows, int64_t group_begin, int64_t group_end,
                     float* result) {
  for (int64_t group = group_begin; group < group_end; ++group) {
    for (int64_t p = 0; p < rows.panels(); ++p) {
      const ActivationPanel panel = rows.panel(p);
      const MultiplyPanel kernel = (m.bits == 4 ? kMultiplyPanel<4> : kMultiplyPanel<8>)[panel.rows - 1];
      kernel(m, panel, group, result + rows.first_row(p) * m.out_features);
    }
  }
}

}  // namespace
}  // namespace cpmbee
