// BucketedAttention(qkv, relation, table, slots, new_slots, key_cache, value_cache[, key_scales, value_scales])
//     -> (context, present_key_cache, present_value_cache[, present_key_scales, present_value_scales])
//
//   qkv        float32 [B,Q,3*H*D]  all heads of q, then of k, then of v
//   relation   int16   [B,Q,K]      row of the bias table, or -1 where the query may not look at the key
//   table      float32 [N,H]        position bias
//   slots      int32   [B,K]        cache rows of the keys
//   new_slots  int32   [B,Q]        cache rows that the new keys and values are written to, before attention
//   *_cache    T       [P,H,D]      pool of rows; T is float32, float16 or int8
//   *_scales   float32 [P,H]        with int8 only: what the numbers of a row and head are multiplied with
//   context    float32 [B,Q,H*D]    softmax(scale * q.k + bias) . v; zeros for a query that sees no key
//
// Attributes: num_heads (H), scale. The caches are updated in place when input and output are one buffer, else copied.
// New rows are rounded when they are written, and attention reads what was written.

#include <algorithm>
#include <cstring>

#include "op_inputs.h"
#include "attention_kernel.h"
#include "half.h"
#include "op.h"

namespace cpmbee {
namespace {

constexpr const char* kName = "BucketedAttention";
constexpr int kKeyCache = 5;  // inputs
constexpr int kValueCache = 6;
constexpr int kKeyScales = 7;
constexpr int kValueScales = 8;
constexpr int kFirstPresent = 1;  // output of input kKeyCache, the others follow in the same order
constexpr int64_t kCopyBlock = 1 << 20;  // bytes
constexpr int64_t kMostDim = 1 << 24;    // of a head: times all heads it fits 64 bits by far

CacheType cache_type(int element_type) {
  if (element_type == ort::kFloat16) return CacheType::fp16;
  return element_type == ort::kInt8 ? CacheType::int8 : CacheType::fp32;  // the runtime has checked the type
}

int64_t number_bytes(int element_type) {
  if (element_type == ort::kInt8) return sizeof(int8_t);
  return element_type == ort::kFloat16 ? sizeof(Half) : sizeof(float);
}

// The output that the cache `input` becomes, with what it holds: copied, unless it is one and the same buffer.
Tensor present(const Context& context, int index, const Tensor& cache, const Executor& executor) {
  const Tensor result = context.output(index - kKeyCache + kFirstPresent, cache.dims);
  if (result.data == cache.data) return result;
  const int64_t count = cache.count() * number_bytes(cache.element_type);
  executor.for_each((count + kCopyBlock - 1) / kCopyBlock, [&](size_t block) {
    const int64_t begin = block * kCopyBlock;
    std::memcpy(result.as<char>() + begin, cache.as<char>() + begin, std::min(kCopyBlock, count - begin));
  });
  return result;
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

    if (table.heads() != heads_) {
      throw InvalidInput(std::string(kName) + ": table must have " + std::to_string(heads_) +
                         " columns, one a head, not " + std::to_string(table.heads()));
    }
    require_shape(kName, "relation", relation, {-1, -1, -1}, "[B,Q,K]");
    require_shape(kName, "key_cache", key_cache, {-1, heads_, -1}, "[P,H,D]");
    AttentionProblem p;
    p.batch = relation.dims[0];
    p.queries = relation.dims[1];
    p.keys = relation.dims[2];
    p.heads = heads_;
    p.dim_head = key_cache.dims[2];
    const int64_t rows = key_cache.dims[0];
    if (p.dim_head < 1 || p.dim_head > kMostDim) {
      throw InvalidInput(std::string(kName) + ": key_cache " + key_cache.shape() + " must have a last dimension of 1.." +
                         std::to_string(kMostDim));
    }
    require_shape(kName, "value_cache", value_cache, key_cache.dims, "[P,H,D]");
    require_shape(kName, "qkv", qkv, {p.batch, p.queries, 3 * p.row_size()}, "[B,Q,3*H*D]");
    require_shape(kName, "slots", slots, {p.batch, p.keys}, "[B,K]");
    require_shape(kName, "new_slots", new_slots, {p.batch, p.queries}, "[B,Q]");
    require_in_range(kName, "relation", relation, -1, table.buckets() - 1, threads);
    require_in_range(kName, "slots", slots, 0, rows - 1, threads);
    require_in_range(kName, "new_slots", new_slots, 0, rows - 1, threads);

    const Tensor result = context.output(0, {p.batch, p.queries, p.row_size()});
    p.cache_type = cache_type(key_cache.element_type);
    p.key_cache.numbers = present(context, kKeyCache, key_cache, threads).data;
    p.value_cache.numbers = present(context, kValueCache, value_cache, threads).data;
    if (p.cache_type == CacheType::int8) {
      p.key_cache.scales = scales(context, kKeyScales, "key_scales", {rows, heads_}, threads);
      p.value_cache.scales = scales(context, kValueScales, "value_scales", {rows, heads_}, threads);
    }

    p.scale = scale_ * kLog2E;
    p.qkv = qkv.as<float>();
    p.relation = relation.as<int16_t>();
    p.bias = &table;
    p.slots = slots.as<int32_t>();
    p.context = result.as<float>();
    append(p, new_slots.as<int32_t>(), active_isa(), threads);
    attend(p, active_isa(), threads);
  }

