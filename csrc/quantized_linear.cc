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

#include "matrix_input.h"
#include "op.h"
#include "op_inputs.h"
#include "quantized_kernel.h"

namespace cpmbee {
namespace {

constexpr const char* kName = "QuantizedLinear";
constexpr int64_t kMostRows = 1 << 20;

class QuantizedLinear final : public Kernel {
 public:
  explicit QuantizedLinear(const NodeInfo& info) : matrix_(kName, info) {}

  void compute(const Context& context) const override {
    const Tensor x = context.input(0);
    const QuantizedMatrix matrix = matrix_.get(context);
    if (x.dims.empty() || x.dims.back() != matrix.in_features) {
      throw InvalidInput(std::string(kName) + ": x must have the shape [...," + std::to_string(matrix.in_features) +
                         "], not " + x.shape());
    }
    std::vector<int64_t> result_dims = x.dims;
    result_dims.back() = matrix.out_features;
    const Tensor result = context.output(0, result_dims);
    multiply(matrix, x.as<float>(), rows_of(x), result.as<float>(), quantized_kernels(active_isa()),
             SessionThreads(context));
  }

 private:
  static int64_t rows_of(const Tensor& x) {
    if (x.rows() <= kMostRows) return x.rows();
    throw InvalidInput(std::string(kName) + ": x " + x.shape() + " has more than " + std::to_string(kMostRows) + " rows");
  }

  MatrixInput matrix_;
};

}  // namespace

Op& quantized_linear() {
  static Op* const op = [] {
    static Op made(kName, {ort::kFloat32, ort::kUint8, ort::kFloat16}, {ort::kFloat32}, make_kernel<QuantizedLinear>);
    made.kernel_name = [] { return quantized_kernels(active_isa()).name; };
    return &made;
  }();
  return *op;
}

}  // namespace cpmbee
