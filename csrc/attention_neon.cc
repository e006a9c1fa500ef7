// The vector kernels compiled for NEON, which every 64-bit ARM machine has.

#if defined(__aarch64__) && defined(__GNUC__)

#include "simd_neon.h"

#include "attention_vector.h"

namespace cpmbee {

const AttentionKernels kNeonAttention[kCacheTypes] = {kVectorAttention<float>, kVectorAttention<Half>,
                                                      kVectorAttention<int8_t>};

}  // namespace cpmbee

#endif
