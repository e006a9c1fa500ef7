// Rows of activations to int8, block by block. Whoever includes this defines before it
//
//   KERNEL_TARGET   attributes of functions that use quantize_block()
//   quantize_block<Block>(m, panel, r, b, block)
//       quantizes the Block values at `block` and stores them as block `b` of row `r`
#pragma once

#include <algorithm>

#include "quantized_kernel.h"

namespace cpmbee {
namespace {

template <int Block>
KERNEL_TARGET void quantize_rows(const QuantizedMatrix& m, const float* rows, const ActivationPanel& panel,
                                 int64_t begin, int64_t end) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    for (int64_t b = begin; b < end; ++b) {
      const float* block = rows + r * m.in_features + b * Block;
      const int64_t count = m.in_features - b * Block;
      float padded[Block];
      if (count < Block) {
        std::fill(std::copy(block, block + count, padded), padded + Block, 0.0f);
        block = padded;
      }
      quantize_block<Block>(m, panel, r, b, block);
    }
  }
}

void quantize(const QuantizedMatrix& m, const float* rows, const ActivationPanel& panel, int64_t begin,
              int64_t end) {
  if (m.block == 32) return quantize_rows<32>(m, rows, panel, begin, end);
  if (m.block == 64) return quantize_rows<64>(m, rows, panel, begin, end);
  quantize_rows<128>(m, rows, panel, begin, end);
}

}  // namespace
}  // namespace cpmbee
