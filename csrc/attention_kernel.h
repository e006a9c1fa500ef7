// Attention with the position bias looked up tile by tile: plain C++, no ONNX Runtime.
//
// Two regimes. With many queries (prefill) a job is one head of one sequence for a tile of queries, and keys pass by in
// packed tiles. With few queries (decode) reading the cache is the work, so a job is a chunk of keys of one sequence
// with all heads - whole cache rows are read, once - and the chunks' partial results are merged; few keys are one chunk,
// whose heads are shared out. How work is split depends on shapes only, never on the number of threads, so neither do
// the results.
//
// Cache rows are stored in one of three types and rounded once, when they are written; everything is computed in fp32.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu.h"
#include "executor.h"

namespace cpmbee {

constexpr int64_t kKeyTile = 64;       // keys whose scores exist at one time
constexpr int64_t kQueryTile = 384;    // queries of one prefill job, at most
constexpr int64_t kKeyChunk = 128;     // keys of one decode job
constexpr int64_t kDecodeQueries = 8;  // up to this many queries, reading the cache costs more than computing

// Where a running maximum starts: below every finite score, but its differences are numbers, unlike those of -inf.
constexpr float kNothingSeen = std::numeric_limits<float>::lowest();

// Scores are kept in units of log2(e), so that their exponentials are powers of two.
constexpr float kLog2E = 1.44269504f;

// The bias table by head, so that one head's lookups stay close together; relation -1 finds -inf.
class BiasTable {
 public:
  static constexpr int64_t kMargin = 16;  // floats that may be read, without meaning, before -1 and after the end

  BiasTable() = default;
  // `table` is (buckets, heads); each bias is multiplied with `unit`.
  BiasTable(const float* table, int64_t buckets, int64_t heads, float unit = 1.0f);

  int64_t buckets() const { return buckets_; }
  int64_t heads() const { return heads_; }
  // head(h)[r] for r = -1 .. buckets - 1.
  const float* head(int64_t h) const { return values_.data() + h * stride() + kMargin + 1; }

 private:
  int64_t stride() const { return buckets_ + 1 + 2 * kMargin; }

  int64_t buckets_ = 0;
  int64_t heads_ = 0;
  std::vector<float> values_;  // (heads, margin, -inf, buckets, margin)
};

// How the numbers of cache rows are stored.
enum class CacheType { fp32, fp16, int8 };
constexpr int kCacheTypes = 3;

// The pool of rows that keeps keys, or the one that keeps values.
struct CacheRows {
  void* numbers = nullptr;  // (rows, heads, dim_head) of the cache's type: float, Half or int8_t
  float* scales = nullptr;  // (rows, heads), what the int8 numbers of a row and head are multiplied with; else null

  template <class T>
  T* as() const {
    return static_cast<T*>(numbers);
  }
};

// Inputs, already validated, and the output.
struct AttentionProblem {
  int64_t batch = 0;
  int64_t queries = 0;
  int64_t keys = 0;
  int64_t heads = 0;
  int64_t dim_head = 0;
  float scale = 1.0f;                 // of q.k, log2(e) included
  const float* qkv = nullptr;         // (batch, queries, 3, heads, dim_head)
  const int16_t* relation = nullptr;  // (batch, queries, keys)
  const BiasTable* bias = nullptr;     // in units of log2(e)
  const int32_t* slots = nullptr;      // (batch, keys)
  CacheType cache_type = CacheType::fp32;
  CacheRows key_cache;
  CacheRows value_cache;
  float* context = nullptr;            // (batch, queries, heads, dim_head)

  int64_t row_size() const { return heads * dim_head; }
  const float* query(int64_t b, int64_t q, int64_t h) const {
    return qkv + (b * queries + q) * 3 * row_size() + h * dim_head;
  }
  const int16_t* relation_row(int64_t b, int64_t q) const { return relation + (b * queries + q) * keys; }
  float* context_row(int64_t b, int64_t q, int64_t h) const {
    return context + (b * queries + q) * row_size() + h * dim_head;
  }
};

// A softmax-weighted sum over some of the keys, not yet divided by `sum`; one entry per (query, head).
struct AttentionPartial {
  float* max;      // (queries, heads): largest score, in units of log2(e), or kNothingSeen
  float* sum;      // (queries, heads): of 2^(score - max)
  float* context;  // (queries, heads, dim_head)
};

// The inner loops for one instruction set and type of cache. `scratch` points to scratch_floats() floats, aligned to 64 bytes.
struct AttentionKernels {
  size_t (*scratch_floats)(const AttentionProblem&);
  // Queries [q_begin, q_end) of head h; key_tiles[i] is 0 where none of them sees a key of tile i.
  void (*attend_tile)(const AttentionProblem&, int64_t b, int64_t h, int64_t q_begin, int64_t q_end,
                      const uint8_t* key_tiles, float* scratch);
  // All queries and heads [h_begin, h_end) over keys [k_begin, k_end), at most kKeyChunk; null: this set has no decode
  // regime.
  void (*attend_chunk)(const AttentionProblem&, int64_t b, int64_t k_begin, int64_t k_end, int64_t h_begin,
                       int64_t h_end, const AttentionPartial& result, float* scratch);
  // Rounds `heads` heads of one row, `values`, to where they are stored. int8: scale = largest magnitude / 127.
  void (*write_heads)(const float* values, int64_t heads, int64_t dim_head, void* numbers, float* scales);
};

// By CacheType.
extern const AttentionKernels kScalarAttention[kCacheTypes];  // the reference: what the others are compared with
#if defined(__x86_64__) && defined(__GNUC__)
extern const AttentionKernels kAvx2Attention[kCacheTypes];
extern const AttentionKernels kAvx512Attention[kCacheTypes];
#elif defined(__aarch64__) && defined(__GNUC__)
extern const AttentionKernels kNeonAttention[kCacheTypes];
#endif

// What an int8 number stands for, given the largest magnitude that must be represented; never zero.
inline float int8_scale(float largest) { return std::max(largest, 1e-30f) / 127.0f; }

// Writes the keys and values of problem.qkv to the rows new_slots (batch, queries); of equal rows, the last one stays.
void append(const AttentionProblem& problem, const int32_t* new_slots, Isa isa, const Executor& executor);

// Computes problem.context with the kernels of `isa`. May throw std::bad_alloc.
void attend(const AttentionProblem& problem, Isa isa, const Executor& executor);

}  // namespace cpmbee
