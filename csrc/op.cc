#include "op.h"

#include <algorithm>
#include <exception>
#include <limits>

namespace cpmbee {
namespace {

// A kernel together with the op that counts its calls: what the runtime holds as `void*`.
struct Node {
  std::unique_ptr<Kernel> kernel;
  std::atomic<uint64_t>* calls;
};

// What 64 bits do not hold, which the shape of an empty tensor may say, becomes the largest number that they do.
int64_t product(std::vector<int64_t>::const_iterator begin, std::vector<int64_t>::const_iterator end) {
  if (std::find(begin, end, 0) != end) return 0;
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  int64_t result = 1;
  for (; begin != end; ++begin) result = *begin > kMost / result ? kMost : result * *begin;
  return result;
}

}  // namespace

ort::Api& api() {
  static ort::Api functions;
  return functions;
}

Tensor::Tensor(const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api().GetTensorTypeAndShape(value, &info));
  const auto release = [](OrtTensorTypeAndShapeInfo* owned) { api().ReleaseTensorTypeAndShapeInfo(owned); };
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> owner(info, release);
  size_t rank = 0;
  check(api().GetDimensionsCount(info, &rank));
  dims.resize(rank);
  check(api().GetDimensions(info, dims.data(), rank));
  check(api().GetTensorElementType(info, &element_type));
  check(api().GetTensorMutableData(const_cast<OrtValue*>(value), &data));
}

std::string Tensor::shape() const {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? "," : "") + std::to_string(dims[i]);
  return text + "]";
}

int64_t Tensor::count() const { return product(dims.begin(), dims.end()); }

int64_t Tensor::rows() const { return dims.empty() ? 1 : product(dims.begin(), dims.end() - 1); }

Tensor Context::input(size_t index) const {
  const OrtValue* value = nullptr;
  check(api().KernelContext_GetInput(context_, index, &value));
  if (value == nullptr) throw InvalidInput("input " + std::to_string(index) + " is absent");
  return Tensor(value);
}

Tensor Context::output(size_t index, const std::vector<int64_t>& dims) const {
  OrtValue* value = nullptr;
  check(api().KernelContext_GetOutput(context_, index, dims.data(), dims.size(), &value));
  if (value == nullptr) throw InvalidInput("output " + std::to_string(index) + " is absent");
  return Tensor(value);
}

void Context::parallel_for(size_t total, void (*body)(void* data, size_t i), void* data) const {
  struct Loop {
    void (*body)(void*, size_t);
    void* data;
    std::atomic<bool> failed{false};
    std::exception_ptr first_error;
  } loop{body, data, {}, {}};
  const auto guarded = [](void* opaque, size_t i) {  // an exception must not unwind through the runtime's threads
    Loop& running = *static_cast<Loop*>(opaque);
    try {
      running.body(running.data, i);
    } catch (...) {
      if (!running.failed.exchange(true)) running.first_error = std::current_exception();
    }
  };
  // As many batches as items: whoever is free takes the next one, since items differ in length.
  check(api().KernelContext_ParallelFor(context_, guarded, total, total, &loop));
  if (loop.failed) std::rethrow_exception(loop.first_error);
}

int64_t NodeInfo::integer(const char* name) const {
  int64_t value = 0;
  check(api().KernelInfoGetAttribute_int64(info_, name, &value));
  return value;
}

float NodeInfo::number(const char* name) const {
  float value = 0.0f;
  check(api().KernelInfoGetAttribute_float(info_, name, &value));
  return value;
}

std::unique_ptr<Tensor> NodeInfo::constant_input(size_t index) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(api().KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
  return is_constant && value != nullptr ? std::make_unique<Tensor>(value) : nullptr;
}

Op::Op(const char* name, std::vector<int> input_types, std::vector<int> output_types, Make make,
       size_t optional_inputs, size_t optional_outputs)
    : OrtCustomOp{},
      name_(name),
      input_types_(std::move(input_types)),
      output_types_(std::move(output_types)),
      make_(make),
      required_inputs_(input_types_.size() - optional_inputs),
      required_outputs_(output_types_.size() - optional_outputs) {
  version = ort::kApiVersion;
  GetName = [](const OrtCustomOp* op) { return self(op).name_; };
  GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  GetInputType = [](const OrtCustomOp* op, size_t i) { return self(op).input_types_[i]; };
  GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).input_types_.size(); };
  GetOutputType = [](const OrtCustomOp* op, size_t i) { return self(op).output_types_[i]; };
  GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).output_types_.size(); };
  GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) -> int { return i >= self(op).required_inputs_; };
  GetOutputCharacteristic = [](const OrtCustomOp* op, size_t i) -> int { return i >= self(op).required_outputs_; };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  GetVariadicInputMinArity = GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  GetVariadicOutputMinArity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return std::numeric_limits<int>::max(); };
  CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
    *kernel = nullptr;
    return guard([&] { *kernel = new Node{self(op).make_(NodeInfo(info)), &self(op).calls_}; });
  };
  KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return guard([&] {
      const Node& node = *static_cast<Node*>(kernel);
      node.kernel->compute(Context(context));
      node.calls->fetch_add(1, std::memory_order_relaxed);
    });
  };
  KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
}

}  // namespace cpmbee
