// The reference kernels: quantization and product as they are defined, for every machine. Test oracle of the others.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "quantized_block.h"
#include "quantized_kernel.h"

namespace cpmbee {
namespace {

template <int Block>
void quantize_rows(const QuantizedMatrix& m, const float* rows, const ActivationPanel& panel, int64_t begin,
                   int64_t end) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    for (int64_t b = begin; b < end; ++b) {
      float block[Block] = {};
      int8_t values[Block];
      const float* row = rows + r * m.in_features + b * Block;
      std::copy(row, row + std::min<int64_t>(Block, m.in_features - b * Block), block);

      int32_t largest = 0;  // magnitude as bits: they order like the numbers, with infinity and NaN above all
      for (int64_t i = 0; i < Block; ++i) largest = std::max(largest, magnitude_bits(block[i]));
      const BlockScale scale = block_scale(largest);
      int32_t sum = 0;
      for (int64_t i = 0; i < Block; ++i) {
        const int8_t value = scale.inverse == 0.0f ? 0 : static_cast<int8_t>(std::lrint(block[i] * scale.inverse));
        values[stored_position(m.bits, i)] = value;
        sum += value;
      }
      store_block<Block>(m, panel, r, b, scale.scale, values, sum);
    }
  }
}

void quantize(const QuantizedMatrix& m, const float* rows, const ActivationPanel& panel, int64_t begin,
              int64_t end) {
  if (m.block == 32) return quantize_rows<32>(m, rows, panel, begin, end);
  if (m.block == 64) return quantize_rows<64>(m, rows, panel, begin, end);
  quantize_rows<128>(m, rows, panel, begin, end);
}

int32_t weight_at(const QuantizedMatrix& m, const uint8_t* group, int64_t lane, int64_t input) {
  if (m.bits == 8) return group[input / 4 * kVector + lane * 4 + input % 4];
  const uint8_t byte = group[input / 8 * kVector + lane * 4 + input % 8 / 2];
  return input % 2 == 0 ? byte & 15 : byte >> 4;
}

float product(const QuantizedMatrix& m, const ActivationPanel& panel, int64_t r, int64_t group, int64_t lane) {
  float result = 0.0f;
  for (int64_t b = 0; b < m.blocks(); ++b) {
    int32_t sum = panel.starts[b * panel.rows + r];
    for (int64_t i = 0; i < m.block; ++i) {
      const int64_t input = b * m.block + i;
      const int64_t place = stored_position(m.bits, input);
      const int32_t activation = panel.values[(place / 4 * panel.rows + r) * 4 + place % 4];
      sum += weight_at(m, m.group_weight(group), lane, input) * activation;
    }
    const float scale = half_to_float(m.group_scales(group)[b * kLanes + lane]) * panel.scales[b * panel.rows + r];
    result = std::fma(static_cast<float>(sum), scale, result);
  }
  return result;
}

void multiply_groups(const QuantizedMatrix& m, const QuantizedRows& rows, int64_t group_begin, int64_t group_end,
                     float* result) {
  const int64_t end = std::min(group_end * kLanes, m.out_features);
  for (int64_t p = 0; p < rows.panels(); ++p) {
    const ActivationPanel panel = rows.panel(p);
    for (int64_t r = 0; r < panel.rows; ++r) {
      float* out = result + (rows.first_row(p) + r) * m.out_features;
      for (int64_t o = group_begin * kLanes; o < end; ++o) out[o] = product(m, panel, r, o / kLanes, o % kLanes);
    }
  }
}

}  // namespace

const QuantizedKernels kScalarQuantized = {"scalar", Isa::scalar, 4, 4, 4, quantize, multiply_groups};

}  // namespace cpmbee
