// The vector kernels of rows compiled for AVX-512; run only where the machine has it.

#if defined(__x86_64__) && defined(__GNUC__)

#include "simd_avx512.h"

#include "row_simd.h"

namespace cpmbee {

const RowKernels kAvx512Rows = {gated_gelu, add_norm, rotate};

}  // namespace cpmbee

#endif
