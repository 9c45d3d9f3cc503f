"""Hidden states to policy loss and back, beside the bare products, plain torch and other libraries.

    python benchmarks/run.py --only linear_policy_loss

SmolLM2's head (D 576, V 49152): every implementation at N 512 in bf16 but torch-lce, whose call
takes 10 to 14 s at any N and which stands beside N 2048; the strongest rivals and this package's
kernels at N 1024 and 2048 in both dtypes and to N 4096; the share of kept rows; one wide vocabulary
and three odd shapes. `--all` adds every implementation at N 2048, the rivals at large N, and the
kept shares at N 1024 and 4096. Quick: a shape that takes seconds; its figures mean nothing. What
needs a GPU is in gpu_parts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import Cell, run_cells
from peers import Case
from registry import select

NAME = "linear_policy_loss"
#: Slower than this times the limit: timed in every fifth round.
SLOW = 1.5
OURS = ("gemm", "pyrl-cpu")
RIVALS = ("gemm", "torch.compile", "cce-compile", "pyrl-cpu")
#: The lines of the plots against N.
CURVES = ("gemm", "naive", "torch.compile", "liger-batch", "trl", "pyrl-cpu")
#: All that run on a CPU but torch-lce.
MOST = tuple(
    row.name for row in select(NAME, device="cpu", dtype="bfloat16") if row.name != "torch-lce"
)
#: Of them, all but the limit, our own fallback, and what compiles to the code of another.
HELD = tuple(name for name in MOST if name not in ("gemm", "pyrl-torch", "cce-compile"))
#: Whose peak memory is measured where not everybody's is.
SOME = ("naive", "torch.compile", "pyrl-cpu")


def head(n: int, dtype: str, rounds: int, kept: float = 1.0, **options: Any) -> Cell:
    case = Case(tokens=n, hidden=576, vocab=49152, dtype=dtype, kept_share=kept)
    return Cell(case=case, rounds=rounds, slow=SLOW, **options)


def shaped(n: int, d: int, v: int, dtype: str = "bfloat16", **options: Any) -> Cell:
    case = Case(tokens=n, hidden=d, vocab=v, dtype=dtype)
    return Cell(case=case, slow=SLOW, **options)


DTYPES = ("float32", "bfloat16")
GRID: tuple[Cell, ...] = (
    head(512, "bfloat16", 5, names=MOST, memory=HELD, absent=True),
    head(1024, "bfloat16", 5, names=("gemm", "naive", "pyrl-cpu"), memory=("naive", "pyrl-cpu"),
         check=False),
    head(1024, "float32", 4, names=("gemm", "naive", "torch.compile", "pyrl-cpu"),
         memory=("torch.compile", "pyrl-cpu")),
    head(2048, "bfloat16", 4, names=("gemm", "naive", "torch.compile", "torch-lce", "pyrl-cpu"),
         memory=SOME),
    head(2048, "float32", 3, names=OURS, memory=("pyrl-cpu",), check=False),
    *(head(2048, dtype, 4, kept, names=OURS) for dtype in DTYPES for kept in (0.5, 0.2)),
    head(4096, "bfloat16", 3, names=OURS, memory=("pyrl-cpu",), check=False),
    shaped(512, 896, 151936, rounds=3, names=OURS),
    shaped(256, 896, 151936, "float32", rounds=3, names=OURS),
    # The grid's odd shapes with D and V an eighth of theirs: rows that fill no tile.
    shaped(1937, 448, 19008, rounds=5, names=OURS),
    shaped(1388, 512, 12800, rounds=5, names=OURS),
    shaped(8191, 256, 4000, rounds=5, names=OURS),
    *(head(2048, dtype, 5, memory=True, extra=True) for dtype in DTYPES),
    *(
        head(n, dtype, 4, kept, names=OURS, check=n < 4096, extra=True)
        for n in (1024, 4096)
        for dtype in DTYPES
        for kept in (0.5, 0.2)
    ),
    *(head(1024, dtype, 5, names=MOST, memory=HELD, extra=True) for dtype in DTYPES),
    head(4096, "bfloat16", 3, names=CURVES, memory=CURVES, check=False, extra=True),
    head(8192, "bfloat16", 2, names=CURVES, memory=CURVES, check=False, extra=True),
    head(4096, "float32", 2, names=OURS, check=False, extra=True),
    *(shaped(512, 896, 151936, dtype, rounds=3, names=RIVALS, extra=True) for dtype in DTYPES),
)  # fmt: skip
QUICK: tuple[Cell, ...] = tuple(shaped(256, 64, 4096, dtype, rounds=3) for dtype in DTYPES)


def run(
    out: Path,
    *,
    quick: bool = False,
    everything: bool = False,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of every cell, written to `out`/linear_policy_loss.jsonl as each one ends."""
    return run_cells(
        NAME, QUICK if quick else GRID, out, everything=everything, memory=not quick,
        rounds=rounds, names=names, say=say,
    )  # fmt: skip
