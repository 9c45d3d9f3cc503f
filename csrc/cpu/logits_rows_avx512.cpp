// Compiled with -mavx512{f,bw,dq,vl}; runs only where logits_rows.cpp found them.
#define PYRL_WIDTH 16
#include "cpu/rows.h"

namespace pyrl::cpu {
RowKernels avx512_rows() { return {"avx512", rows_stats, rows_grad}; }
}  // namespace pyrl::cpu
