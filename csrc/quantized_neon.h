// The quantized kernels in NEON's vectors of 16 bytes, with its dot products and without. Whoever includes this defines
// before it
//
//   KERNEL_TARGET, KERNEL_INLINE   attributes of functions that use dot()
//   dot(sum, weights, activations, four)
//       sum + the products of the 4 bytes in each lane of `weights` with bytes 4 * four .. of `activations`, all signed
//
// A group's vector of 64 bytes is 4 registers here, of 4 outputs each.
#pragma once

#include <algorithm>

#include "quantized_kernel.h"
#include "quantized_neon_activations.h"

namespace cpmbee {
namespace {

constexpr int kPanelRows = 4;             // 4 rows x 4 registers of sums, 4 of activations and 4 of weights: 24 of 32
constexpr int64_t kMostDirectRows = 8;    // two panels: the second finds the group's weights in the cache
constexpr int64_t kPanelInputs = 2048;    // of expanded weights, 32 KB
constexpr int kStep = 16;                 // inputs whose activations, of all rows, are in registers
static_assert(kPanelInputs % kMaxBlock == 0, "panels must be whole blocks");

// What weights look like when they meet the activations.
enum class Form {
  nibbles,   // 4 bits as stored, 0 .. 15: the sums start at what the zero point takes off
  bytes,     // 8 bits as stored, 0 .. 255
  expanded,  // signed bytes without zero point
};

// Signed bytes of 8-bit weights: q - 128.
KERNEL_INLINE int8x16_t centered(uint8x16_t bytes) {
  return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(0x80)));
}
KERNEL_INLINE int8x16_t low_nibbles(uint8x16_t bytes) {
  return vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
}
KERNEL_INLINE int8x16_t high_nibbles(uint8x16_t bytes) { return vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)); }

// Adds kStep inputs of 16 outputs, for all rows. Few rows have two chains of sums, to hide the instructions' latency.
template <Form F, int Rows, int Chains>
KERNEL_INLINE void add_products(const uint8_t* weight, const int8_t* values, int32x4_t (&sums)[Chains][Rows][4]) {
  int8x16_t x[Rows];  // fours of inputs, each for all rows
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) x[r] = vld1q_s8(values + r * 16);
  if constexpr (F == Form::nibbles) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const uint8x16_t bytes = vld1q_u8(weight + v * kVector + part * 16);
        const int8x16_t even = low_nibbles(bytes);
        const int8x16_t odd = high_nibbles(bytes);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const int at = 2 * v * Rows + r;
          sums[0][r][part] = dot(sums[0][r][part], even, x[at / 4], at % 4);
        }
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const int at = (2 * v + 1) * Rows + r;
          sums[Chains - 1][r][part] = dot(sums[Chains - 1][r][part], odd, x[at / 4], at % 4);
        }
      }
    }
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const uint8x16_t bytes = vld1q_u8(weight + v * kVector + part * 16);
        const int8x16_t w = F == Form::bytes ? centered(bytes) : vreinterpretq_s8_u8(bytes);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const int at = v * Rows + r;
          sums[v % Chains][r][part] = dot(sums[v % Chains][r][part], w, x[at / 4], at % 4);
        }
      }
    }
  }
}

// The rows of one panel times one group of outputs, over blocks [begin, end). `weight` is where block `begin` starts;
// the sums of blocks before come from the result.
template <Form F, int Rows>
KERNEL_TARGET void multiply_panel(const QuantizedMatrix& m, const ActivationPanel& panel, const uint8_t* weight,
                                  int64_t group, int64_t begin, int64_t end, float* result) {
  constexpr int kChains = Rows <= 2 ? 2 : 1;
  constexpr int64_t kStepBytes = F == Form::nibbles ? 2 * kVector : 4 * kVector;
  const uint16_t* scales = m.group_scales(group);
  const int8_t* values = panel.values + begin * m.block * Rows;
  const int64_t lanes = std::min(kLanes, m.out_features - group * kLanes);
  result += group * kLanes;
  float32x4_t totals[Rows][4];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    float before[kLanes] = {};
    if (begin != 0) std::copy(result + r * m.out_features, result + r * m.out_features + lanes, before);
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) totals[r][part] = vld1q_f32(before + part * 4);
  }
  for (int64_t b = begin; b < end; ++b) {
    int32x4_t sums[kChains][Rows][4];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        sums[0][r][part] = vdupq_n_s32(F == Form::nibbles ? panel.starts[b * Rows + r] : 0);
        if (kChains == 2) sums[kChains - 1][r][part] = vdupq_n_s32(0);
      }
    }
    for (int64_t i = 0; i < m.block; i += kStep) {
      add_products<F, Rows, kChains>(weight, values, sums);
      weight += kStepBytes;
      values += kStep * Rows;
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const uint16x4_t halves = vld1_u16(scales + b * kLanes + part * 4);
      const float32x4_t weight_scale = vcvt_f32_f16(vreinterpret_f16_u16(halves));
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        int32x4_t sum = sums[0][r][part];
        if (kChains == 2) sum = vaddq_s32(sum, sums[kChains - 1][r][part]);
        const float32x4_t scale = vmulq_n_f32(weight_scale, panel.scales[b * Rows + r]);
        totals[r][part] = vfmaq_f32(totals[r][part], vcvtq_f32_s32(sum), scale);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    float outputs[kLanes];
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) vst1q_f32(outputs + part * 4, totals[r][part]);
    std::copy(outputs, outputs + lanes, result + r * m.out_features);
  }
}

