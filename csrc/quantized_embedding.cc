// QuantizedEmbedding(ids int32 [...], weight uint8, scales float16) -> rows float32 [..., in_features]
//
//   rows = the numbers of the ids' outputs times their scales; matrix and attributes as in QuantizedLinear

#include "matrix_input.h"
#include "op.h"
#include "op_inputs.h"
#include "quantized_kernel.h"

namespace cpmbee {
namespace {

constexpr const char* kName = "QuantizedEmbedding";

class QuantizedEmbedding final : public Kernel {
 public:
  explicit QuantizedEmbedding(const NodeInfo& info) : matrix_(kName, info) {}

  void compute(const Context& context) const override {
    const SessionThreads threads(context);
    const Tensor ids = context.input(0);
    const QuantizedMatrix matrix = matrix_.get(context);
    require_in_range(kName, "ids", ids, 0, matrix.out_features - 1, threads);
    std::vector<int64_t> dims = ids.dims;
    dims.push_back(matrix.in_features);
    const Tensor rows = context.output(0, dims);
    threads.for_each(rows.rows(), [&](size_t i) {
      dequantize_row(matrix, ids.as<int32_t>()[i], rows.as<float>() + i * matrix.in_features);
    });
  }

 private:
  MatrixInput matrix_;
};

}  // namespace

Op& quantized_embedding() {
  static Op op(kName, {ort::kInt32, ort::kUint8, ort::kFloat16}, {ort::kFloat32}, make_kernel<QuantizedEmbedding>);
  return op;
}

}  // namespace cpmbee
