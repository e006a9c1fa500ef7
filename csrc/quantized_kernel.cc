#include "quantized_kernel.h"

#include <algorithm>

#include "half.h"

namespace cpmbee {
namespace {

constexpr int64_t kTinyWork = 1 << 18;      // bytes of weights times rows that take less time than waking a thread
constexpr int64_t kMostJobBytes = 1 << 18;  // of weights, for few rows: a stream that is worth starting
constexpr int64_t kLeastJobs = 16;          // unless that makes fewer jobs than these
constexpr int64_t kJobWork = 1 << 27;       // multiply-adds, for many rows: groups share activations in the cache
constexpr int64_t kTinyQuantize = 1 << 15;  // activations that take less time to quantize than waking a thread
constexpr int64_t kQuantizeJob = 1 << 13;
constexpr int64_t kSlabRows = 1024;  // rows whose quantized activations exist at one time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const Executor& executor_if(bool worth_it, const Executor& executor) {
  static const Serial serial;
  return worth_it ? executor : serial;
}

// A buffer of this thread, aligned to a cache line; grows and is kept for the next call.
template <class T>
T* thread_buffer(std::vector<uint8_t>& storage, size_t count) {
  if (storage.size() < count * sizeof(T) + kVector) storage.resize(count * sizeof(T) + kVector);
  const auto address = reinterpret_cast<uintptr_t>(storage.data());
  return reinterpret_cast<T*>((address + kVector - 1) / kVector * kVector);
}

void multiply_slab(const QuantizedMatrix& m, const float* inputs, int64_t rows, float* result,
                   const QuantizedKernels& kernels, const Executor& executor) {
  const bool direct = rows <= kernels.most_direct_rows;
  const QuantizedRows quantized(m, rows, direct ? kernels.direct_panel_rows : kernels.panel_rows, direct);

  const int64_t part = std::max<int64_t>(1, kQuantizeJob / (m.block * quantized.panel(0).rows));  // blocks of a job
  const int64_t parts = ceil_div(m.blocks(), part);
  const bool many = rows * m.in_features >= kTinyQuantize;
  executor_if(many, executor).for_each(quantized.panels() * parts, [&](size_t job) {
    const int64_t panel = job / parts;
    const int64_t begin = job % parts * part;
    const float* panel_inputs = inputs + quantized.first_row(panel) * m.in_features;
    kernels.quantize(m, panel_inputs, quantized.panel(panel), begin, std::min(begin + part, m.blocks()));
  });

  const int64_t bytes = m.groups() * m.group_bytes();
  const int64_t worth = direct ? kMostJobBytes / m.group_bytes() : kJobWork / (kLanes * m.padded_inputs() * rows);
  const int64_t pairs = std::min(worth, m.groups() / kLeastJobs) / 2;
  const int64_t job_groups = std::max<int64_t>(1, pairs) * 2;  // kernels may take two groups at a time
  executor_if(bytes * rows >= kTinyWork, executor).for_each(ceil_div(m.groups(), job_groups), [&](size_t job) {
    const int64_t begin = job * job_groups;
    kernels.multiply(m, quantized, begin, std::min(begin + job_groups, m.groups()), result);
  });
}

}  // namespace

QuantizedRows::QuantizedRows(const QuantizedMatrix& matrix, int64_t rows, int64_t panel_rows, bool direct)
    : direct_(direct),
      rows_(rows),
      panels_(ceil_div(rows, panel_rows)),
      inputs_(matrix.padded_inputs()),
      blocks_(matrix.blocks()) {
  thread_local std::vector<uint8_t> values, scales, starts;
  values_ = thread_buffer<int8_t>(values, rows * inputs_);
  scales_ = thread_buffer<float>(scales, rows * blocks_);
  starts_ = thread_buffer<int32_t>(starts, rows * blocks_);
}

ActivationPanel QuantizedRows::panel(int64_t panel) const {
  const int64_t first = first_row(panel);
  const int64_t rows = first_row(panel + 1) - first;
  return {values_ + first * inputs_, scales_ + first * blocks_, starts_ + first * blocks_, rows};
}

std::vector<const QuantizedKernels*> available_quantized_kernels() {
  std::vector<const QuantizedKernels*> available{&kScalarQuantized};
#if defined(__x86_64__) && defined(__GNUC__)
  if (best_isa() >= Isa::avx2) available.push_back(&kAvx2Quantized);
  if (has_avx_vnni()) available.push_back(&kAvxVnniQuantized);
  if (has_avx512_vnni()) available.push_back(&kAvx512VnniQuantized);
#elif defined(__aarch64__) && defined(__GNUC__)
  available.push_back(&kNeonQuantized);
#ifdef CPMBEE_NEON_DOTPROD
  if (has_neon_dotprod()) available.push_back(&kNeonDotprodQuantized);
#endif
#endif
  return available;
}

const QuantizedKernels& quantized_kernels(Isa isa) {
  static const std::vector<const QuantizedKernels*> available = available_quantized_kernels();
  return **std::find_if(available.rbegin(), available.rend(), [&](const auto* kernels) { return kernels->isa <= isa; });
}

void multiply(const QuantizedMatrix& m, const float* inputs, int64_t rows, float* result,
              const QuantizedKernels& kernels, const Executor& executor) {
  for (int64_t first = 0; first < rows; first += kSlabRows) {
    multiply_slab(m, inputs + first * m.in_features, std::min(kSlabRows, rows - first), result + first * m.out_features,
                  kernels, executor);
  }
}

void dequantize_row(const QuantizedMatrix& m, int64_t output, float* result) {
  const int64_t lane = output % kLanes;
  const uint8_t* weight = m.group_weight(output / kLanes) + lane * 4;
  const uint16_t* scales = m.group_scales(output / kLanes) + lane;
  const auto zero_point = static_cast<int32_t>(m.zero_point());
  const int64_t vector_inputs = 32 / m.bits;
  for (int64_t begin = 0; begin < m.in_features; begin += vector_inputs, weight += kVector) {
    const float scale = half_to_float(scales[begin / m.block * kLanes]);
    const int64_t count = std::min(vector_inputs, m.in_features - begin);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t number = m.bits == 8 ? weight[i] : weight[i / 2] >> i % 2 * 4 & 15;
      result[begin + i] = static_cast<float>(number - zero_point) * scale;
    }
  }
}

}  // namespace cpmbee
