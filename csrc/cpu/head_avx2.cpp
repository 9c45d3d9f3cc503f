// Compiled with -mavx2 -mfma -mf16c; runs only where logits_rows.cpp found them.
#define PYRL_WIDTH 8
#include "cpu/head.h"

namespace pyrl::cpu {
HeadKernels avx2_head() { return head_kernels<DType::kF32, false>(); }
}  // namespace pyrl::cpu