using MultiplyPanel = void (*)(const QuantizedMatrix&, const ActivationPanel&, const uint8_t* weight, int64_t group,
                               int64_t begin, int64_t end, float* result);

template <Form F>
constexpr MultiplyPanel kMultiplyPanel[kPanelRows] = {multiply_panel<F, 1>, multiply_panel<F, 2>, multiply_panel<F, 3>,
                                                      multiply_panel<F, 4>};

template <Form F>
void multiply_panels(const QuantizedMatrix& m, const QuantizedRows& rows, const uint8_t* weight, int64_t group,
                     int64_t begin, int64_t end, float* result) {
  for (int64_t p = 0; p < rows.panels(); ++p) {
    const ActivationPanel panel = rows.panel(p);
    kMultiplyPanel<F>[panel.rows - 1](m, panel, weight, group, begin, end, result + rows.first_row(p) * m.out_features);
  }
}

// `bytes` bytes of a group's weights to signed bytes without zero point, in the order that the activations have.
KERNEL_TARGET void expand(const QuantizedMatrix& m, const uint8_t* weight, int64_t bytes, int8_t* expanded) {
  if (m.bits == 8) {
    for (int64_t i = 0; i < bytes; i += 16) vst1q_s8(expanded + i, centered(vld1q_u8(weight + i)));
    return;
  }
  const int8x16_t zero_point = vdupq_n_s8(8);
  for (int64_t i = 0; i < bytes; i += kVector, expanded += 2 * kVector) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const uint8x16_t both = vld1q_u8(weight + i + part * 16);
      vst1q_s8(expanded + part * 16, vsubq_s8(low_nibbles(both), zero_point));
      vst1q_s8(expanded + kVector + part * 16, vsubq_s8(high_nibbles(both), zero_point));
    }
  }
}

void multiply_expanded(const QuantizedMatrix& m, const QuantizedRows& rows, int64_t group_begin, int64_t group_end,
                       float* result) {
  alignas(kVector) int8_t expanded[kPanelInputs * kLanes];
  const int64_t input_panels = (m.padded_inputs() + kPanelInputs - 1) / kPanelInputs;
  const int64_t panel_blocks = (m.blocks() + input_panels - 1) / input_panels;  // about equal panels
  // Panels of inputs outermost: the activations of one stay in the second-level cache while the groups go by.
  for (int64_t begin = 0; begin < m.blocks(); begin += panel_blocks) {
    const int64_t end = std::min(begin + panel_blocks, m.blocks());
    for (int64_t group = group_begin; group < group_end; ++group) {
      expand(m, m.group_weight(group) + begin * m.block_bytes(), (end - begin) * m.block_bytes(), expanded);
      multiply_panels<Form::expanded>(m, rows, reinterpret_cast<const uint8_t*>(expanded), group, begin, end, result);
    }
  }
}

void multiply_groups(const QuantizedMatrix& m, const QuantizedRows& rows, int64_t group_begin, int64_t group_end,
                     float* result) {
  if (!rows.direct()) return multiply_expanded(m, rows, group_begin, group_end, result);
  const auto kernels = m.bits == 4 ? multiply_panels<Form::nibbles> : multiply_panels<Form::bytes>;
  for (int64_t group = group_begin; group < group_end; ++group) {
    kernels(m, rows, m.group_weight(group), group, 0, m.blocks(), result);
  }
}

}  // namespace
}  // namespace cpmbee
