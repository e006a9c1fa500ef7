// Fetching weights ahead of a product that reads each of them once; part of the kernels that few rows go through.
#pragma once

#include <cstdint>

namespace cpmbee {

constexpr int64_t kStreamAhead = 6144;  // bytes: more than arrive while one line is on its way, measured
constexpr int64_t kPagesAhead = 32768;  // bytes
constexpr int64_t kPage = 4096;         // the smallest that a mapped file has

// Asks for the lines of `Bytes` bytes some way behind `weight`, and once a page for one line far behind, so that the
// page's address is known by the time its lines are asked for: weights are mapped from a file, mostly in small pages,
// and waiting for each address costs a tenth to a quarter of the time. To be called every `Bytes` bytes. Addresses
// past the end of the weights are fine, nothing is read.
template <int64_t Bytes>
inline void stream_ahead(const uint8_t* weight) {
  constexpr int64_t kLine = 64;
  if (reinterpret_cast<uintptr_t>(weight) % kPage < Bytes) __builtin_prefetch(weight + kPagesAhead);
#pragma GCC unroll 8
  for (int64_t i = 0; i < Bytes; i += kLine) __builtin_prefetch(weight + kStreamAhead + i);
}

}  // namespace cpmbee
