// Compares every set of quantized kernels with the scalar reference, bit by bit; meant for a build with sanitizers.
// Rows of weights are compared with what they multiply a single 1 to.
//
// Every array has exactly its size and lies on the heap, so that AddressSanitizer sees a read past any of them. Each
// problem runs serially and on two threads.
//
//   quantized_driver [seed] [problems]

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "driver.h"
#include "quantized_kernel.h"

namespace {

using cpmbee::QuantizedKernels;
using cpmbee::QuantizedMatrix;
using cpmbee::Serial;

// A problem and the arrays that it points to.
struct Case {
  QuantizedMatrix matrix;
  int64_t rows;
  std::vector<uint8_t> weight;
  std::vector<uint16_t> scales;
  std::vector<float> inputs;

  explicit Case(Random& random) {
    QuantizedMatrix& m = matrix;
    m.bits = random.chance(0.5) ? 4 : 8;
    m.block = int64_t{32} << random.integer(0, 2);
    m.in_features = random.chance(0.3) ? random.integer(500, 1500) : random.integer(1, 300);
    m.out_features = random.integer(1, 130);
    if (random.chance(0.1)) {  // more inputs than are expanded at one time
      m.in_features = random.integer(2500, 8000);
      m.out_features = random.integer(1, 40);
    }
    rows = random.chance(0.5) ? random.integer(1, 8) : random.integer(9, 70);
    weight.resize(m.groups() * m.group_bytes());
    const bool extreme = random.chance(0.2);  // largest and smallest weights: sums that would overflow 16 bits
    for (uint8_t& byte : weight) byte = extreme ? (random.chance(0.5) ? 0xff : 0x00) : random.integer(0, 255);
    scales.resize(m.groups() * m.blocks() * cpmbee::kLanes);
    for (uint16_t& scale : scales) scale = random.integer(0, 0x3fff);  // 0 to 2, subnormal numbers too
    inputs = random.normal(rows * m.in_features);
    if (extreme) {
      for (float& x : inputs) x = x < 0 ? -1.0f : 1.0f;
    }
    if (random.chance(0.3)) {
      for (float& x : inputs) {
        if (random.chance(0.9)) x = random.chance(0.5) ? 0.0f : x * 1e-38f;
      }
    }
    if (random.chance(0.1)) inputs[random.integer(0, inputs.size() - 1)] = std::numeric_limits<float>::infinity();
    if (random.chance(0.1)) inputs[random.integer(0, inputs.size() - 1)] = NAN;
    m.weight = weight.data();
    m.scales = scales.data();
  }

  std::vector<float> run(const QuantizedKernels& kernels, const cpmbee::Executor& executor) const {
    std::vector<float> result(rows * matrix.out_features, -1.0f);
    cpmbee::multiply(matrix, inputs.data(), rows, result.data(), kernels, executor);
    return result;
  }
};

// The last output's weight for a random input, against the product with a row that is 1 there and 0 elsewhere.
bool reads_rows(const Case& test, Random& random) {
  const QuantizedMatrix& m = test.matrix;
  const int64_t output = m.out_features - 1;
  const int64_t input = random.integer(0, m.in_features - 1);
  std::vector<float> row(m.in_features);
  cpmbee::dequantize_row(m, output, row.data());
  std::vector<float> one(m.in_features, 0.0f);
  one[input] = 1.0f;
  std::vector<float> product(m.out_features);
  cpmbee::multiply(m, one.data(), 1, product.data(), cpmbee::kScalarQuantized, Serial());
  return std::abs(product[output] - row[input]) <= 1e-6f * std::abs(row[input]);
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const bool both_nan = std::isnan(a[i]) && std::isnan(b[i]);
    if (!both_nan && std::memcmp(&a[i], &b[i], sizeof a[i]) != 0) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 1;
  const int problems = argc > 2 ? std::atoi(argv[2]) : 100;
  const std::vector<const QuantizedKernels*> available = cpmbee::available_quantized_kernels();
  Random random(seed);
  for (int i = 0; i < problems; ++i) {
    const Case test(random);
    if (!reads_rows(test, random)) {
      std::fprintf(stderr, "problem %d: a row of weights is not what is multiplied\n", i);
      return 1;
    }
    const std::vector<float> expected = test.run(*available.front(), Serial());
    for (const QuantizedKernels* kernels : available) {
      const bool serial = same(test.run(*kernels, Serial()), expected);
      if (serial && same(test.run(*kernels, TwoThreads()), expected)) continue;
      const QuantizedMatrix& m = test.matrix;
      std::fprintf(stderr, "problem %d, %s, %s: differs (%d bits, block %d, in %d, out %d, rows %d)\n", i, kernels->name,
                   serial ? "two threads" : "one thread", static_cast<int>(m.bits), static_cast<int>(m.block),
                   static_cast<int>(m.in_features), static_cast<int>(m.out_features), static_cast<int>(test.rows));
      return 1;
    }
  }
  std::printf("%d problems, up to %s: all agree\n", problems, available.back()->name);
  return 0;
}
