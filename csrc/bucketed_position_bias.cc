// BucketedPositionBias(relation int16 [B,Q,K], table float32 [N,H]) -> bias float32 [B,H,Q,K]
//
// bias[b,h,q,k] = table[relation[b,q,k], h], and -inf where the relation is -1.

#include "op_inputs.h"
#include "op.h"

namespace cpmbee {
namespace {

constexpr const char* kName = "BucketedPositionBias";

class BucketedPositionBias final : public Kernel {
 public:
  explicit BucketedPositionBias(const NodeInfo& info) : table_(kName, info, 1, 1.0f) {}

  void compute(const Context& context) const override {
    const SessionThreads threads(context);
    BiasTable storage;
    const BiasTable& table = table_.get(context, storage);
    const Tensor relation = context.input(0);
    require_shape(kName, "relation", relation, {-1, -1, -1}, "[B,Q,K]");
    require_in_range(kName, "relation", relation, -1, table.buckets() - 1, threads);
    const int64_t batch = relation.dims[0];
    const int64_t queries = relation.dims[1];
    const int64_t keys = relation.dims[2];
    const int64_t heads = table.heads();
    const Tensor bias = context.output(0, {batch, heads, queries, keys});

    if (bias.count() == 0) return;  // however many empty rows there are
    threads.for_each(batch * queries, [&](size_t row) {  // one query, all heads
      const int64_t b = row / queries;
      const int64_t q = row % queries;
      const int16_t* buckets = relation.as<int16_t>() + row * keys;
      for (int64_t h = 0; h < heads; ++h) {
        const float* values = table.head(h);
        float* out = bias.as<float>() + ((b * heads + h) * queries + q) * keys;
        for (int64_t k = 0; k < keys; ++k) out[k] = values[buckets[k]];
      }
    });
  }

 private:
  TableInput table_;
};

}  // namespace

Op& bucketed_position_bias() {
  static Op op(kName, {ort::kInt16, ort::kFloat32}, {ort::kFloat32}, make_kernel<BucketedPositionBias>);
  return op;
}

}  // namespace cpmbee
