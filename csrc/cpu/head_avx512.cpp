// Compiled with -mavx512{f,bw,dq,vl} -mprfchw; runs only where logits_rows.cpp found them.
#define PYRL_WIDTH 16
#include "cpu/head.h"

namespace pyrl::cpu {
HeadKernels avx512_head() { return head_kernels<DType::kF32, false>(); }
}  // namespace pyrl::cpu
