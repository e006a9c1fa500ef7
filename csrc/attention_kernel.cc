#include "attention_kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "half.h"

namespace cpmbee {
namespace {

constexpr int64_t kTinyWork = 1 << 18;   // multiply-adds that take less time than waking a thread
constexpr int64_t kTinyCache = 1 << 16;  // the same for decode, where each of them waits for memory
constexpr int64_t kLeastJobs = 4;        // of decode, if there are enough heads
constexpr int64_t kLeastHeads = 4;       // of a decode job
constexpr int64_t kTinyCopy = 1 << 15;   // floats that take less time to store than waking a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const AttentionKernels& kernels_of(Isa isa, CacheType type) {
  const auto index = static_cast<size_t>(type);
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa == Isa::avx512) return kAvx512Attention[index];
  if (isa == Isa::avx2) return kAvx2Attention[index];
#elif defined(__aarch64__) && defined(__GNUC__)
  if (isa == Isa::neon) return kNeonAttention[index];
#endif
  (void)isa;
  return kScalarAttention[index];
}

// This thread's buffer of at least `count` floats, aligned to a cache line; grows and is kept for the next call.
float* thread_scratch(size_t count) {
  constexpr size_t kLine = 64;
  thread_local std::vector<float> buffer;
  if (buffer.size() < count + kLine / sizeof(float)) buffer.resize(count + kLine / sizeof(float));
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + (kLine - address % kLine) % kLine / sizeof(float);
}

void attend_by_query_tile(const AttentionProblem& p, const AttentionKernels& kernels, const Executor& executor) {
  const int64_t query_tiles = ceil_div(p.queries, kQueryTile);
  const int64_t tile_size = ceil_div(p.queries, query_tiles);  // about equal tiles
  const int64_t key_tiles = ceil_div(p.keys, kKeyTile);
  const size_t scratch_floats = kernels.scratch_floats(p);

  // (batch, query tiles, key tiles): does any of these queries see any of these keys?
  std::vector<uint8_t> visible(p.batch * query_tiles * key_tiles);
  executor.for_each(p.batch * query_tiles, [&](size_t i) {
    const int64_t b = i / query_tiles;
    const int64_t q_begin = i % query_tiles * tile_size;
    const int64_t q_end = std::min(q_begin + tile_size, p.queries);
    for (int64_t tile = 0; tile < key_tiles; ++tile) {
      const int64_t k_begin = tile * kKeyTile;
      const int64_t count = std::min(kKeyTile, p.keys - k_begin);
      bool any = false;
      for (int64_t q = q_begin; q < q_end && !any; ++q) {
        const int16_t* relation = p.relation_row(b, q) + k_begin;
        any = std::any_of(relation, relation + count, [](int16_t r) { return r >= 0; });
      }
      visible[i * key_tiles + tile] = any;
    }
  });

  executor.for_each(p.batch * p.heads * query_tiles, [&](size_t i) {
    // Later tiles see more keys: the long jobs come first, so that the threads finish together.
    const int64_t tile = query_tiles - 1 - i / (p.batch * p.heads);
    const int64_t b = i % (p.batch * p.heads) / p.heads;
    const int64_t h = i % p.heads;
    const int64_t q_begin = tile * tile_size;
    kernels.attend_tile(p, b, h, q_begin, std::min(q_begin + tile_size, p.queries),
                        &visible[(b * query_tiles + tile) * key_tiles], thread_scratch(scratch_floats));
  });
}

// One head of one query, from the partial results of all chunks.
void merge(const AttentionPartial* chunks, int64_t num_chunks, int64_t entry, int64_t dim_head, float* context) {
  float max = kNothingSeen;
  for (int64_t c = 0; c < num_chunks; ++c) max = std::max(max, chunks[c].max[entry]);
  std::fill(context, context + dim_head, 0.0f);
  float sum = 0.0f;
  for (int64_t c = 0; c < num_chunks; ++c) {
    const float weight = std::exp2(chunks[c].max[entry] - max);
    const float* part = chunks[c].context + entry * dim_head;
    sum += weight * chunks[c].sum[entry];
    for (int64_t d = 0; d < dim_head; ++d) context[d] += weight * part[d];
  }
  if (sum == 0.0f) return;  // nothing seen: zeros
  const float inverse = 1.0f / sum;
  for (int64_t d = 0; d < dim_head; ++d) context[d] *= inverse;
}

