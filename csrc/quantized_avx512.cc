// The quantized kernels for AVX-512 with VNNI; run only where the machine has it.

#if defined(__x86_64__) && defined(__GNUC__)

#include <algorithm>

#include "quantized_avx512_activations.h"
#include "weight_stream.h"

namespace cpmbee {
namespace {

constexpr int64_t kPanelInputs = 5120;    // of expanded weights: 2 groups leave room in the second-level cache
constexpr int64_t kTileGroups = 2;
constexpr int64_t kExpandAhead = 8192;    // bytes fetched ahead of expansion
static_assert(kPanelInputs % kMaxBlock == 0, "panels must be whole blocks");
constexpr int kPanelRows = 6;             // 6 rows x 2 groups of sums, in int32 and in float: 24 of 32 registers
constexpr int kDirectRows = 8;            // of a panel: 8 rows x 1 group of both: 16 registers
constexpr int64_t kMostDirectRows = 16;   // two panels: the second finds the group's weights in the cache

VNNI_INLINE __m512i broadcast4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}

VNNI_INLINE __m512 load_halves(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Adds weights times activations: one vector of 8-bit weights, or the low and high half of one of 4-bit weights.
template <int Bits, int Rows, int Chains>
VNNI_INLINE void step(const uint8_t* weight, const int8_t* values, int chain, __m512i (&sums)[Chains][Rows]) {
  const __m512i bytes = _mm512_loadu_si512(weight);
  if constexpr (Bits == 8) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      sums[chain % Chains][r] = _mm512_dpbusd_epi32(sums[chain % Chains][r], bytes, broadcast4(values + r * 4));
    }
  } else {
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i low = _mm512_and_si512(bytes, mask);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      __m512i& even = sums[2 * chain % Chains][r];
      even = _mm512_dpbusd_epi32(even, low, broadcast4(values + r * 4));
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      __m512i& odd = sums[(2 * chain + 1) % Chains][r];
      odd = _mm512_dpbusd_epi32(odd, high, broadcast4(values + (Rows + r) * 4));
    }
  }
}

// All rows of the one panel times one group of outputs, straight from the weights. Enough independent sums to hide the
// instructions' latency: 4 chains for one row, 2 for up to three.
template <int Bits, int Rows>
VNNI_TARGET void direct(const QuantizedMatrix& m, const ActivationPanel& panel, int64_t group, float* result) {
  constexpr int kChains = Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;
  constexpr int kInputs = 32 / Bits;  // of a vector
  const int64_t blocks = m.blocks();
  const int64_t vectors = m.block / kInputs;
  const uint8_t* weight = m.group_weight(group);
  const uint16_t* scales = m.group_scales(group);
  const int8_t* values = panel.values;
  __m512 totals[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) totals[r] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b) {
    look_up_ahead(weight, m.block_bytes());
    __m512i sums[kChains][Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      sums[0][r] = _mm512_set1_epi32(panel.starts[b * Rows + r]);
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) sums[c][r] = _mm512_setzero_si512();
    }
    for (int64_t v = 0; v < vectors; v += 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        fetch_ahead(weight);
        step<Bits, Rows, kChains>(weight, values, u, sums);
        weight += kVector;
        values += Rows * kInputs;
      }
    }
    const __m512 weight_scale = load_halves(scales + b * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      __m512i sum = sums[0][r];
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) sum = _mm512_add_epi32(sum, sums[c][r]);
      const __m512 scale = _mm512_mul_ps(weight_scale, _mm512_set1_ps(panel.scales[b * Rows + r]));
      totals[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, totals[r]);
    }
  }
  const int64_t left = std::min(kLanes, m.out_features - group * kLanes);
  const auto lanes = static_cast<__mmask16>((1u << left) - 1u);
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) _mm512_mask_storeu_ps(result + r * m.out_features + group * kLanes, lanes, totals[r]);
}

// All rows of one panel times a few groups of outputs, over blocks [begin, end). The groups' weights, one byte each,
// start with block `begin`; the sums of blocks before come from the result. `lanes`: outputs of the last group.
template <int Rows, int Groups>
VNNI_TARGET void tile(const QuantizedMatrix& m, const ActivationPanel& panel, const uint8_t* const* weights,
                      int64_t group, int64_t begin, int64_t end, __mmask16 lanes, float* result) {
  constexpr int64_t kStep = 4;  // inputs of a vector
  const uint8_t* weight[Groups];
  const uint16_t* scales[Groups];
  __m512 totals[Groups][Rows];
  result += group * kLanes;
#pragma GCC unroll 2
  for (int g = 0; g < Groups; ++g) {
    weight[g] = weights[g];
    scales[g] = m.group_scales(group + g);
    const __mmask16 mask = g + 1 == Groups ? lanes : 0xffff;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const float* before = result + r * m.out_features + g * kLanes;
      totals[g][r] = begin == 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, before);
    }
  }
  const int8_t* values = panel.values + begin * m.block * Rows;
  for (int64_t b = begin; b < end; ++b) {
    __m512i sums[Groups][Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      sums[0][r] = _mm512_set1_epi32(panel.starts[b * Rows + r]);
#pragma GCC unroll 2
      for (int g = 1; g < Groups; ++g) sums[g][r] = sums[0][r];
    }
    for (int64_t v = 0; v < m.block; v += 4 * kStep) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        __m512i bytes[Groups];
#pragma GCC unroll 2
        for (int g = 0; g < Groups; ++g) bytes[g] = _mm512_loadu_si512(weight[g] + u * kVector);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const __m512i four = broadcast4(values + (u * Rows + r) * 4);
#pragma GCC unroll 2
          for (int g = 0; g < Groups; ++g) sums[g][r] = _mm512_dpbusd_epi32(sums[g][r], bytes[g], four);
        }
      }
