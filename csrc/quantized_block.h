// What quantizing one block of activations means, shared by all kernels.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "quantized_kernel.h"

namespace cpmbee {

constexpr float kLargestActivation = 127.0f;
constexpr float kNoActivation = 1e-35f;  // blocks of nothing larger are zero: the inverse scale stays finite

struct BlockScale {
  float scale;    // of the activations; NaN when one of them is infinite or NaN
  float inverse;  // 0: all values are 0
};

inline int32_t magnitude_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

// From the largest magnitude_bits() of the block.
inline BlockScale block_scale(int32_t largest) {
  constexpr int32_t kInfinityBits = 0x7f800000;
  if (largest >= kInfinityBits) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  float magnitude;
  std::memcpy(&magnitude, &largest, sizeof magnitude);
  if (magnitude < kNoActivation) return {0.0f, 0.0f};
  return {magnitude / kLargestActivation, kLargestActivation / magnitude};
}

// Where an input lies among a row's stored values: 4-bit weights meet the even inputs of 8 first, then the odd ones.
inline int64_t stored_position(int64_t bits, int64_t input) {
  if (bits == 8) return input;
  return input / 8 * 8 + input % 2 * 4 + input % 8 / 2;
}

// Puts block `b` of row `r` into the panel: its values, in stored order, and what belongs to them.
template <int Block>
inline void store_block(const QuantizedMatrix& m, const ActivationPanel& panel, int64_t r, int64_t b, float scale,
                        const int8_t* values, int32_t sum) {
  panel.scales[b * panel.rows + r] = scale;
  panel.starts[b * panel.rows + r] = static_cast<int32_t>(-m.zero_point()) * sum;
  int8_t* out = panel.values + (b * Block * panel.rows + r * 4);
  if (panel.rows == 1) {
    std::memcpy(out, values, Block);
    return;
  }
  for (int64_t i = 0; i < Block; i += 4) std::memcpy(out + i * panel.rows, values + i, 4);
}

}  // namespace cpmbee
