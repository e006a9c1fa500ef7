// Compares every instruction set with the scalar reference on random problems; meant for a build with sanitizers.
//
// Every array has exactly its size and lies on the heap, so that AddressSanitizer sees a read past any of them. Each
// problem runs serially and on two threads, which must agree to the bit.
//
//   attention_driver [seed] [problems]

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention_kernel.h"
#include "driver.h"
#include "half.h"

namespace {

using cpmbee::AttentionProblem;
using cpmbee::BiasTable;
using cpmbee::CacheType;
using cpmbee::Isa;
using cpmbee::Serial;

// The context, and the caches with the new rows in them.
struct Result {
  std::vector<float> context;
  std::vector<char> key_cache, value_cache;
  std::vector<float> key_scales, value_scales;

  bool same_caches(const Result& other) const {
    return key_cache == other.key_cache && value_cache == other.value_cache && key_scales == other.key_scales &&
           value_scales == other.value_scales;
  }
};

// A problem and the arrays that it points to.
struct Case {
  AttentionProblem problem;
  std::vector<float> qkv, key_scales, value_scales, table;
  std::vector<char> key_cache, value_cache;  // of the problem's type
  std::vector<int32_t> new_slots;
  std::vector<int16_t> relation;
  std::vector<int32_t> slots;
  BiasTable bias;

  explicit Case(Random& random) {
    AttentionProblem& p = problem;
    p.batch = random.integer(1, 4);
    const bool decode = random.chance(0.5);
    const bool two_tiles = random.chance(0.1);
    p.queries = decode ? random.integer(1, cpmbee::kDecodeQueries)
                       : random.integer(1, 70) + (two_tiles ? cpmbee::kQueryTile : cpmbee::kDecodeQueries);
    p.keys = random.integer(0, 300);
    p.heads = random.integer(1, 9);
    p.dim_head = random.chance(0.5) ? 8 * random.integer(1, 17) : random.integer(1, 130);
    p.scale = 1.0f / std::sqrt(static_cast<float>(p.dim_head));
    const int64_t rows = random.integer(1, 200);
    const int64_t buckets = random.integer(1, 600);
    qkv = random.normal(p.batch * p.queries * 3 * p.row_size());
    p.cache_type = static_cast<CacheType>(random.integer(0, cpmbee::kCacheTypes - 1));
    fill_cache(random, rows);
    table = random.normal(buckets * p.heads);
    bias = BiasTable(table.data(), buckets, p.heads);
    slots.resize(p.batch * p.keys);
    for (int32_t& slot : slots) slot = static_cast<int32_t>(random.integer(0, rows - 1));
    relation.resize(p.batch * p.queries * p.keys);
    const double masked = random.chance(0.3) ? 0.99 : 0.2;
    const int64_t run_length = random.integer(1, 100);  // of equal relations
    for (size_t i = 0; i < relation.size(); ++i) {
      const bool repeat = i > 0 && random.integer(0, run_length) != 0;
      relation[i] = repeat ? relation[i - 1] : random.chance(masked) ? -1 : random.integer(0, buckets - 1);
    }
    p.qkv = qkv.data();
    p.relation = relation.data();
    p.bias = &bias;
    p.slots = slots.data();
    new_slots.resize(p.batch * p.queries);
    for (int32_t& slot : new_slots) slot = static_cast<int32_t>(random.integer(0, rows - 1));
  }

  // Writes `rows` random rows with the reference's rounding: the problem appends rows of its own to an empty pool.
  void fill_cache(Random& random, int64_t rows) {
    constexpr size_t kBytes[] = {sizeof(float), sizeof(cpmbee::Half), sizeof(int8_t)};
    AttentionProblem& p = problem;
    const size_t bytes = rows * p.row_size() * kBytes[static_cast<int>(p.cache_type)];
    const size_t scales = p.cache_type == CacheType::int8 ? rows * p.heads : 0;
    key_cache.resize(bytes);
    value_cache.resize(bytes);
    key_scales.resize(scales);
    value_scales.resize(scales);
    const std::vector<float> values = random.normal(rows * 3 * p.row_size());
    AttentionProblem all = p;
    all.batch = 1;
    all.queries = rows;
    all.qkv = values.data();
    all.key_cache = {key_cache.data(), scales == 0 ? nullptr : key_scales.data()};
    all.value_cache = {value_cache.data(), scales == 0 ? nullptr : value_scales.data()};
    std::vector<int32_t> every(rows);
    for (int64_t i = 0; i < rows; ++i) every[i] = static_cast<int32_t>(i);
    cpmbee::append(all, every.data(), Isa::scalar, Serial());
  }

  Result run(Isa isa, const cpmbee::Executor& executor) const {
    AttentionProblem p = problem;
    Result result{std::vector<float>(p.batch * p.queries * p.row_size(), NAN), key_cache, value_cache, key_scales,
                  value_scales};
    const bool scaled = p.cache_type == CacheType::int8;
    p.context = result.context.data();
    p.key_cache = {result.key_cache.data(), scaled ? result.key_scales.data() : nullptr};
    p.value_cache = {result.value_cache.data(), scaled ? result.value_scales.data() : nullptr};
    cpmbee::append(p, new_slots.data(), isa, executor);
    cpmbee::attend(p, isa, executor);
    return result;
  }
};

float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  float largest = 0.0f;
  for (size_t i = 0; i < a.size(); ++i) {
    const float difference = std::abs(a[i] - b[i]);
    if (!(difference <= largest)) largest = difference;  // NaN is a difference, too
  }
  return largest;
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 1;
  const int problems = argc > 2 ? std::atoi(argv[2]) : 100;
  constexpr float kTolerance = 1e-5f;
  Random random(seed);
  for (int i = 0; i < problems; ++i) {
    const Case test(random);
    const AttentionProblem& p = test.problem;
    const Result expected = test.run(Isa::scalar, Serial());
    for (const Isa isa : cpmbee::available_isas()) {
      const Result serial = test.run(isa, Serial());
      const Result threaded = test.run(isa, TwoThreads());
      const float difference = largest_difference(serial.context, expected.context);
      const bool rounded = serial.same_caches(expected) && threaded.same_caches(expected);
      const bool agree = serial.context == threaded.context;
      if (difference <= kTolerance && agree && rounded) continue;
      std::fprintf(stderr,
                   "problem %d, %s: off by %g, threads %s, caches %s (type %d batch %d queries %d keys %d heads %d dim "
                   "%d)\n",
                   i, isa_name(isa), difference, agree ? "agree" : "differ",
                   rounded ? "agree" : "differ", static_cast<int>(p.cache_type), static_cast<int>(p.batch), static_cast<int>(p.queries), static_cast<int>(p.keys),
                   static_cast<int>(p.heads), static_cast<int>(p.dim_head));
      return 1;
    }
  }
  std::printf("%d problems, up to %s: all agree\n", problems, isa_name(cpmbee::best_isa()));
  return 0;
}
