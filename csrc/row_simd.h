// The vector kernels of rows. Included by one source per instruction set, after its simd_*.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "row_kernel.h"
#include "simd_exp2.h"

namespace cpmbee {
namespace {

// gelu(x) = x * Phi(x) to 1e-6, relative where x is above -5, as max(x, 0) - |x| * Phi(-|x|).
//
// Phi(-u) = exp(-u^2 / 2) * P(t), t = 1 / (1 + 0.35 u): the form of Abramowitz and Stegun, Handbook of Mathematical
// Functions, 7.1.26, with a polynomial of degree 9 fitted for the least relative error, 3.2e-8, on 0 <= u <= 13.3;
// beyond that Phi(-u) is no normal number. The form keeps the negative side exact, where 1 + erf(x) cancels.
SIMD_INLINE Vec gelu(Vec x) {
  constexpr float kHalfLog2E = 0.72134752f;
  const Vec size = max(x, sub(zero(), x));
  const Vec t = div(broadcast(1.0f), fma(size, broadcast(0.35f), broadcast(1.0f)));
  Vec p = broadcast(-2.911513702e-2f);
  p = fma(p, t, broadcast(1.438189933e-1f));
  p = fma(p, t, broadcast(-2.553921684e-1f));
  p = fma(p, t, broadcast(1.587978367e-1f));
  p = fma(p, t, broadcast(-2.284426413e-2f));
  p = fma(p, t, broadcast(1.053924827e-1f));
  p = fma(p, t, broadcast(1.198630091e-1f));
  p = fma(p, t, broadcast(1.398575722e-1f));
  p = fma(p, t, broadcast(1.396216598e-1f));
  const Vec exponential = exp2_nonpositive(mul(mul(size, broadcast(-kHalfLog2E)), size));
  const Vec tail = mul(mul(p, t), exponential);
  return sub(max(zero(), x), mul(size, tail));
}

SIMD_TARGET void gated_gelu(const float* gate, const float* value, int64_t count, float* result) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(result + i, mul(gelu(load(gate + i)), load(value + i)));
  if (i == count) return;
  const int64_t n = count - i;
  store_first(result + i, mul(gelu(load_first(gate + i, n)), load_first(value + i, n)), n);
}

// kWidth values of the stream from `at` on; if there is an addend, with that, and kept as the sum.
SIMD_INLINE Vec added(const float* stream, const float* addend, float* sum, int64_t at) {
  const Vec x = load(stream + at);
  if (addend == nullptr) return x;
  const Vec total = add(x, load(addend + at));
  store(sum + at, total);
  return total;
}

SIMD_TARGET void add_norm(const float* stream, const float* addend, const float* weight, int64_t count, float epsilon,
                          float* sum, float* normed) {
  constexpr int kSums = 4;
  Vec squares[kSums] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kSums * kWidth <= count; i += kSums * kWidth) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) {
      const int64_t at = i + s * kWidth;
      const Vec x = added(stream, addend, sum, at);
      squares[s] = fma(x, x, squares[s]);
    }
  }
  for (; i + kWidth <= count; i += kWidth) {
    const Vec x = added(stream, addend, sum, i);
    squares[0] = fma(x, x, squares[0]);
  }
  if (i < count) {
    Vec x = load_first(stream + i, count - i);
    if (addend != nullptr) {
      x = add(x, load_first(addend + i, count - i));
      store_first(sum + i, x, count - i);
    }
    squares[1] = fma(x, x, squares[1]);
  }
  const float total = sum_lanes(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
  const float* values = addend == nullptr ? stream : sum;
  const Vec factor = broadcast(1.0f / std::sqrt(total / static_cast<float>(count) + epsilon));
  for (i = 0; i + kWidth <= count; i += kWidth) {
    store(normed + i, mul(mul(load(values + i), factor), load(weight + i)));
  }
  if (i < count) {
    const int64_t n = count - i;
    store_first(normed + i, mul(mul(load_first(values + i, n), factor), load_first(weight + i, n)), n);
  }
}

struct SineCosine {
  Vec sine;
  Vec cosine;
};

// Of |x| <= 2^16, to 2e-7: x = n * pi + r, and polynomials of the least error on -pi/2 <= r <= pi/2.
SIMD_INLINE SineCosine sine_cosine(Vec x) {
  constexpr float kPi = 3.14159274f;        // pi as a float; n has few enough bits that x - n * kPi is exact
  constexpr float kPiRest = -8.74227801e-8f;  // pi - kPi
  const Vec n = round_to_integer(mul(x, broadcast(0.318309886f)));
  const Vec r = fma(n, broadcast(-kPiRest), fma(n, broadcast(-kPi), x));
  const Vec odd = sub(n, mul(broadcast(2.0f), round_to_integer(mul(n, broadcast(0.5f)))));  // -1, 0 or 1
  const Vec sign = fma(mul(odd, odd), broadcast(-2.0f), broadcast(1.0f));
  const Vec z = mul(r, r);
  Vec s = broadcast(2.605780198e-6f);
  s = fma(s, z, broadcast(-1.980960268e-4f));
  s = fma(s, z, broadcast(8.333066242e-3f));
  s = fma(s, z, broadcast(-1.666665956e-1f));
  s = fma(mul(s, z), r, r);
  Vec c = broadcast(-2.619380845e-7f);
  c = fma(c, z, broadcast(2.476930387e-5f));
  c = fma(c, z, broadcast(-1.388856916e-3f));
  c = fma(c, z, broadcast(4.166665577e-2f));
  c = fma(mul(c, z), z, fma(z, broadcast(-0.5f), broadcast(1.0f)));
  return {mul(s, sign), mul(c, sign)};
}

SIMD_TARGET void rotate(const Rotation& rotation, float position, const float* row, float* result) {
  const int64_t pairs = rotation.pairs;
  for (int64_t i = 0; i < pairs; i += kWidth) {
    const int64_t n = std::min<int64_t>(kWidth, pairs - i);
    const bool whole = n == kWidth;
    Vec phase = mul(broadcast(position), whole ? load(rotation.frequencies + i)
                                               : load_first(rotation.frequencies + i, n));
    if (rotation.half_phases) phase = round_to_half(phase);
    const SineCosine turn = sine_cosine(phase);
    const Vec first = whole ? load(row + i) : load_first(row + i, n);
    const Vec second = whole ? load(row + pairs + i) : load_first(row + pairs + i, n);
    const Vec new_first = sub(mul(first, turn.cosine), mul(second, turn.sine));
    const Vec new_second = fma(second, turn.cosine, mul(first, turn.sine));
    if (whole) {
      store(result + i, new_first);
      store(result + pairs + i, new_second);
    } else {
      store_first(result + i, new_first, n);
      store_first(result + pairs + i, new_second, n);
    }
  }
}

}  // namespace
}  // namespace cpmbee
