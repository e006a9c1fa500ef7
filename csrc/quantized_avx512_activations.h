// Activations to int8 with AVX-512; part of quantized_avx512.cc.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"  // clang does not know the next one
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 about its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <algorithm>

#include "quantized_block.h"
#include "quantized_kernel.h"

#define VNNI_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))
#define VNNI_INLINE VNNI_TARGET __attribute__((always_inline)) inline

namespace cpmbee {
namespace {

template <int Bits, int Block>
VNNI_TARGET void quantize_block(const QuantizedMatrix& m, const ActivationPanel& panel, int64_t r, int64_t b,
                                const float* block, int64_t count) {
  constexpr int kVectors = Block / kLanes;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m128i even_odd = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  __m512 values[kVectors];
  __m512i largest = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    const int64_t left = std::max<int64_t>(0, std::min(kLanes, count - i * kLanes));
    values[i] = count >= Block ? _mm512_loadu_ps(block + i * kLanes)
                               : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1u), block + i * kLanes);
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(values[i]), magnitude));
  }
  const BlockScale scale = block_scale(_mm512_reduce_max_epi32(largest));
  const __m512 inverse = _mm512_set1_ps(scale.inverse);
  const __mmask16 any = scale.inverse == 0.0f ? 0 : 0xffff;
  __m512i sum = _mm512_setzero_si512();
  alignas(kVector) int8_t bytes[Block];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    const __m512i rounded = _mm512_maskz_cvtps_epi32(any, _mm512_mul_ps(values[i], inverse));
    sum = _mm512_add_epi32(sum, rounded);
    const __m128i packed = _mm512_cvtepi32_epi8(rounded);
    const __m128i stored = Bits == 4 ? _mm_shuffle_epi8(packed, even_odd) : packed;
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes + i * kLanes), stored);
  }
  store_block<Block>(m, panel, r, b, scale.scale, bytes, _mm512_reduce_add_epi32(sum));
}

template <int Bits, int Block>
VNNI_TARGET void quantize_rows(const QuantizedMatrix& m, const float* rows, const ActivationPanel& panel, int64_t begin,
                               int64_t end) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    for (int64_t b = begin; b < end; ++b) {
      const float* block = rows + r * m.in_features + b * Block;
      quantize_block<Bits, Block>(m, panel, r, b, block, m.in_features - b * Block);
    }
  }
}

template <int Bits>
void quantize_bits(const QuantizedMatrix& m, const float* rows, const ActivationPanel& panel, int64_t begin,
                   int64_t end) {
  if (m.block == 32) return quantize_rows<Bits, 32>(m, rows, panel, begin, end);
  if (m.block == 64) return quantize_rows<Bits, 64>(m, rows, panel, begin, end);
  quantize_rows<Bits, 128>(m, rows, panel, begin, end);
}

void quantize(const QuantizedMatrix& m, const float* rows, const ActivationPanel& panel, int64_t begin,
              int64_t end) {
  (m.bits == 4 ? quantize_bits<4> : quantize_bits<8>)(m, rows, panel, begin, end);
}

}  // namespace
}  // namespace cpmbee
