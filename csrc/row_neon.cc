// The vector kernels of rows compiled for NEON, which every 64-bit ARM machine has.

#if defined(__aarch64__) && defined(__GNUC__)

#include "simd_neon.h"

#include "row_simd.h"

namespace cpmbee {

const RowKernels kNeonRows = {gated_gelu, add_norm, rotate};

}  // namespace cpmbee

#endif