 private:
  static float* scales(const Context& context, int index, const char* name, const std::vector<int64_t>& dims,
                       const Executor& executor) {
    const Tensor input = context.input(index);
    require_shape(kName, name, input, dims, "[P,H]");
    return present(context, index, input, executor).as<float>();
  }

  int64_t heads_;
  float scale_;
  TableInput table_;
};

// The caches' outputs have their inputs' types and shapes. The context's is left to be known at run time.
template <int last>
OrtStatus* ORT_CALL infer_shapes(const OrtCustomOp*, OrtShapeInferContext* context) {
  for (int input = kKeyCache; input <= last; ++input) {
    OrtTensorTypeAndShapeInfo* shape = nullptr;  // borrowed
    if (OrtStatus* status = api().ShapeInferContext_GetInputTypeShape(context, input, &shape)) return status;
    const size_t output = input - kKeyCache + kFirstPresent;
    if (OrtStatus* status = api().ShapeInferContext_SetOutputTypeShape(context, output, shape)) return status;
  }
  return nullptr;
}

// Each cache's output may take over its input's buffer.
template <int count>
size_t ORT_CALL may_inplace(int** inputs, int** outputs) {
  static int from[] = {kKeyCache, kValueCache, kKeyScales, kValueScales};
  static int to[] = {1, 2, 3, 4};
  *inputs = from;
  *outputs = to;
  return count;
}

void ORT_CALL release_may_inplace(int*, int*) {}

// All have the inputs and outputs of the int8 one, as ops of one name must; the others leave the scales out.
Op* make_op(int type) {
  using namespace ort;
  Op* const op = new Op(kName, {kFloat32, kInt16, kFloat32, kInt32, kInt32, type, type, kFloat32, kFloat32},
                        {kFloat32, type, type, kFloat32, kFloat32}, make_kernel<BucketedAttention>, 2, 2);
  op->InferOutputShapeFn = type == kInt8 ? infer_shapes<kValueScales> : infer_shapes<kValueCache>;
  op->GetMayInplace = type == kInt8 ? may_inplace<4> : may_inplace<2>;
  op->ReleaseMayInplace = release_may_inplace;
  op->kernel_name = [] { return isa_name(active_isa()); };
  return op;
}

}  // namespace

Op& bucketed_attention() {
  static Op* const op = make_op(ort::kFloat32);
  return *op;
}

Op& bucketed_attention_fp16() {
  static Op* const op = make_op(ort::kFloat16);
  return *op;
}

Op& bucketed_attention_int8() {
  static Op* const op = make_op(ort::kInt8);
  return *op;
}

}  // namespace cpmbee
