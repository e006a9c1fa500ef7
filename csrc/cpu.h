// Which instruction set the kernels use: the best that the machine has, capped by CPMBEE_ISA.
#pragma once

#include <string_view>

namespace cpmbee {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2 };

// "scalar", "avx2" or "avx512".
const char* isa_name(Isa isa);

// What this machine and operating system can run.
Isa best_isa();

// Does this machine multiply and add bytes in one instruction, in vectors of 64 bytes, or of 32 without AVX-512?
bool has_avx512_vnni();
bool has_avx_vnni();

// What the kernels use now. At first call: the smaller of best_isa() and the environment variable CPMBEE_ISA.
Isa active_isa();

// Replaces the cap of CPMBEE_ISA from now on. False, and no change, when no instruction set has that name.
bool cap_isa(std::string_view name);

}  // namespace cpmbee
