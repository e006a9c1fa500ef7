// The reference kernel: attention as it is defined, one query at a time, for every machine. Test oracle of the others.

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_kernel.h"
#include "half.h"

namespace cpmbee {
namespace {

size_t scratch_floats(const AttentionProblem& p) { return p.keys; }

float number(float stored) { return stored; }
float number(Half stored) { return half_to_float(stored.bits); }
float number(int8_t stored) { return stored; }

// What an int8 row and head is multiplied with; other types are not.
float scale_of(const CacheRows& cache, int64_t head) { return cache.scales == nullptr ? 1.0f : cache.scales[head]; }

template <class T>
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
    const int64_t head = slots[k] * p.heads + h;
    const T* key = p.key_cache.as<T>() + head * p.dim_head;
    float product = 0.0f;
    for (int64_t d = 0; d < p.dim_head; ++d) product += query[d] * number(key[d]);
    scores[k] = product * scale_of(p.key_cache, head) * p.scale + bias[relation[k]];
    max = std::max(max, scores[k]);
  }
  if (max == kMinusInfinity) return;

  float sum = 0.0f;
  for (int64_t k = 0; k < p.keys; ++k) {
    const float weight = std::exp2(scores[k] - max);
    if (weight == 0.0f) continue;
    const int64_t head = slots[k] * p.heads + h;
    const T* value = p.value_cache.as<T>() + head * p.dim_head;
    const float scaled = weight * scale_of(p.value_cache, head);
    sum += weight;
    for (int64_t d = 0; d < p.dim_head; ++d) context[d] += scaled * number(value[d]);
  }
  for (int64_t d = 0; d < p.dim_head; ++d) context[d] /= sum;
}

template <class T>
void attend_tile(const AttentionProblem& p, int64_t b, int64_t h, int64_t q_begin, int64_t q_end,
                 const uint8_t* /*key_tiles*/, float* scratch) {
  for (int64_t q = q_begin; q < q_end; ++q) attend_query<T>(p, b, h, q, scratch);
}

void write(const float* values, int64_t count, float* to, float* /*scale*/) { std::copy(values, values + count, to); }

void write(const float* values, int64_t count, Half* to, float* /*scale*/) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_half(std::min(std::max(values[i], -kLargestHalf), kLargestHalf));
}

void write(const float* values, int64_t count, int8_t* to, float* scale) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(values[i]));
  *scale = int8_scale(largest);
  for (int64_t i = 0; i < count; ++i) {
    const float units = std::nearbyint(values[i] / *scale);
    to[i] = static_cast<int8_t>(units > -127.0f ? units : -127.0f);
  }
}

template <class T>
void write_heads(const float* values, int64_t heads, int64_t dim_head, void* numbers, float* scales) {
  for (int64_t h = 0; h < heads; ++h) {
    float* scale = scales == nullptr ? nullptr : scales + h;
    write(values + h * dim_head, dim_head, static_cast<T*>(numbers) + h * dim_head, scale);
  }
}

}  // namespace

const AttentionKernels kScalarAttention[kCacheTypes] = {
    {scratch_floats, attend_tile<float>, nullptr, write_heads<float>},
    {scratch_floats, attend_tile<Half>, nullptr, write_heads<Half>},
    {scratch_floats, attend_tile<int8_t>, nullptr, write_heads<int8_t>},
};

}  // namespace cpmbee
