// The vector kernels compiled for AVX-512; run only where the machine has it.

#if defined(__x86_64__) && defined(__GNUC__)

#include "simd_avx512.h"

#include "attention_vector.h"

namespace cpmbee {

const AttentionKernels kAvx512Attention[kCacheTypes] = {kVectorAttention<float>, kVectorAttention<Half>,
                                                        kVectorAttention<int8_t>};

}  // namespace cpmbee

#endif
