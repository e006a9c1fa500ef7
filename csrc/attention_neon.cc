// The vector kernels compiled for NEON, which every 64-bit ARM machine has.

#if defined(__aarch64__) && defined(__GNUC__)

#include "simd_neon.h"

#include "attention_chunk.h"
#include "attention_tile.h"
#include "attention_write.h"

namespace cpmbee {
namespace {

size_t scratch_floats(const AttentionProblem& p) {
  return std::max(tile_scratch_floats(p), p.queries <= kDecodeQueries ? chunk_scratch_floats(p) : 0);
}

}  // namespace

const AttentionKernels kNeonAttention[kCacheTypes] = {
    {scratch_floats, attend_tile<float>, attend_chunk<float>, write_heads<float>},
    {scratch_floats, attend_tile<Half>, attend_chunk<Half>, write_heads<Half>},
    {scratch_floats, attend_tile<int8_t>, attend_chunk<int8_t>, write_heads<int8_t>},
};

}  // namespace cpmbee

#endif
