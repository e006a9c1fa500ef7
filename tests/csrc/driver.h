// What the drivers that compare kernels share: threads, and random problems that a seed brings back.
#pragma once

#include <atomic>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "executor.h"

class TwoThreads final : public cpmbee::Executor {
 public:
  void run(size_t total, void (*body)(void*, size_t), void* data) const override {
    std::atomic<size_t> next{0};
    const auto work = [&] {
      for (size_t i = next++; i < total; i = next++) body(data, i);
    };
    std::thread other(work);
    work();
    other.join();
  }
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  std::vector<float> normal(int64_t count) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(count);
    for (float& x : values) x = distribution(engine_);
    return values;
  }

 private:
  std::mt19937 engine_;
};
