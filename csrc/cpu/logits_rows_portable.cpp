// Vectors of four floats: SSE2 on x86-64, NEON on Arm, no special flags.
#define PYRL_WIDTH 4
#include "cpu/rows.h"

namespace pyrl::cpu {
RowKernels portable_rows() { return {"portable", rows_stats, rows_grad}; }
}  // namespace pyrl::cpu
