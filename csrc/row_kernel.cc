#include "row_kernel.h"

#include <algorithm>
#include <cmath>

#include "half.h"

namespace cpmbee {
namespace {

constexpr int64_t kJobValues = 1 << 14;
constexpr int64_t kTinyWork = 1 << 15;  // values that take less time than waking a thread

template <class F>
void for_each_row(int64_t rows, int64_t width, const Executor& executor, F&& body) {
  if (width == 0) return;  // however many rows a hostile shape claims
  if (rows * width <= kTinyWork) {
    for (int64_t row = 0; row < rows; ++row) body(row);
    return;
  }
  const int64_t job_rows = std::max<int64_t>(1, kJobValues / width);
  executor.for_each((rows + job_rows - 1) / job_rows, [&](size_t job) {
    const int64_t begin = job * job_rows;
    const int64_t end = std::min(begin + job_rows, rows);
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

}  // namespace

const RowKernels& row_kernels(Isa isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa == Isa::avx512) return kAvx512Rows;
  if (isa == Isa::avx2) return kAvx2Rows;
#elif defined(__aarch64__) && defined(__GNUC__)
  if (isa == Isa::neon) return kNeonRows;
#endif
  (void)isa;
  return kScalarRows;
}

void gate_rows(const float* both, int64_t rows, int64_t width, float* result, const RowKernels& kernels,
               const Executor& executor) {
  for_each_row(rows, width, executor, [&](int64_t row) {
    const float* gate = both + row * 2 * width;
    kernels.gated_gelu(gate, gate + width, width, result + row * width);
  });
}

void norm_rows(const float* stream, const float* addend, const float* weight, int64_t rows, int64_t width,
               float epsilon, float* sum, float* normed, const RowKernels& kernels, const Executor& executor) {
  for_each_row(rows, width, executor, [&](int64_t row) {
    const int64_t begin = row * width;
    const float* added = addend == nullptr ? nullptr : addend + begin;
    kernels.add_norm(stream + begin, added, weight, width, epsilon, sum == nullptr ? nullptr : sum + begin,
                     normed + begin);
  });
}

void rotate_rows(const Rotation& rotation, const float* values, const int32_t* subscripts, int64_t rows, float* result,
                 const RowKernels& kernels, const Executor& executor) {
  constexpr float kMostReducible = 1 << 16;  // beyond, the vector kernels' phases would lose accuracy
  const int64_t width = 2 * rotation.pairs;
  for_each_row(rows, width, executor, [&](int64_t row) {
    const float* from = values + row * width;
    float* to = result + row * width;
    if (subscripts[row] == 0) {
      if (to != from) std::copy(from, from + width, to);
      return;
    }
    float position = static_cast<float>(subscripts[row]) * rotation.distance_scale;
    if (rotation.half_phases) position = round_to_half(position);
    const RowKernels& able = std::abs(position) <= kMostReducible ? kernels : kScalarRows;
    able.rotate(rotation, position, from, to);
  });
}

}  // namespace cpmbee