#pragma GCC unroll 2
      for (int g = 0; g < Groups; ++g) weight[g] += 4 * kVector;
      values += 4 * kStep * Rows;
    }
    __m512 weight_scale[Groups];
#pragma GCC unroll 2
    for (int g = 0; g < Groups; ++g) weight_scale[g] = load_halves(scales[g] + b * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512 row_scale = _mm512_set1_ps(panel.scales[b * Rows + r]);
#pragma GCC unroll 2
      for (int g = 0; g < Groups; ++g) {
        const __m512 scale = _mm512_mul_ps(weight_scale[g], row_scale);
        totals[g][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[g][r]), scale, totals[g][r]);
      }
    }
  }
#pragma GCC unroll 2
  for (int g = 0; g < Groups; ++g) {
    const __mmask16 mask = g + 1 == Groups ? lanes : 0xffff;
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      _mm512_mask_storeu_ps(result + r * m.out_features + g * kLanes, mask, totals[g][r]);
    }
  }
}

// 4-bit weights of one group's blocks as bytes, in the order of the stored activations.
VNNI_TARGET void expand(const uint8_t* weight, int64_t bytes, uint8_t* expanded) {
  const __m512i mask = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < bytes; i += kVector) {
    _mm_prefetch(reinterpret_cast<const char*>(weight + i) + kExpandAhead, _MM_HINT_T0);
    const __m512i pairs = _mm512_loadu_si512(weight + i);
    _mm512_store_si512(expanded + 2 * i, _mm512_and_si512(pairs, mask));
    _mm512_store_si512(expanded + 2 * i + kVector, _mm512_and_si512(_mm512_srli_epi16(pairs, 4), mask));
  }
}

using Direct = void (*)(const QuantizedMatrix&, const ActivationPanel&, int64_t group, float* result);
using Tile = void (*)(const QuantizedMatrix&, const ActivationPanel&, const uint8_t* const* weights, int64_t group,
                      int64_t begin, int64_t end, __mmask16 lanes, float* result);

template <int Bits>
constexpr Direct kDirect[kDirectRows] = {direct<Bits, 1>, direct<Bits, 2>, direct<Bits, 3>, direct<Bits, 4>,
                                         direct<Bits, 5>, direct<Bits, 6>, direct<Bits, 7>, direct<Bits, 8>};

template <int Groups>
constexpr Tile kTile[kPanelRows] = {tile<1, Groups>, tile<2, Groups>, tile<3, Groups>,
                                    tile<4, Groups>, tile<5, Groups>, tile<6, Groups>};

void multiply_directly(const QuantizedMatrix& m, const QuantizedRows& rows, int64_t group_begin, int64_t group_end,
                       float* result) {
  for (int64_t group = group_begin; group < group_end; ++group) {
    for (int64_t p = 0; p < rows.panels(); ++p) {
      const ActivationPanel panel = rows.panel(p);
      const Direct kernel = (m.bits == 4 ? kDirect<4> : kDirect<8>)[panel.rows - 1];
      kernel(m, panel, group, result + rows.first_row(p) * m.out_features);
    }
  }
}

void multiply_by_tiles(const QuantizedMatrix& m, const QuantizedRows& rows, int64_t group_begin, int64_t group_end,
                       float* result) {
  alignas(kVector) uint8_t expanded[kTileGroups][kPanelInputs * kLanes];
  const int64_t input_panels = (m.padded_inputs() + kPanelInputs - 1) / kPanelInputs;
  const int64_t panel_blocks = (m.blocks() + input_panels - 1) / input_panels;  // about equal panels
  // Panels of inputs outermost: the activations of one stay in the second-level cache while the groups go by.
  for (int64_t begin = 0; begin < m.blocks(); begin += panel_blocks) {
    const int64_t end = std::min(begin + panel_blocks, m.blocks());
    for (int64_t group = group_begin; group < group_end; group += kTileGroups) {
      const int64_t groups = std::min(kTileGroups, group_end - group);
      const int64_t left = std::min(kLanes, m.out_features - (group + groups - 1) * kLanes);
      const auto lanes = static_cast<__mmask16>((1u << left) - 1u);
      const uint8_t* weights[kTileGroups] = {};
      for (int64_t g = 0; g < groups; ++g) {
        weights[g] = m.group_weight(group + g) + begin * m.block_bytes();
        if (m.bits == 8) continue;
        expand(weights[g], (end - begin) * m.block_bytes(), expanded[g]);
        weights[g] = expanded[g];
      }
      for (int64_t p = 0; p < rows.panels(); ++p) {
        const ActivationPanel panel = rows.panel(p);
        const Tile kernel = (groups == 1 ? kTile<1> : kTile<2>)[panel.rows - 1];
        kernel(m, panel, weights, group, begin, end, lanes, result + rows.first_row(p) * m.out_features);
      }
    }
  }
}

void multiply_groups(const QuantizedMatrix& m, const QuantizedRows& rows, int64_t group_begin, int64_t group_end,
                     float* result) {
  (rows.direct() ? multiply_directly : multiply_by_tiles)(m, rows, group_begin, group_end, result);
}

}  // namespace

const QuantizedKernels kAvx512VnniQuantized = {
    "avx512-vnni", Isa::avx512, kPanelRows, kDirectRows, kMostDirectRows, quantize, multiply_groups};

}  // namespace cpmbee

#endif
