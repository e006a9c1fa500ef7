// BucketedAttention(qkv, relation, table, slots, new_slots, key_cache, value_cache)
//     -> (context, present_key_cache, present_value_cache)
//
//   qkv        float32 [B,Q,3*H*D]  all heads of q, then of k, then of v
//   relation   int16   [B,Q,K]      row of the bias table, or -1 where the query may not look at the key
//   table      float32 [N,H]        position bias
//   slots      int32   [B,K]        cache rows of the keys
//   new_slots  int32   [B,Q]        cache rows that the new keys and values are written to, before attention
//   *_cache    float32 [P,H,D]      pool of rows
//   context    float32 [B,Q,H*D]    softmax(scale * q.k + bias) . v; zeros for a query that sees no key
//
// Attributes: num_heads (H), scale. The caches are updated in place when input and output are one buffer, else copied.

#include <algorithm>
#include <cstring>

#include "op_inputs.h"
#include "attention_kernel.h"
#include "op.h"

namespace cpmbee {
namespace {

constexpr const char* kName = "BucketedAttention";
constexpr int kKeyCache = 5;  // input; the output is 1
constexpr int kValueCache = 6;
constexpr int64_t kTinyCopy = 1 << 15;   // floats that take less time to copy than waking a thread
constexpr int64_t kCopyBlock = 1 << 18;  // floats

// Copies a whole cache, unless it is one and the same buffer.
void copy_cache(const Tensor& from, const Tensor& to, const Executor& executor) {
  if (from.data == to.data) return;
  const int64_t count = from.dims[0] * from.dims[1] * from.dims[2];
  executor.for_each((count + kCopyBlock - 1) / kCopyBlock, [&](size_t block) {
    const int64_t begin = block * kCopyBlock;
    std::memcpy(to.as<float>() + begin, from.as<float>() + begin, std::min(kCopyBlock, count - begin) * sizeof(float));
  });
}

// Writes the rows' keys and values, columns [begin, end) of each. Rows in order: of equal slots, the last one stays.
void append_columns(const AttentionProblem& p, const int32_t* new_slots, float* keys, float* values, int64_t begin,
                    int64_t end) {
  const int64_t size = p.row_size();
  for (int64_t i = 0; i < p.batch * p.queries; ++i) {
    const float* row = p.qkv + i * 3 * size;
    const int64_t target = new_slots[i] * size;
    std::copy(row + size + begin, row + size + end, keys + target + begin);
    std::copy(row + 2 * size + begin, row + 2 * size + end, values + target + begin);
  }
}

void append(const AttentionProblem& p, const int32_t* new_slots, float* keys, float* values,
            const Executor& executor) {
  const int64_t size = p.row_size();
  if (p.batch * p.queries * size <= kTinyCopy) return append_columns(p, new_slots, keys, values, 0, size);
  const int64_t width = std::max<int64_t>(256, size / 8);  // by columns, so that no two threads write one slot
  executor.for_each((size + width - 1) / width, [&](size_t part) {
    const int64_t begin = part * width;
    append_columns(p, new_slots, keys, values, begin, std::min(begin + width, size));
  });
}

class BucketedAttention final : public Kernel {
 public:
  explicit BucketedAttention(const NodeInfo& info)
      : heads_(info.integer("num_heads")), scale_(info.number("scale")), table_(kName, info, 2, kLog2E) {
    if (heads_ < 1) {
      throw InvalidInput(std::string(kName) + ": num_heads must be positive, not " + std::to_string(heads_));
    }
  }

