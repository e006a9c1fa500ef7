#include "quantized_kernel.h"

#include <algorithm>

namespace cpmbee {
namespace {

constexpr int64_t kTinyWork = 1 << 18;      // bytes of weights times rows that take less time than waking a thread
constexpr int64_t kMostJobBytes = 1 << 18;  // of weights, for few rows: a stream that is worth starting
constexpr int64_t kLeastJobs = 16;          // unless that makes fewer jobs than these
constexpr int64_t kJobWork = 1 << 24;       // multiply-adds, for many rows
constexpr int64_t kTinyQuantize = 1 << 14;  // activations

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A buffer of this thread, aligned to a cache line; grows and is kept for the next call.
template <class T>
T* thread_buffer(std::vector<uint8_t>& storage, size_t count) {
  if (storage.size() < count * sizeof(T) + kVector) storage.resize(count * sizeof(T) + kVector);
  const auto address = reinterpret_cast<uintptr_t>(storage.data());
  return reinterpret_cast<T*>((address + kVector - 1) / kVector * kVector);
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
  return {values_ + first * inputs_, scales_ + first * blocks_, starts_ + first * blocks_, first_row(panel + 1) - first};
}

std::vector<const QuantizedKernels*> available_quantized_kernels() {
  std::vector<const QuantizedKernels*> available{&kScalarQuantized};
#if defined(__x86_64__) && defined(__GNUC__)
  if (best_isa() >= Isa::avx2) available.push_back(&kAvx2Quantized);
  if (has_avx_vnni()) available.push_back(&kAvxVnniQuantized);
  if (has_avx512_vnni()) available.push_back(&kAvx512VnniQuantized);
#endif
  return available;
}

const QuantizedKernels& quantized_kernels(Isa isa) {
  static const std::vector<const QuantizedKernels*> available = available_quantized_kernels();
  return **std::find_if(available.rbegin(), available.rend(), [&](const auto* kernels) { return kernels->isa <= isa; });
}

void multiply(const QuantizedMatrix& m, const float* inputs, int64_t rows, float* result,
              const QuantizedKernels& kernels, const Executor& executor) {
  if (rows == 0) return;
  const bool direct = rows <= kernels.most_direct_rows;
  const QuantizedRows quantized(m, rows, direct ? kernels.direct_panel_rows : kernels.panel_rows, direct);
  const Serial serial;
  const bool tiny = m.groups() * m.group_bytes() * rows < kTinyWork;
  const Executor& quantizer = tiny || rows * m.in_features < kTinyQuantize ? static_cast<const Executor&>(serial) : executor;
  quantizer.for_each(quantized.panels(), [&](size_t i) {
    kernels.quantize(m, inputs + quantized.first_row(i) * m.in_features, quantized.panel(i));
  });

  const int64_t job_bytes = std::min(kMostJobBytes, m.groups() * m.group_bytes() / kLeastJobs);
  const int64_t job_groups = direct ? std::max<int64_t>(1, job_bytes / m.group_bytes())
                                    : 2 * std::max<int64_t>(1, kJobWork / (2 * kLanes * m.padded_inputs() * rows));
  const Executor& chosen = tiny ? static_cast<const Executor&>(serial) : executor;
  chosen.for_each(ceil_div(m.groups(), job_groups), [&](size_t job) {
    const int64_t begin = job * job_groups;
    kernels.multiply(m, quantized, begin, std::min(begin + job_groups, m.groups()), result);
  });
}

}  // namespace cpmbee
