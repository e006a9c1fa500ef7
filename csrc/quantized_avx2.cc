// The quantized kernels for AVX2 without VNNI; run only where the machine has it.

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define KERNEL_TARGET __attribute__((target("avx2,fma,f16c")))

namespace cpmbee {
namespace {

KERNEL_TARGET __attribute__((always_inline)) inline __m256i broadcast4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm256_set1_epi32(four);
}

// Where a block's sum starts: the zero point of 8-bit weights is taken off the weights themselves.
template <int Bits>
int32_t first_sum(int32_t start) {
  return Bits == 4 ? start : 0;
}

// Adds 32 inputs of 8 outputs, for all rows. Products of bytes are added in pairs with saturation to 16 bits, which
// must not happen. 4 bits: 8 pairs of at most 2 * 15 * 127 still fit. 8 bits: of q - 128 and an activation, the sign
// moves to the activation (at least -127), and 2 * 128 * 127 fits.
template <int Bits, int Rows>
KERNEL_TARGET __attribute__((always_inline)) inline void add_products(const uint8_t* weight, const int8_t* values,
                                                                     __m256i (&sums)[Rows]) {
  constexpr int64_t kBytes = 64;  // from one vector of the group to the next
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (Bits == 4) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i pairs[Rows];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + v * kBytes));
      const __m256i low = _mm256_and_si256(bytes, mask);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const __m256i even = _mm256_maddubs_epi16(low, broadcast4(values + (2 * v * Rows + r) * 4));
        const __m256i odd = _mm256_maddubs_epi16(high, broadcast4(values + ((2 * v + 1) * Rows + r) * 4));
        const __m256i both = _mm256_add_epi16(even, odd);
        pairs[r] = v == 0 ? both : _mm256_add_epi16(pairs[r], both);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs[r], ones));
  } else {
    const __m256i zero_point = _mm256_set1_epi8(-128);
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + v * kBytes));
      const __m256i centered = _mm256_xor_si256(bytes, zero_point);
      const __m256i magnitude = _mm256_abs_epi8(centered);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const __m256i turned = _mm256_sign_epi8(broadcast4(values + (v * Rows + r) * 4), centered);
        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, turned), ones));
      }
    }
  }
}

}  // namespace
}  // namespace cpmbee

#include "quantized_avx2.h"

namespace cpmbee {

const QuantizedKernels kAvx2Quantized = {
    "avx2", Isa::avx2, kPanelRows, kPanelRows, kPanelRows, quantize, multiply_groups};

}  // namespace cpmbee

#endif
