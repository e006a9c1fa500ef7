// Activations to int8 with NEON; part of quantized_neon.h.
#pragma once

#include <arm_neon.h>

#include "quantized_block.h"
#include "quantized_kernel.h"

namespace cpmbee {
namespace {

template <int Block>
void quantize_block(const QuantizedMatrix& m, const ActivationPanel& panel, int64_t r, int64_t b, const float* block) {
  constexpr uint8_t kEvenOdd[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
  int32x4_t largest = vdupq_n_s32(0);
  for (int i = 0; i < Block; i += 4) {
    const int32x4_t bits = vreinterpretq_s32_f32(vld1q_f32(block + i));
    largest = vmaxq_s32(largest, vandq_s32(bits, vdupq_n_s32(0x7fffffff)));
  }
  const BlockScale scale = block_scale(vmaxvq_s32(largest));
  const float32x4_t inverse = vdupq_n_f32(scale.inverse);
  int32x4_t sum = vdupq_n_s32(0);
  alignas(kVector) int8_t bytes[Block];
  for (int i = 0; i < Block; i += 16) {
    int32x4_t rounded[4];
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      // Nearest, ties to even; infinity times an inverse of 0 is NaN, which becomes 0.
      rounded[part] = vcvtnq_s32_f32(vmulq_f32(vld1q_f32(block + i + part * 4), inverse));
      sum = vaddq_s32(sum, rounded[part]);
    }
    const int16x8_t low = vmovn_high_s32(vmovn_s32(rounded[0]), rounded[1]);
    const int16x8_t high = vmovn_high_s32(vmovn_s32(rounded[2]), rounded[3]);
    const int8x16_t packed = vmovn_high_s16(vmovn_s16(low), high);
    vst1q_s8(bytes + i, m.bits == 4 ? vqtbl1q_s8(packed, vld1q_u8(kEvenOdd)) : packed);
  }
  store_block<Block>(m, panel, r, b, scale.scale, bytes, vaddvq_s32(sum));
}

}  // namespace
}  // namespace cpmbee

#include "quantized_rows.h"
