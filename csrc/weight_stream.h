// Fetching weights ahead of a product that reads each of them once; part of the kernels that few rows go through.
#pragma once

#include <cstdint>

namespace cpmbee {

constexpr int64_t kStreamAhead = 6144;  // bytes: more than arrive while one line is on its way, measured
constexpr int64_t kPagesAhead = 32768;  // bytes
constexpr int64_t kPage = 4096;         // the smallest that a mapped file has

// Once for each page, asks for one line far behind `weight`, so that the page's address is known by the time that its
// lines are asked for: weights are mapped from a file, mostly in small pages, and waiting for each address costs a tenth
// to a quarter of the time. To be called every `bytes` bytes, at most a page. Here and below, addresses past the end of
// the weights are fine: nothing is read.
inline void look_up_ahead(const uint8_t* weight, int64_t bytes) {
  if (static_cast<int64_t>(reinterpret_cast<uintptr_t>(weight) % kPage) < bytes) {
    __builtin_prefetch(weight + kPagesAhead);
  }
}

// Asks for a line some way behind `weight`. To be called for every line.
inline void fetch_ahead(const uint8_t* weight) { __builtin_prefetch(weight + kStreamAhead); }

}  // namespace cpmbee
