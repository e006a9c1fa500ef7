// QuantizedLinear(x float32 [..., in_features], weight uint8, scales float16) -> y float32 [..., out_features]
//
//   y = x . transposed((q - zero point) * scale), x quantized to int8 for each row and block
//   weight  [N/16, K/8, 16, 4] for 4 bits, [N/16, K/4, 16, 4] for 8: see quantized_kernel.h
//   scales  [N/16, K/block_size, 16]
//
// N is out_features padded to a multiple of 16, K in_features padded to a multiple of block_size.
// Attributes: bits (4 or 8), block_size (32, 64 or 128), in_features, out_features.
//
// The weight is used where it lies: for a constant of a model file that is the mapped file itself.

#include "op.h"
#include "op_inputs.h"
#include "quantized_kernel.h"

namespace cpmbee {
namespace {

constexpr const char* kName = "QuantizedLinear";
constexpr int64_t kMostFeatures = 1 << 24;  // on each side: products of two of them and a few small factors fit 64 bits
constexpr int64_t kMostRows = 1 << 20;
constexpr int kWeight = 1;
constexpr int kScales = 2;

int64_t integer_attribute(const NodeInfo& info, const char* name, int64_t low, int64_t high) {
  const int64_t value = info.integer(name);
  if (value < low || value > high) {
    throw InvalidInput(std::string(kName) + ": " + name + " must be in " + std::to_string(low) + ".." +
                       std::to_string(high) + ", not " + std::to_string(value));
  }
  return value;
}

class QuantizedLinear final : public Kernel {
 public:
  explicit QuantizedLinear(const NodeInfo& info) {
    matrix_.bits = integer_attribute(info, "bits", 4, 8);
    if (matrix_.bits != 4 && matrix_.bits != 8) {
      throw InvalidInput(std::string(kName) + ": bits must be 4 or 8, not " + std::to_string(matrix_.bits));
    }
    matrix_.block = integer_attribute(info, "block_size", 1, kMaxBlock);
    if (matrix_.block != 32 && matrix_.block != 64 && matrix_.block != 128) {
      throw InvalidInput(std::string(kName) + ": block_size must be 32, 64 or 128, not " +
                         std::to_string(matrix_.block));
    }
    matrix_.in_features = integer_attribute(info, "in_features", 1, kMostFeatures);
    matrix_.out_features = integer_attribute(info, "out_features", 1, kMostFeatures);
    // Constants are refused when the model is loaded, other tensors when they come.
    if (const auto weight = info.constant_input(kWeight)) check_weight(*weight);
    if (const auto scales = info.constant_input(kScales)) check_scales(*scales);
  }

  void compute(const Context& context) const override {
    const Tensor x = context.input(0);
    const Tensor weight = context.input(kWeight);
    const Tensor scales = context.input(kScales);
    check_weight(weight);
    check_scales(scales);
    if (x.dims.empty() || x.dims.back() != matrix_.in_features) {
      throw InvalidInput(std::string(kName) + ": x must have the shape [...," + std::to_string(matrix_.in_features) +
                         "], not " + x.shape());
    }
    std::vector<int64_t> result_dims = x.dims;
    result_dims.back() = matrix_.out_features;
    const Tensor result = context.output(0, result_dims);
    QuantizedMatrix matrix = matrix_;
    matrix.weight = weight.as<uint8_t>();
    matrix.scales = scales.as<uint16_t>();
    multiply(matrix, x.as<float>(), rows_of(x), result.as<float>(), quantized_kernels(active_isa()),
             SessionThreads(context));
  }

 private:
  void check_weight(const Tensor& weight) const {
    const int64_t vectors = matrix_.padded_inputs() * matrix_.bits / 32;
    require_shape(kName, "weight", weight, {matrix_.groups(), vectors, kLanes, 4},
                  matrix_.bits == 4 ? "[N/16,K/8,16,4]" : "[N/16,K/4,16,4]");
  }

  void check_scales(const Tensor& scales) const {
    require_shape(kName, "scales", scales, {matrix_.groups(), matrix_.blocks(), kLanes}, "[N/16,K/block_size,16]");
  }

  static int64_t rows_of(const Tensor& x) {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < x.dims.size(); ++i) {
      if (x.dims[i] == 0) return 0;
      if (x.dims[i] > kMostRows / rows) {
        throw InvalidInput(std::string(kName) + ": x " + x.shape() + " has more than " + std::to_string(kMostRows) +
                           " rows");
      }
      rows *= x.dims[i];
    }
    return rows;
  }

  QuantizedMatrix matrix_;  // without its memory
};

}  // namespace

Op& quantized_linear() {
  static Op* const op = [] {
    static Op made(
        kName, {ort::kFloat32, ort::kUint8, ort::kFloat16}, {ort::kFloat32},
        [](const NodeInfo& info) -> std::unique_ptr<Kernel> { return std::make_unique<QuantizedLinear>(info); });
    made.kernel_name = [] { return quantized_kernels(active_isa()).name; };
    return &made;
  }();
  return *op;
}

}  // namespace cpmbee
