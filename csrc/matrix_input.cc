#include "matrix_input.h"

#include "op_inputs.h"

namespace cpmbee {
namespace {

constexpr int64_t kMostFeatures = 1 << 24;  // on each side: products of two of them and a few small factors fit 64 bits

int64_t integer_attribute(const char* op, const NodeInfo& info, const char* name, int64_t low, int64_t high) {
  const int64_t value = info.integer(name);
  if (value < low || value > high) {
    throw InvalidInput(std::string(op) + ": " + name + " must be in " + std::to_string(low) + ".." +
                       std::to_string(high) + ", not " + std::to_string(value));
  }
  return value;
}

}  // namespace

MatrixInput::MatrixInput(const char* op, const NodeInfo& info) : op_(op) {
  matrix_.bits = integer_attribute(op, info, "bits", 4, 8);
  if (matrix_.bits != 4 && matrix_.bits != 8) {
    throw InvalidInput(std::string(op) + ": bits must be 4 or 8, not " + std::to_string(matrix_.bits));
  }
  matrix_.block = integer_attribute(op, info, "block_size", 1, kMaxBlock);
  if (matrix_.block != 32 && matrix_.block != 64 && matrix_.block != 128) {
    throw InvalidInput(std::string(op) + ": block_size must be 32, 64 or 128, not " + std::to_string(matrix_.block));
  }
  matrix_.in_features = integer_attribute(op, info, "in_features", 1, kMostFeatures);
  matrix_.out_features = integer_attribute(op, info, "out_features", 1, kMostFeatures);
  // Constants are refused when the model is loaded, other tensors when they come.
  if (const auto weight = info.constant_input(kWeight)) check_weight(*weight);
  if (const auto scales = info.constant_input(kScales)) check_scales(*scales);
}

QuantizedMatrix MatrixInput::get(const Context& context) const {
  const Tensor weight = context.input(kWeight);
  const Tensor scales = context.input(kScales);
  check_weight(weight);
  check_scales(scales);
  QuantizedMatrix matrix = matrix_;
  matrix.weight = weight.as<uint8_t>();
  matrix.scales = scales.as<uint16_t>();
  return matrix;
}

void MatrixInput::check_weight(const Tensor& weight) const {
  const int64_t vectors = matrix_.padded_inputs() * matrix_.bits / 32;
  require_shape(op_, "weight", weight, {matrix_.groups(), vectors, kLanes, 4},
                matrix_.bits == 4 ? "[N/16,K/8,16,4]" : "[N/16,K/4,16,4]");
}

void MatrixInput::check_scales(const Tensor& scales) const {
  require_shape(op_, "scales", scales, {matrix_.groups(), matrix_.blocks(), kLanes}, "[N/16,K/block_size,16]");
}

}  // namespace cpmbee
