// The quantized kernels for NEON without dot products, which every 64-bit ARM machine has.

#if defined(__aarch64__) && defined(__GNUC__)

#include <arm_neon.h>

#define KERNEL_TARGET
#define KERNEL_INLINE __attribute__((always_inline)) inline

namespace cpmbee {
namespace {

// Of weights in -128 .. 127 and activations in -127 .. 127 two products, 2 * 128 * 127, fit into 16 bits.
KERNEL_INLINE int32x4_t dot(int32x4_t sum, int8x16_t weights, int8x16_t activations, int four) {
  const int32x4_t fours = vreinterpretq_s32_s8(activations);
  const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four == 0   ? vgetq_lane_s32(fours, 0)
                                                       : four == 1 ? vgetq_lane_s32(fours, 1)
                                                       : four == 2 ? vgetq_lane_s32(fours, 2)
                                                                   : vgetq_lane_s32(fours, 3)));
  const int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(x));
  const int16x8_t high = vmull_high_s8(weights, x);
  return vpadalq_s16(sum, vpaddq_s16(low, high));
}

}  // namespace
}  // namespace cpmbee

#include "quantized_neon.h"

namespace cpmbee {

const QuantizedKernels kNeonQuantized = {
    "neon", Isa::neon, kPanelRows, kPanelRows, kMostDirectRows, quantize, multiply_groups};

}  // namespace cpmbee

#endif
