// Compares the kernels of rows with the scalar reference on random rows; meant for a build with sanitizers.
//
// Every array has exactly its size and lies on the heap, so that AddressSanitizer sees a read past any of them. Results
// on two threads must be those of one, bit by bit.
//
//   row_driver [seed] [problems]

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "driver.h"
#include "row_kernel.h"

namespace {

using cpmbee::Executor;
using cpmbee::RowKernels;
using cpmbee::Serial;
using Values = std::vector<float>;

// Random rows, and all that is computed from them, one array after the other.
struct Case {
  int64_t rows;
  int64_t width;
  bool half;
  Values both, stream, addend, weight, frequencies;
  std::vector<int32_t> subscripts;

  explicit Case(Random& random) {
    rows = random.integer(1, 12);
    width = 2 * (random.chance(0.3) ? random.integer(500, 3000) : random.integer(1, 40));
    half = random.chance(0.5);
    both = random.normal(rows * 2 * width);
    for (float& x : both) x *= 4.0f;
    stream = random.normal(rows * width);
    addend = random.normal(rows * width);
    weight = random.normal(width);
    for (int64_t i = 0; i < width / 2; ++i) {
      frequencies.push_back(std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(width)));
    }
    for (int64_t i = 0; i < rows; ++i) subscripts.push_back(random.chance(0.3) ? 0 : random.integer(-4000, 4000));
    if (random.chance(0.2)) subscripts[0] = 1 << 30;
  }

  Values run(const RowKernels& kernels, const Executor& executor) const {
    Values gated(rows * width), sum(rows * width), added(rows * width), normed(rows * width), turned(rows * width);
    cpmbee::gate_rows(both.data(), rows, width, gated.data(), kernels, executor);
    cpmbee::norm_rows(stream.data(), addend.data(), weight.data(), rows, width, 1e-6f, sum.data(), added.data(),
                      kernels, executor);
    cpmbee::norm_rows(stream.data(), nullptr, weight.data(), rows, width, 1e-6f, nullptr, normed.data(), kernels,
                      executor);
    const cpmbee::Rotation rotation{frequencies.data(), width / 2, 16.0f, half};
    cpmbee::rotate_rows(rotation, stream.data(), subscripts.data(), rows, turned.data(), kernels, executor);
    Values all;
    for (const Values* part : {&gated, &sum, &added, &normed, &turned}) all.insert(all.end(), part->begin(), part->end());
    return all;
  }
};

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 1;
  const int problems = argc > 2 ? std::atoi(argv[2]) : 100;
  Random random(seed);
  float worst = 0.0f;
  for (int i = 0; i < problems; ++i) {
    const Case test(random);
    const Values expected = test.run(cpmbee::kScalarRows, Serial());
    for (const cpmbee::Isa isa : cpmbee::available_isas()) {
      const RowKernels& kernels = cpmbee::row_kernels(isa);
      const Values found = test.run(kernels, Serial());
      if (std::memcmp(test.run(kernels, TwoThreads()).data(), found.data(), found.size() * sizeof(float)) != 0) {
        std::fprintf(stderr, "problem %d, %s: depends on the threads\n", i, cpmbee::isa_name(isa));
        return 1;
      }
      for (size_t j = 0; j < found.size(); ++j) {
        const float error = std::abs(found[j] - expected[j]) / std::max(1.0f, std::abs(expected[j]));
        if (std::isnan(found[j]) && std::isnan(expected[j])) continue;  // of infinite phases
        if (!(error <= 2e-6f)) {
          std::fprintf(stderr, "problem %d, %s, value %zu: %g, expected %g (rows %d, width %d)\n", i,
                       cpmbee::isa_name(isa), j, found[j], expected[j], static_cast<int>(test.rows),
                       static_cast<int>(test.width));
          return 1;
        }
        worst = std::max(worst, error);
      }
    }
  }
  std::printf("%d problems, up to %s, worst error %.1e: all agree\n", problems, isa_name(cpmbee::best_isa()), worst);
  return 0;
}
