// IEEE half precision as stored, for code that has no instruction for it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cpmbee {

// Half precision as it lies in memory: a type of its own, so that no integer is taken for it.
struct Half {
  uint16_t bits;
};

constexpr float kLargestHalf = 65504.0f;

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t mantissa = half & 1023u;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact
    const float magnitude = static_cast<float>(mantissa) * (1.0f / (1 << 24));
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255u << 23 : (exponent + 112u) << 23) | mantissa << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The nearest number that half precision has, ties to even.
inline float round_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits & 0x80000000u;
  uint32_t magnitude = bits ^ sign;
  if (magnitude >= 255u << 23) return x;  // infinity, NaN
  if (magnitude < 113u << 23) {           // subnormal: at 1/2, floats are as far apart as there
    std::memcpy(&x, &magnitude, sizeof x);
    x = (x + 0.5f) - 0.5f;
    std::memcpy(&magnitude, &x, sizeof magnitude);
  } else {
    magnitude = (magnitude + 0xfffu + (magnitude >> 13 & 1u)) & ~0x1fffu;
    if (magnitude > 0x477fe000u) magnitude = 255u << 23;  // beyond 65504
  }
  bits = sign | magnitude;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The nearest number that half precision has, as it is stored. NaN stays NaN.
inline Half to_half(float x) {
  const float rounded = round_to_half(x);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half = 0;
  if (magnitude > 255u << 23) {
    half = 0x7e00u;
  } else if (magnitude >= 255u << 23) {
    half = 0x7c00u;
  } else if (magnitude >= 113u << 23) {
    half = (magnitude >> 13) - (112u << 10);
  } else {  // subnormal: a multiple of 2^-24
    half = static_cast<uint32_t>(std::abs(rounded) * (1 << 24));
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace cpmbee
