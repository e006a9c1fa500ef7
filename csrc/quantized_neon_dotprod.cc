// The quantized kernels for NEON with dot products (from ARMv8.2 on); run only where the machine has them.

#include "quantized_kernel.h"

#ifdef CPMBEE_NEON_DOTPROD

#include <arm_neon.h>

#ifdef __ARM_FEATURE_DOTPROD
#define KERNEL_TARGET
#else
#define KERNEL_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define KERNEL_INLINE KERNEL_TARGET __attribute__((always_inline)) inline

namespace cpmbee {
namespace {

KERNEL_INLINE int32x4_t dot(int32x4_t sum, int8x16_t weights, int8x16_t activations, int four) {
  switch (four) {  // a constant wherever this is used
    case 0:
      return vdotq_laneq_s32(sum, weights, activations, 0);
    case 1:
      return vdotq_laneq_s32(sum, weights, activations, 1);
    case 2:
      return vdotq_laneq_s32(sum, weights, activations, 2);
    default:
      return vdotq_laneq_s32(sum, weights, activations, 3);
  }
}

}  // namespace
}  // namespace cpmbee

#include "quantized_neon.h"

namespace cpmbee {

const QuantizedKernels kNeonDotprodQuantized = {
    "neon-dotprod", Isa::neon, kPanelRows, kPanelRows, kMostDirectRows, quantize, multiply_groups};

}  // namespace cpmbee

#endif
