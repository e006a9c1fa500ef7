// The quantized kernels for AVX-VNNI: processors with VNNI but without AVX-512, or kept from using it.

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define KERNEL_TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))

namespace cpmbee {
namespace {

KERNEL_TARGET __attribute__((always_inline)) inline __m256i broadcast4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm256_set1_epi32(four);
}

template <int Bits>
int32_t first_sum(int32_t start) {
  return start;
}

// Adds 32 inputs of 8 outputs, for all rows.
template <int Bits, int Rows>
KERNEL_TARGET __attribute__((always_inline)) inline void add_products(const uint8_t* weight, const int8_t* values,
                                                                     __m256i (&sums)[Rows]) {
  constexpr int64_t kBytes = 64;  // from one vector of the group to the next
  const __m256i mask = _mm256_set1_epi8(15);
#pragma GCC unroll 8
  for (int v = 0; v < Bits; ++v) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + v * kBytes));
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      if constexpr (Bits == 4) {
        const __m256i low = _mm256_and_si256(bytes, mask);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
        sums[r] = _mm256_dpbusd_avx_epi32(sums[r], low, broadcast4(values + (2 * v * Rows + r) * 4));
        sums[r] = _mm256_dpbusd_avx_epi32(sums[r], high, broadcast4(values + ((2 * v + 1) * Rows + r) * 4));
      } else {
        sums[r] = _mm256_dpbusd_avx_epi32(sums[r], bytes, broadcast4(values + (v * Rows + r) * 4));
      }
    }
  }
}

}  // namespace
}  // namespace cpmbee

#include "quantized_avx2.h"

namespace cpmbee {

const QuantizedKernels kAvxVnniQuantized = {
    "avx2-vnni", Isa::avx2, kPanelRows, kPanelRows, kPanelRows, quantize, multiply_groups};

}  // namespace cpmbee

#endif
