// SubscriptRotation(rows float32 [..., 2*P], subscripts int32 [...], frequencies float32 [P])
//     -> rotated float32 [..., 2*P]
//
//   phase = subscript * distance_scale * frequency
//   rotated[:P] = rows[:P] * cos(phase) - rows[P:] * sin(phase)
//   rotated[P:] = rows[P:] * cos(phase) + rows[:P] * sin(phase)
//
// Frequencies are at most 1: larger ones turn by phases that are less exact.
//
// Attributes: distance_scale, half_phases (0 or 1: round subscript * distance_scale and phase to half precision).

#include "op.h"
#include "op_inputs.h"
#include "row_kernel.h"

namespace cpmbee {
namespace {

constexpr const char* kName = "SubscriptRotation";

class SubscriptRotation final : public Kernel {
 public:
  explicit SubscriptRotation(const NodeInfo& info) {
    rotation_.distance_scale = info.number("distance_scale");
    rotation_.half_phases = info.integer("half_phases") != 0;
  }

  void compute(const Context& context) const override {
    const Tensor rows = context.input(0);
    const Tensor subscripts = context.input(1);
    const Tensor frequencies = context.input(2);
    require_shape(kName, "frequencies", frequencies, {-1}, "[P]");
    Rotation rotation = rotation_;
    rotation.frequencies = frequencies.as<float>();
    rotation.pairs = frequencies.dims[0];
    std::vector<int64_t> dims = subscripts.dims;
    dims.push_back(2 * rotation.pairs);
    require_shape(kName, "rows", rows, dims, "[subscripts..., 2*P]");
    const Tensor rotated = context.output(0, dims);
    rotate_rows(rotation, rows.as<float>(), subscripts.as<int32_t>(), rows.rows(), rotated.as<float>(),
                row_kernels(active_isa()), SessionThreads(context));
  }

 private:
  Rotation rotation_;  // without its memory
};

// The result may take over the rows' buffer.
size_t ORT_CALL may_inplace(int** inputs, int** outputs) {
  static int from[] = {0};
  static int to[] = {0};
  *inputs = from;
  *outputs = to;
  return 1;
}

void ORT_CALL release_may_inplace(int*, int*) {}

}  // namespace

Op& subscript_rotation() {
  static Op* const op = [] {
    static Op made(kName, {ort::kFloat32, ort::kInt32, ort::kFloat32}, {ort::kFloat32},
                   make_kernel<SubscriptRotation>);
    made.GetMayInplace = may_inplace;
    made.ReleaseMayInplace = release_may_inplace;
    made.kernel_name = [] { return isa_name(active_isa()); };
    return &made;
  }();
  return *op;
}

}  // namespace cpmbee
