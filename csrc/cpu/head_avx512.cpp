// Compiled with -mavx512{f,bw,dq,vl}; runs only where logits_rows.cpp found them. bf16 is widened.
#define PYRL_WIDTH 16
#include "cpu/head.h"

namespace pyrl::cpu {
HeadKernels avx512_head(DType dtype) {
  return dtype == DType::kF32 ? head_kernels<DType::kF32, false>()
                              : head_kernels<DType::kBF16, false>();
}
}  // namespace pyrl::cpu
