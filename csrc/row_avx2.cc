// The vector kernels of rows compiled for AVX2 with FMA; run only where the machine has it.

#if defined(__x86_64__) && defined(__GNUC__)

#include "simd_avx2.h"

#include "row_simd.h"

namespace cpmbee {

const RowKernels kAvx2Rows = {gated_gelu, add_norm, rotate};

}  // namespace cpmbee

#endif
