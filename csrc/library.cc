// What the library exports: RegisterCustomOps for ONNX Runtime, and a few C functions that say what is running.

#include <mutex>
#include <string>

#include "cpu.h"
#include "op.h"

namespace cpmbee {
namespace {

constexpr const char* kDomain = "cpm_bee";

Op* const* all_ops() {
  static Op* const ops[] = {&add_rms_norm(),
                            &bucketed_attention(),
                            &bucketed_attention_fp16(),
                            &bucketed_attention_int8(),
                            &bucketed_position_bias(),
                            &gated_gelu(),
                            &quantized_embedding(),
                            &quantized_linear(),
                            &rms_norm(),
                            &subscript_rotation(),
                            nullptr};
  return ops;
}

// Null where there is no op of that number.
const Op* op_at(int index) {
  if (index < 0) return nullptr;
  Op* const* op = all_ops();
  while (index > 0 && *op != nullptr) ++op, --index;
  return *op;
}

// The domain with all ops in it: made once, shared by all sessions, never released since sessions may outlive us.
OrtStatus* shared_domain(OrtCustomOpDomain** domain) {
  static OrtCustomOpDomain* complete = nullptr;
  if (complete == nullptr) {
    OrtCustomOpDomain* made = nullptr;
    if (OrtStatus* status = api().CreateCustomOpDomain(kDomain, &made)) return status;
    for (Op* const* op = all_ops(); *op != nullptr; ++op) {
      if (OrtStatus* status = api().CustomOpDomain_Add(made, *op)) return status;
    }
    complete = made;
  }
  *domain = complete;
  return nullptr;
}

}  // namespace
}  // namespace cpmbee

ORT_EXPORT OrtStatus* ORT_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const OrtApi* table = base->GetApi(ort::kApiVersion);
  if (table == nullptr) {  // too old; version 1 of the interface is always there, and can at least say so
    ort::Api oldest;
    oldest.attach(base->GetApi(1));
    const std::string message = std::string("cpm_bee ops need ONNX Runtime 1.18 or later, this is ") +
                                base->GetVersionString();
    return oldest.CreateStatus(ort::kFail, message.c_str());
  }
  cpmbee::api().attach(table);
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatus* status = cpmbee::shared_domain(&domain)) return status;
  return cpmbee::api().AddCustomOpDomain(options, domain);
}

// The name of op number `index`, or null where there is none.
ORT_EXPORT const char* cpmbee_op_name(int index) {
  const cpmbee::Op* op = cpmbee::op_at(index);
  return op == nullptr ? nullptr : op->name();
}

// The instruction set that op number `index` runs with now: "avx512", "avx2", "neon" or "scalar"; or null.
ORT_EXPORT const char* cpmbee_op_kernel(int index) {
  const cpmbee::Op* op = cpmbee::op_at(index);
  return op == nullptr ? nullptr : op->kernel_name();
}

// How often op number `index` has run in this process.
ORT_EXPORT uint64_t cpmbee_op_calls(int index) {
  const cpmbee::Op* op = cpmbee::op_at(index);
  return op == nullptr ? 0 : op->calls();
}

// Caps the instruction set from now on, as CPMBEE_ISA does at start; 0 when no instruction set has this name.
ORT_EXPORT int cpmbee_cap_isa(const char* name) { return name != nullptr && cpmbee::cap_isa(name) ? 1 : 0; }
