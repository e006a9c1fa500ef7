// What happens to each row of activations between the products: gate, norm, rotation. Plain C++, no ONNX Runtime.
//
// A row is computed by one thread from itself alone, so results depend neither on the threads nor on the other rows.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "executor.h"

namespace cpmbee {

// How the rows of `SubscriptRotation` turn.
struct Rotation {
  const float* frequencies = nullptr;  // (pairs), none above 1
  int64_t pairs = 0;                   // half of a row's width: entry i turns with entry pairs + i
  float distance_scale = 1.0f;
  bool half_phases = false;  // positions and phases are rounded to half precision, as in training
};

// The inner loops for one instruction set; every pointer may be unaligned, and results may lie where inputs do.
struct RowKernels {
  // result = gelu(gate) * value, gelu(x) = x * (1 + erf(x / sqrt(2))) / 2.
  void (*gated_gelu)(const float* gate, const float* value, int64_t count, float* result);
  // sum = stream + addend; normed = sum / sqrt(mean(sum^2) + epsilon) * weight. Without an addend (null), no sum is
  // written.
  void (*add_norm)(const float* stream, const float* addend, const float* weight, int64_t count, float epsilon,
                   float* sum, float* normed);
  // Turns one row by the phases position * frequencies.
  void (*rotate)(const Rotation& rotation, float position, const float* row, float* result);
};

extern const RowKernels kScalarRows;  // the reference: what the others are compared with
#if defined(__x86_64__) && defined(__GNUC__)
extern const RowKernels kAvx2Rows;
extern const RowKernels kAvx512Rows;
#elif defined(__aarch64__) && defined(__GNUC__)
extern const RowKernels kNeonRows;
#endif

const RowKernels& row_kernels(Isa isa);

// `both` is (rows, 2, width), gates and values; `result` is (rows, width).
void gate_rows(const float* both, int64_t rows, int64_t width, float* result, const RowKernels& kernels,
               const Executor& executor);

// All but `weight` (width) are (rows, width); `addend` and `sum` are null, or neither is.
void norm_rows(const float* stream, const float* addend, const float* weight, int64_t rows, int64_t width,
               float epsilon, float* sum, float* normed, const RowKernels& kernels, const Executor& executor);

// Turns row r of `values` (rows, 2 * pairs) by the phases of subscripts[r].
void rotate_rows(const Rotation& rotation, const float* values, const int32_t* subscripts, int64_t rows, float* result,
                 const RowKernels& kernels, const Executor& executor);

}  // namespace cpmbee
