// Products with int4 and int8 weights, activations quantized to int8 on the way: plain C++, no ONNX Runtime.
//
// Weights are unsigned numbers q with a zero point z and a scale for each output and block of inputs: w = (q - z) * s.
// They lie as [outputs/16][inputs/per vector][16][4] bytes, so that one 64-byte vector holds 16 outputs in its lanes:
//
//   8 bits  z = 128, 4 inputs a vector:  byte j of a lane is input 4 * v + j
//   4 bits  z = 8,   8 inputs a vector:  byte j of a lane is inputs 8 * v + 2 * j (low nibble) and 8 * v + 2 * j + 1
//   scales  float16 [outputs/16][blocks][16]
//
// Outputs are padded to a multiple of 16 and inputs to a multiple of the block. Each row of activations gets one scale
// for each block. Products are summed exactly in int32 within a block, and then, block by block in order,
// sum = fma(float(products), weight scale * activation scale, sum). So all kernels agree to the bit, however the work
// is split.
//
// Three regimes. One row: reading the weights is the work, they stream past once. A few rows: the same, each vector
// used for all rows while it is in a register. Many rows: a panel of weights is expanded to bytes in the first-level
// cache and multiplied with all rows, a few rows at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu.h"
#include "executor.h"

namespace cpmbee {

constexpr int64_t kLanes = 16;      // outputs of a group
constexpr int64_t kVector = 64;     // bytes of a group's vector
constexpr int64_t kMaxBlock = 128;  // inputs that share a scale, at most
constexpr int64_t kMaxPanelRows = 8;

struct QuantizedMatrix {
  const uint8_t* weight = nullptr;
  const uint16_t* scales = nullptr;
  int64_t bits = 0;          // 4 or 8
  int64_t block = 0;         // 32, 64 or 128
  int64_t in_features = 0;   // without padding
  int64_t out_features = 0;  // without padding

  int64_t blocks() const { return (in_features + block - 1) / block; }
  int64_t padded_inputs() const { return blocks() * block; }
  int64_t groups() const { return (out_features + kLanes - 1) / kLanes; }
  int64_t zero_point() const { return bits == 4 ? 8 : 128; }
  int64_t block_bytes() const { return block * kLanes * bits / 8; }  // of a group
  int64_t group_bytes() const { return blocks() * block_bytes(); }
  const uint8_t* group_weight(int64_t group) const { return weight + group * group_bytes(); }
  const uint16_t* group_scales(int64_t group) const { return scales + group * blocks() * kLanes; }
};

// A few rows of quantized activations, interleaved so that what one weight vector meets lies together.
struct ActivationPanel {
  int8_t* values;   // (padded inputs / 4, rows, 4); for 4-bit weights the even inputs of 8 come before the odd ones
  float* scales;    // (blocks, rows)
  int32_t* starts;  // (blocks, rows): -zero point * sum of the block's values
  int64_t rows;     // at most kMaxPanelRows
};

// The rows of one call, quantized, in panels of about equal size.
class QuantizedRows {
 public:
  // Room for `rows` rows in panels of at most `panel_rows`; `direct`: they are to meet the weights without expansion.
  // The memory is this thread's, until its next object.
  QuantizedRows(const QuantizedMatrix& matrix, int64_t rows, int64_t panel_rows, bool direct);

  bool direct() const { return direct_; }
  int64_t panels() const { return panels_; }
  int64_t first_row(int64_t panel) const { return panel * rows_ / panels_; }
  ActivationPanel panel(int64_t panel) const;

 private:
  bool direct_;
  int64_t rows_;
  int64_t panels_;
  int64_t inputs_;
  int64_t blocks_;
  int8_t* values_;
  float* scales_;
  int32_t* starts_;
};

// The inner loops for one instruction set.
struct QuantizedKernels {
  const char* name;          // "scalar", "avx2", "avx2-vnni", "avx512-vnni", "neon" or "neon-dotprod"
  Isa isa;                   // what a cap must allow
  int64_t panel_rows;         // rows of a panel, when there are many
  int64_t direct_panel_rows;  // rows of a panel that meets the weights directly
  int64_t most_direct_rows;   // more rows than these are worth expanding weights for
  // Quantizes blocks [begin, end) of the panel's rows, which lie `matrix.in_features` floats apart.
  void (*quantize)(const QuantizedMatrix& matrix, const float* rows, const ActivationPanel& panel, int64_t begin,
                   int64_t end);
  // Outputs of groups [group_begin, group_end) for all rows; `result` is (rows, out_features).
  void (*multiply)(const QuantizedMatrix& matrix, const QuantizedRows& rows, int64_t group_begin, int64_t group_end,
                   float* result);
};

extern const QuantizedKernels kScalarQuantized;  // the reference: what the others are compared with
#if defined(__x86_64__) && defined(__GNUC__)
extern const QuantizedKernels kAvx2Quantized;
extern const QuantizedKernels kAvxVnniQuantized;
extern const QuantizedKernels kAvx512VnniQuantized;
#elif defined(__aarch64__) && defined(__GNUC__)
extern const QuantizedKernels kNeonQuantized;
#if defined(__ARM_FEATURE_DOTPROD) || !defined(__clang__) || __clang_major__ >= 16
#define CPMBEE_NEON_DOTPROD  // the compiler can use dot products in single functions, or may in all
extern const QuantizedKernels kNeonDotprodQuantized;
#endif
#endif

// Every set of kernels that this machine can run, the reference first and the fastest last.
std::vector<const QuantizedKernels*> available_quantized_kernels();

// The fastest of them that needs no more than `isa`.
const QuantizedKernels& quantized_kernels(Isa isa);

// result (rows, out_features) = inputs (rows, in_features) times the transposed matrix. May throw std::bad_alloc.
void multiply(const QuantizedMatrix& matrix, const float* inputs, int64_t rows, float* result,
              const QuantizedKernels& kernels, const Executor& executor);

// result (in_features) = the weights of one output.
void dequantize_row(const QuantizedMatrix& matrix, int64_t output, float* result);

}  // namespace cpmbee
