// Powers of two in vectors. Included by one source per instruction set, after its simd_*.h.
#pragma once

namespace cpmbee {
namespace {

// 2^x for x <= 0 to 2e-7; zero below -126, where the result would be subnormal; NaN stays.
SIMD_INLINE Vec exp2_nonpositive(Vec x) {
  const Vec lowest = broadcast(-126.0f);
  const Vec y = max(lowest, x);
  const Vec n = round_to_integer(y);
  const Vec f = sub(y, n);
  Vec p = broadcast(1.326472731e-3f);  // least relative error on [-0.5, 0.5] among those that are 1 at 0
  p = fma(p, f, broadcast(9.671512991e-3f));
  p = fma(p, f, broadcast(5.550733581e-2f));
  p = fma(p, f, broadcast(2.402224243e-1f));
  p = fma(p, f, broadcast(6.931470037e-1f));
  p = fma(p, f, broadcast(1.0f));
  return zero_where_less(scale_by_power(p, n), x, lowest);
}

}  // namespace
}  // namespace cpmbee
