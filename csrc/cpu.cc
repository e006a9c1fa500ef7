#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace cpmbee {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::neon, Isa::avx2, Isa::avx512};

bool parse(std::string_view name, Isa& isa) {
  for (Isa candidate : kAll) {
    if (name == isa_name(candidate)) {
      isa = candidate;
      return true;
    }
  }
  return false;
}

// The best that this machine has and that is not above `cap`.
Isa best_within(Isa cap) {
  const std::vector<Isa> available = available_isas();
  return *std::find_if(available.rbegin(), available.rend(), [&](Isa isa) { return isa <= cap; });
}

Isa isa_from_environment() {
  Isa cap = Isa::avx512;
  const char* name = std::getenv("CPMBEE_ISA");
  if (name != nullptr) parse(name, cap);  // the Python side refuses unknown names before it loads this library
  return best_within(cap);
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
    case Isa::neon:
      return "neon";
    case Isa::scalar:
      break;
  }
  return "scalar";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> available{Isa::scalar};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) available.push_back(Isa::avx2);
  if (avx512) available.push_back(Isa::avx512);
#elif defined(__aarch64__) && defined(__GNUC__)
  available.push_back(Isa::neon);  // part of the architecture
#endif
  return available;
}

Isa best_isa() { return available_isas().back(); }

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

bool has_neon_dotprod() {
#if defined(__ARM_FEATURE_DOTPROD)  // all code may use them, as on every Apple machine
  return true;
#elif defined(__aarch64__) && defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return false;
#endif
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

bool cap_isa(std::string_view name) {
  Isa cap;
  if (!parse(name, cap)) return false;
  active().store(best_within(cap), std::memory_order_relaxed);
  return true;
}

}  // namespace cpmbee