void attend_by_key_chunk(const AttentionProblem& p, const AttentionKernels& kernels, const Executor& executor) {
  const int64_t num_chunks = ceil_div(p.keys, kKeyChunk);
  const int64_t entries = p.queries * p.heads;
  const int64_t part_size = entries * (2 + p.dim_head);
  const size_t scratch_floats = kernels.scratch_floats(p);

  thread_local std::vector<float> storage;
  if (storage.size() < static_cast<size_t>(p.batch * num_chunks * part_size)) {
    storage.resize(p.batch * num_chunks * part_size);
  }
  std::vector<AttentionPartial> parts(p.batch * num_chunks);
  for (size_t i = 0; i < parts.size(); ++i) {
    float* part = storage.data() + i * part_size;
    parts[i] = {part, part + entries, part + 2 * entries};
  }
  const int64_t shares = std::clamp<int64_t>(p.heads / kLeastHeads, 1, ceil_div(kLeastJobs, p.batch * num_chunks));
  executor.for_each(parts.size() * shares, [&](size_t job) {
    const int64_t i = job / shares;
    const int64_t share = job % shares;
    const int64_t k_begin = i % num_chunks * kKeyChunk;
    kernels.attend_chunk(p, i / num_chunks, k_begin, std::min(k_begin + kKeyChunk, p.keys), share * p.heads / shares,
                         (share + 1) * p.heads / shares, parts[i], thread_scratch(scratch_floats));
  });

  const auto merge_query = [&](size_t i) {
    const int64_t b = i / p.queries;
    const int64_t q = i % p.queries;
    for (int64_t h = 0; h < p.heads; ++h) {
      merge(&parts[b * num_chunks], num_chunks, q * p.heads + h, p.dim_head, p.context_row(b, q, h));
    }
  };
  for (int64_t i = 0; i < p.batch * p.queries; ++i) merge_query(i);
}

}  // namespace

BiasTable::BiasTable(const float* table, int64_t buckets, int64_t heads, float unit)
    : buckets_(buckets), heads_(heads), values_(heads * (buckets + 1 + 2 * kMargin)) {
  for (int64_t h = 0; h < heads; ++h) {
    float* row = values_.data() + h * stride() + kMargin;
    row[0] = -std::numeric_limits<float>::infinity();
    for (int64_t r = 0; r < buckets; ++r) row[1 + r] = table[r * heads + h] * unit;
  }
}

void append(const AttentionProblem& p, const int32_t* new_slots, Isa isa, const Executor& executor) {
  constexpr size_t kNumberBytes[kCacheTypes] = {sizeof(float), sizeof(Half), sizeof(int8_t)};
  const size_t number = kNumberBytes[static_cast<size_t>(p.cache_type)];
  const AttentionKernels& kernels = kernels_of(isa, p.cache_type);
  const auto write = [&](const CacheRows& cache, const float* values, int64_t slot, int64_t begin, int64_t end) {
    const int64_t first = slot * p.heads + begin;
    float* scales = cache.scales == nullptr ? nullptr : cache.scales + first;
    kernels.write_heads(values + begin * p.dim_head, end - begin, p.dim_head,
                        cache.as<char>() + first * p.dim_head * number, scales);
  };
  const auto append_heads = [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < p.batch * p.queries; ++i) {
      const float* row = p.qkv + i * 3 * p.row_size();
      write(p.key_cache, row + p.row_size(), new_slots[i], begin, end);
      write(p.value_cache, row + 2 * p.row_size(), new_slots[i], begin, end);
    }
  };
  const int64_t size = p.row_size();
  if (p.batch * p.queries * size <= kTinyCopy) return append_heads(0, p.heads);
  const int64_t count = ceil_div(std::max<int64_t>(256, size / 8), p.dim_head);  // so that no two threads write a slot
  executor.for_each(ceil_div(p.heads, count), [&](size_t part) {
    const int64_t begin = part * count;
    append_heads(begin, std::min(begin + count, p.heads));
  });
}

void attend(const AttentionProblem& p, Isa isa, const Executor& executor) {
  if (p.batch * p.queries * p.row_size() == 0) return;
  if (p.keys == 0) {
    std::fill(p.context, p.context + p.batch * p.queries * p.row_size(), 0.0f);
    return;
  }
  const Serial serial;
  const AttentionKernels& kernels = kernels_of(isa, p.cache_type);
  const bool decode = kernels.attend_chunk != nullptr && p.queries <= kDecodeQueries;
  const bool tiny = p.batch * p.queries * p.keys * p.row_size() < (decode ? kTinyCache : kTinyWork);
  const Executor& chosen = tiny ? static_cast<const Executor&>(serial) : executor;
  if (decode) {
    attend_by_key_chunk(p, kernels, chosen);
  } else {
    attend_by_query_tile(p, kernels, chosen);
  }
}

}  // namespace cpmbee
