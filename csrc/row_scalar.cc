// The reference kernels: each row's work as it is defined, for every machine. Test oracle of the others.

#include <cmath>

#include "half.h"
#include "row_kernel.h"

namespace cpmbee {
namespace {

void gated_gelu(const float* gate, const float* value, int64_t count, float* result) {
  constexpr double kSqrtHalf = 0.70710678118654752;
  for (int64_t i = 0; i < count; ++i) {
    const double x = gate[i];
    result[i] = static_cast<float>(x * 0.5 * std::erfc(-x * kSqrtHalf)) * value[i];
  }
}

void add_norm(const float* stream, const float* addend, const float* weight, int64_t count, float epsilon, float* sum,
              float* normed) {
  double squares = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const float x = addend == nullptr ? stream[i] : stream[i] + addend[i];
    if (addend != nullptr) sum[i] = x;
    squares += static_cast<double>(x) * x;
  }
  const float* values = addend == nullptr ? stream : sum;
  const auto factor = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(count) + epsilon));
  for (int64_t i = 0; i < count; ++i) normed[i] = values[i] * factor * weight[i];
}

void rotate(const Rotation& rotation, float position, const float* row, float* result) {
  for (int64_t i = 0; i < rotation.pairs; ++i) {
    float phase = position * rotation.frequencies[i];
    if (rotation.half_phases) phase = round_to_half(phase);
    const float cos = std::cos(phase);
    const float sin = std::sin(phase);
    const float first = row[i];
    const float second = row[rotation.pairs + i];
    result[i] = first * cos - second * sin;
    result[rotation.pairs + i] = second * cos + first * sin;
  }
}

}  // namespace

const RowKernels kScalarRows = {gated_gelu, add_norm, rotate};

}  // namespace cpmbee
