// Compiled with -mavx512{f,bw,dq,vl,bf16} -mprfchw; runs only where head.cpp found them.
#define PYRL_WIDTH 16
#define PYRL_PAIRS 1
#include "cpu/head.h"

namespace pyrl::cpu {
HeadKernels avx512_bf16_head() { return head_kernels<DType::kBF16, true>(); }
}  // namespace pyrl::cpu
