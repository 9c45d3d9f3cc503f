// Compiled with -mavx2 -mfma -mf16c; runs only where logits_rows.cpp found them. bf16 is widened.
#define PYRL_WIDTH 8
#include "cpu/head.h"

namespace pyrl::cpu {
HeadKernels avx2_head(DType dtype) {
  return dtype == DType::kF32 ? head_kernels<DType::kF32, false>()
                              : head_kernels<DType::kBF16, false>();
}
}  // namespace pyrl::cpu
