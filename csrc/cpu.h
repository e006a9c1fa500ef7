// Which instruction set the kernels use: the best that the machine has, capped by CPMBEE_ISA.
#pragma once

#include <string_view>
#include <vector>

namespace cpmbee {

// In the order that a cap goes by; a machine has those of its own architecture.
enum class Isa : int { scalar = 0, neon = 1, avx2 = 2, avx512 = 3 };

// "scalar", "neon", "avx2" or "avx512".
const char* isa_name(Isa isa);

// What this machine and operating system can run, "scalar" first and the best last.
std::vector<Isa> available_isas();
Isa best_isa();

// Does this machine multiply and add bytes in one instruction, in vectors of 64 bytes, or of 32 without AVX-512?
bool has_avx512_vnni();
bool has_avx_vnni();
// And with NEON?
bool has_neon_dotprod();

// What the kernels use now. At first call: the best that this machine has and the environment variable CPMBEE_ISA lets.
Isa active_isa();

// Replaces the cap of CPMBEE_ISA from now on. False, and no change, when no instruction set has that name.
bool cap_isa(std::string_view name);

}  // namespace cpmbee
