// GatedGelu(both float32 [..., 2*F]) -> gated float32 [..., F]
//
//   gated = gelu(both[..., :F]) * both[..., F:], gelu(x) = x * (1 + erf(x / sqrt(2))) / 2

#include "op.h"
#include "op_inputs.h"
#include "row_kernel.h"

namespace cpmbee {
namespace {

constexpr const char* kName = "GatedGelu";

class GatedGelu final : public Kernel {
 public:
  explicit GatedGelu(const NodeInfo&) {}

  void compute(const Context& context) const override {
    const Tensor both = context.input(0);
    if (both.dims.empty() || both.dims.back() % 2 != 0) {
      throw InvalidInput(std::string(kName) + ": both must have the shape [...,2*F], not " + both.shape());
    }
    std::vector<int64_t> dims = both.dims;
    dims.back() /= 2;
    const Tensor gated = context.output(0, dims);
    gate_rows(both.as<float>(), both.rows(), dims.back(), gated.as<float>(), row_kernels(active_isa()),
               SessionThreads(context));
  }
};

}  // namespace

Op& gated_gelu() {
  static Op* const op = [] {
    static Op made(kName, {ort::kFloat32}, {ort::kFloat32}, make_kernel<GatedGelu>);
    made.kernel_name = [] { return isa_name(active_isa()); };
    return &made;
  }();
  return *op;
}

}  // namespace cpmbee