  void compute(const Context& context) const override {
    const SessionThreads threads(context);
    const Tensor qkv = context.input(0);
    const Tensor relation = context.input(1);
    const Tensor slots = context.input(3);
    const Tensor new_slots = context.input(4);
    const Tensor key_cache = context.input(kKeyCache);
    const Tensor value_cache = context.input(kValueCache);
    BiasTable storage;
    const BiasTable& table = table_.get(context, storage);

    require_shape(kName, "relation", relation, {-1, -1, -1}, "[B,Q,K]");
    require_shape(kName, "key_cache", key_cache, {-1, heads_, -1}, "[P,H,D]");
    AttentionProblem p;
    p.batch = relation.dims[0];
    p.queries = relation.dims[1];
    p.keys = relation.dims[2];
    p.heads = heads_;
    p.dim_head = key_cache.dims[2];
    const int64_t rows = key_cache.dims[0];
    require_shape(kName, "value_cache", value_cache, key_cache.dims, "[P,H,D]");
    require_shape(kName, "qkv", qkv, {p.batch, p.queries, 3 * p.row_size()}, "[B,Q,3*H*D]");
    require_shape(kName, "slots", slots, {p.batch, p.keys}, "[B,K]");
    require_shape(kName, "new_slots", new_slots, {p.batch, p.queries}, "[B,Q]");
    if (table.heads() != heads_) {
      throw InvalidInput(std::string(kName) + ": table must have " + std::to_string(heads_) +
                         " columns, one a head, not " + std::to_string(table.heads()));
    }
    require_in_range(kName, "relation", relation, -1, table.buckets() - 1, threads);
    require_in_range(kName, "slots", slots, 0, rows - 1, threads);
    require_in_range(kName, "new_slots", new_slots, 0, rows - 1, threads);

    const Tensor result = context.output(0, {p.batch, p.queries, p.row_size()});
    const Tensor present_keys = context.output(1, key_cache.dims);
    const Tensor present_values = context.output(2, value_cache.dims);
    copy_cache(key_cache, present_keys, threads);
    copy_cache(value_cache, present_values, threads);

    p.scale = scale_ * kLog2E;
    p.qkv = qkv.as<float>();
    p.relation = relation.as<int16_t>();
    p.bias = &table;
    p.slots = slots.as<int32_t>();
    p.key_cache = present_keys.as<float>();
    p.value_cache = present_values.as<float>();
    p.context = result.as<float>();
    append(p, new_slots.as<int32_t>(), present_keys.as<float>(), present_values.as<float>(), threads);
    attend(p, active_isa(), threads);
  }

 private:
  int64_t heads_;
  float scale_;
  TableInput table_;
};

// The caches' outputs have their inputs' shapes. The context's is left to be known at run time.
OrtStatus* ORT_CALL infer_shapes(const OrtCustomOp*, OrtShapeInferContext* context) {
  for (const int input : {kKeyCache, kValueCache}) {
    OrtTensorTypeAndShapeInfo* shape = nullptr;  // borrowed
    if (OrtStatus* status = api().ShapeInferContext_GetInputTypeShape(context, input, &shape)) return status;
    const size_t output = input - kKeyCache + 1;
    if (OrtStatus* status = api().ShapeInferContext_SetOutputTypeShape(context, output, shape)) return status;
  }
  return nullptr;
}

// Each cache's output may take over its input's buffer.
size_t ORT_CALL may_inplace(int** inputs, int** outputs) {
  static int from[] = {kKeyCache, kValueCache};
  static int to[] = {1, 2};
  *inputs = from;
  *outputs = to;
  return 2;
}

void ORT_CALL release_may_inplace(int*, int*) {}

Op* make_op() {
  using namespace ort;
  static Op op(kName, {kFloat32, kInt16, kFloat32, kInt32, kInt32, kFloat32, kFloat32},
               {kFloat32, kFloat32, kFloat32}, make_kernel<BucketedAttention>);
  op.InferOutputShapeFn = infer_shapes;
  op.GetMayInplace = may_inplace;
  op.ReleaseMayInplace = release_may_inplace;
  op.kernel_name = [] { return isa_name(active_isa()); };
  return &op;
}

}  // namespace

Op& bucketed_attention() {
  static Op* const op = make_op();
  return *op;
}

}  // namespace cpmbee
