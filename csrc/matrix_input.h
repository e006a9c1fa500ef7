// The quantized matrix that an op reads: its attributes, and the two inputs that hold it.
#pragma once

#include "op.h"
#include "quantized_kernel.h"

namespace cpmbee {

// Attributes bits (4 or 8), block_size (32, 64 or 128), in_features, out_features; inputs weight and scales.
class MatrixInput {
 public:
  static constexpr int kWeight = 1;
  static constexpr int kScales = 2;

  // Throws InvalidInput for attributes out of range, and for constant inputs that do not have their shapes.
  MatrixInput(const char* op, const NodeInfo& info);

  int64_t in_features() const { return matrix_.in_features; }
  int64_t out_features() const { return matrix_.out_features; }
  // The matrix of this call, where its inputs lie. Throws InvalidInput unless they have their shapes.
  QuantizedMatrix get(const Context& context) const;

 private:
  void check_weight(const Tensor& weight) const;
  void check_scales(const Tensor& scales) const;

  const char* op_;
  QuantizedMatrix matrix_;  // without its memory
};

}  // namespace cpmbee
