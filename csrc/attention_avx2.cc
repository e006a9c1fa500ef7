// The vector kernels compiled for AVX2 with FMA; run only where the machine has it.

#if defined(__x86_64__) && defined(__GNUC__)

#include "simd_avx2.h"

#include "attention_vector.h"

namespace cpmbee {

const AttentionKernels kAvx2Attention[kCacheTypes] = {kVectorAttention<float>, kVectorAttention<Half>,
                                                      kVectorAttention<int8_t>};

}  // namespace cpmbee

#endif
