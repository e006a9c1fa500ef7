// What the two attention ops check and prepare in the same way.
#pragma once

#include <algorithm>
#include <optional>
#include <string>

#include "attention_kernel.h"
#include "op.h"

namespace cpmbee {

// An Executor on the session's threads.
class SessionThreads final : public Executor {
 public:
  explicit SessionThreads(const Context& context) : context_(context) {}
  void run(size_t total, void (*body)(void*, size_t), void* data) const override {
    if (total == 1) return body(data, 0);
    if (total > 1) context_.parallel_for(total, body, data);
  }

 private:
  const Context& context_;
};

// Throws InvalidInput("<op>: <input> must have the shape <expected>, not [...]") unless the sizes agree; -1 is any.
void require_shape(const char* op, const char* input, const Tensor& tensor, const std::vector<int64_t>& sizes,
                   const char* expected);

// Throws InvalidInput("<op>: <input>[i,j,k] is v, must be in low..high") for the first element outside [low, high].
void require_in_range(const char* op, const char* input, const Tensor& tensor, int64_t low, int64_t high,
                      const Executor& executor);

// The bias table input: rearranged once when the model file holds it as a constant, else in every call.
class TableInput {
 public:
  // Each bias is multiplied with `unit`.
  TableInput(const char* op, const NodeInfo& info, size_t index, float unit);

  // The table of this call; `storage` holds it if it is not constant.
  const BiasTable& get(const Context& context, BiasTable& storage) const;

 private:
  const char* op_;
  size_t index_;
  float unit_;
  std::optional<BiasTable> constant_;
};

}  // namespace cpmbee
