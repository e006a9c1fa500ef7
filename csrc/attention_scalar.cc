// The reference kernel: attention as it is defined, one query at a time, for every machine. Test oracle of the others.

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_kernel.h"

namespace cpmbee {
namespace {

size_t scratch_floats(const AttentionProblem& p) { return p.keys; }

void attend_query(const AttentionProblem& p, int64_t b, int64_t h, int64_t q, float* scores) {
  constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  const int32_t* slots = p.slots + b * p.keys;
  const int16_t* relation = p.relation_row(b, q);
  const float* query = p.query(b, q, h);
  const float* bias = p.bias->head(h);
  float* context = p.context_row(b, q, h);
  std::fill(context, context + p.dim_head, 0.0f);

  float max = kMinusInfinity;
  for (int64_t k = 0; k < p.keys; ++k) {
    scores[k] = kMinusInfinity;
    if (relation[k] < 0) continue;
    const float* key = p.key_cache + slots[k] * p.row_size() + h * p.dim_head;
    float product = 0.0f;
    for (int64_t d = 0; d < p.dim_head; ++d) product += query[d] * key[d];
    scores[k] = product * p.scale + bias[relation[k]];
    max = std::max(max, scores[k]);
  }
  if (max == kMinusInfinity) return;

  float sum = 0.0f;
  for (int64_t k = 0; k < p.keys; ++k) {
    const float weight = std::exp2(scores[k] - max);
    if (weight == 0.0f) continue;
    const float* value = p.value_cache + slots[k] * p.row_size() + h * p.dim_head;
    sum += weight;
    for (int64_t d = 0; d < p.dim_head; ++d) context[d] += weight * value[d];
  }
  for (int64_t d = 0; d < p.dim_head; ++d) context[d] /= sum;
}

void attend_tile(const AttentionProblem& p, int64_t b, int64_t h, int64_t q_begin, int64_t q_end,
                 const uint8_t* /*key_tiles*/, float* scratch) {
  for (int64_t q = q_begin; q < q_end; ++q) attend_query(p, b, h, q, scratch);
}

}  // namespace

const AttentionKernels kScalarAttention = {scratch_floats, attend_tile, nullptr};

}  // namespace cpmbee
