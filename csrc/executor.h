// How the kernels reach threads without knowing whose they are.
#pragma once

#include <cstddef>
#include <type_traits>

namespace cpmbee {

// Runs body(data, i) for every i in [0, total), on any threads, and returns when all are done.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual void run(size_t total, void (*body)(void* data, size_t i), void* data) const = 0;

  template <class F>
  void for_each(size_t total, F&& body) const {
    run(total, [](void* data, size_t i) { (*static_cast<std::remove_reference_t<F>*>(data))(i); }, &body);
  }
};

// All on the calling thread: for work that takes less time than waking another.
class Serial final : public Executor {
 public:
  void run(size_t total, void (*body)(void*, size_t), void* data) const override {
    for (size_t i = 0; i < total; ++i) body(data, i);
  }
};

}  // namespace cpmbee
