// A thin layer over ort_abi.h: tensors, the running kernel's context, errors, and the declaration of an op.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace cpmbee {

// The runtime's functions; attached when the library is registered.
ort::Api& api();

// What a kernel refuses: becomes the status that ends the run.
class InvalidInput : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A status of the runtime itself, on its way back to it.
struct RuntimeStatus {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status != nullptr) throw RuntimeStatus{status};
}

// Calls f; no exception crosses the C boundary.
template <class F>
OrtStatus* guard(F&& f) noexcept {
  try {
    f();
    return nullptr;
  } catch (const RuntimeStatus& error) {
    return error.status;
  } catch (const InvalidInput& error) {
    return api().CreateStatus(ort::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return api().CreateStatus(ort::kFail, error.what());
  } catch (...) {
    return api().CreateStatus(ort::kFail, "unknown error");
  }
}

// A view of a dense tensor on the CPU.
struct Tensor {
  void* data = nullptr;
  int element_type = 0;
  std::vector<int64_t> dims;

  explicit Tensor(const OrtValue* value);

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  std::string shape() const;  // "[2,3]"
  int64_t count() const;      // number of elements
  int64_t rows() const;       // product of all dimensions but the last
};

// Inputs, outputs and threads of one call.
class Context {
 public:
  explicit Context(OrtKernelContext* context) : context_(context) {}

  Tensor input(size_t index) const;
  Tensor output(size_t index, const std::vector<int64_t>& dims) const;

  // Runs body(data, i) for every i in [0, total) on the session's threads. What a body throws is thrown here.
  void parallel_for(size_t total, void (*body)(void* data, size_t i), void* data) const;

 private:
  OrtKernelContext* context_;
};

// Attributes and constant inputs of one node.
class NodeInfo {
 public:
  explicit NodeInfo(const OrtKernelInfo* info) : info_(info) {}

  int64_t integer(const char* name) const;
  float number(const char* name) const;
  std::unique_ptr<Tensor> constant_input(size_t index) const;  // null when the input is not a constant

 private:
  const OrtKernelInfo* info_;
};

// compute() is const: one session may run in several threads at once.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(const Context& context) const = 0;
};

template <class K>
std::unique_ptr<Kernel> make_kernel(const NodeInfo& info) {
  return std::make_unique<K>(info);
}

// One op: what the runtime asks about it, and how to make its kernel. Lives until the process ends.
class Op : public OrtCustomOp {
 public:
  using Make = std::unique_ptr<Kernel> (*)(const NodeInfo&);

  // The last `optional_inputs` inputs and `optional_outputs` outputs may be left out by a node.
  Op(const char* name, std::vector<int> input_types, std::vector<int> output_types, Make make, size_t optional_inputs = 0,
     size_t optional_outputs = 0);

  const char* name() const { return name_; }
  uint64_t calls() const { return calls_.load(std::memory_order_relaxed); }
  // The instruction set of the kernels that run now; portable code says "scalar".
  const char* (*kernel_name)() = [] { return "scalar"; };

 private:
  static const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

  const char* name_;
  std::vector<int> input_types_;
  std::vector<int> output_types_;
  Make make_;
  size_t required_inputs_;
  size_t required_outputs_;
  mutable std::atomic<uint64_t> calls_{0};
};

// One function per op, each in the source of its op.
Op& bucketed_position_bias();
Op& bucketed_attention();  // three ops of one name, by the type of the cache
Op& bucketed_attention_fp16();
Op& bucketed_attention_int8();
Op& quantized_linear();
Op& quantized_embedding();
Op& subscript_rotation();
Op& gated_gelu();
Op& rms_norm();
Op& add_rms_norm();

}  // namespace cpmbee
