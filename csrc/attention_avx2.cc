// The vector kernels compiled for AVX2 with FMA; run only where the machine has it.

#if defined(__x86_64__) && defined(__GNUC__)

#include "simd_avx2.h"

#include "attention_chunk.h"
#include "attention_tile.h"

namespace cpmbee {
namespace {

size_t scratch_floats(const AttentionProblem& p) {
  return std::max(tile_scratch_floats(p), p.queries <= kDecodeQueries ? chunk_scratch_floats(p) : 0);
}

}  // namespace

const AttentionKernels kAvx2Attention = {scratch_floats, attend_tile, attend_chunk};

}  // namespace cpmbee

#endif
