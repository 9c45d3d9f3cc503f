// Compiled with -mavx2 -mfma -mf16c; runs only where logits_rows.cpp found them.
#define PYRL_WIDTH 8
#include "cpu/rows.h"

namespace pyrl::cpu {
RowKernels avx2_rows() { return {"avx2", rows_stats, rows_grad}; }
}  // namespace pyrl::cpu
