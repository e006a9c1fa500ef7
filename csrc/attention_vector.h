// What the vector kernels of every instruction set consist of. Whoever includes this includes a simd_*.h before it.
#pragma once

#include <algorithm>

#include "attention_chunk.h"
#include "attention_tile.h"
#include "attention_write.h"

namespace cpmbee {
namespace {

size_t scratch_floats(const AttentionProblem& p) {
  return std::max(tile_scratch_floats(p), p.queries <= kDecodeQueries ? chunk_scratch_floats(p) : 0);
}

// For a cache of numbers T.
template <class T>
constexpr AttentionKernels kVectorAttention = {scratch_floats, attend_tile<T>, attend_chunk<T>, write_heads<T>};

}  // namespace
}  // namespace cpmbee
