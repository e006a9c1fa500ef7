// RMSNorm(x float32 [..., D], weight float32 [D]) -> normed float32 [..., D]
// AddRMSNorm(stream float32 [..., D], addend float32 [..., D], weight float32 [D])
//     -> (normed float32 [..., D], sum float32 [..., D])
//
//   sum = stream + addend (x itself without an addend), normed = sum / sqrt(mean(sum^2) + epsilon) * weight
//
// Attribute: epsilon.

#include "op.h"
#include "op_inputs.h"
#include "row_kernel.h"

namespace cpmbee {
namespace {

constexpr const char* kNorm = "RMSNorm";
constexpr const char* kAddNorm = "AddRMSNorm";

void require_rows(const char* op, const char* input, const Tensor& x) {
  if (x.dims.empty()) throw InvalidInput(std::string(op) + ": " + input + " must have the shape [...,D], not []");
}

class RmsNorm final : public Kernel {
 public:
  explicit RmsNorm(const NodeInfo& info) : epsilon_(info.number("epsilon")) {}

  void compute(const Context& context) const override {
    const Tensor x = context.input(0);
    const Tensor weight = context.input(1);
    require_rows(kNorm, "x", x);
    require_shape(kNorm, "weight", weight, {x.dims.back()}, "[D]");
    const Tensor normed = context.output(0, x.dims);
    norm_rows(x.as<float>(), nullptr, weight.as<float>(), x.rows(), x.dims.back(), epsilon_, nullptr,
             normed.as<float>(), row_kernels(active_isa()), SessionThreads(context));
  }

 private:
  float epsilon_;
};

class AddRmsNorm final : public Kernel {
 public:
  explicit AddRmsNorm(const NodeInfo& info) : epsilon_(info.number("epsilon")) {}

  void compute(const Context& context) const override {
    const Tensor stream = context.input(0);
    const Tensor addend = context.input(1);
    const Tensor weight = context.input(2);
    require_rows(kAddNorm, "stream", stream);
    require_shape(kAddNorm, "addend", addend, stream.dims, "that of stream");
    require_shape(kAddNorm, "weight", weight, {stream.dims.back()}, "[D]");
    const Tensor normed = context.output(0, stream.dims);
    const Tensor sum = context.output(1, stream.dims);
    norm_rows(stream.as<float>(), addend.as<float>(), weight.as<float>(), stream.rows(), stream.dims.back(), epsilon_,
             sum.as<float>(), normed.as<float>(), row_kernels(active_isa()), SessionThreads(context));
  }

 private:
  float epsilon_;
};

}  // namespace

Op& rms_norm() {
  static Op* const op = [] {
    static Op made(kNorm, {ort::kFloat32, ort::kFloat32}, {ort::kFloat32}, make_kernel<RmsNorm>);
    made.kernel_name = [] { return isa_name(active_isa()); };
    return &made;
  }();
  return *op;
}

Op& add_rms_norm() {
  static Op* const op = [] {
    static Op made(kAddNorm, {ort::kFloat32, ort::kFloat32, ort::kFloat32}, {ort::kFloat32, ort::kFloat32},
                   make_kernel<AddRmsNorm>);
    made.kernel_name = [] { return isa_name(active_isa()); };
    return &made;
  }();
  return *op;
}

}  // namespace cpmbee
