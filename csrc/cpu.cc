#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace cpmbee {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512};

bool parse(std::string_view name, Isa& isa) {
  for (Isa candidate : kAll) {
    if (name == isa_name(candidate)) {
      isa = candidate;
      return true;
    }
  }
  return false;
}

Isa isa_from_environment() {
  Isa cap = Isa::avx512;
  const char* name = std::getenv("CPMBEE_ISA");
  if (name != nullptr) parse(name, cap);  // the Python side refuses unknown names before it loads this library
  return std::min(cap, best_isa());
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{isa_from_environment()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::scalar:
      break;
  }
  return "scalar";
}

Isa best_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::scalar;
}

bool has_avx512_vnni() {
#if defined(__x86_64__) && defined(__GNUC__)
  return best_isa() == Isa::avx512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool has_avx_vnni() {
#if defined(__x86_64__) && defined(__GNUC__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // by hand: compilers that know the name "avxvnni" are recent
  return best_isa() >= Isa::avx2 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
#else
  return false;
#endif
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

bool cap_isa(std::string_view name) {
  Isa cap;
  if (!parse(name, cap)) return false;
  active().store(std::min(cap, best_isa()), std::memory_order_relaxed);
  return true;
}

}  // namespace cpmbee
