"""Hidden states to policy loss and back, beside the bare products, plain torch and other libraries.

    python benchmarks/run.py --only linear_policy_loss

SmolLM2's head (D 576, V 49152): every implementation at N 1024 in bf16, all but the two slowest in
fp32; the best rivals and this package's kernels over N (512 to 8192) and over the share of kept
rows; one wide vocabulary and three odd shapes. `--all` adds every implementation at N 2048, the
kept shares at N 1024 and 4096, and the rivals at large N. Quick: a shape that takes seconds; its
figures mean nothing. What needs a GPU is in gpu_parts.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import write_rows
from peers import Case
from registry import select
from suite import op_named, run_case

NAME = "linear_policy_loss"
#: Slower than this times the limit: timed in every fifth round.
SLOW = 2.5
OURS = ("gemm", "pyrl-cpu")
RIVALS = ("gemm", "torch.compile", "cce-compile", "pyrl-cpu")
#: The lines of the plots against N.
CURVES = ("gemm", "naive", "torch.compile", "liger-batch", "trl", "pyrl-cpu")
#: All that run on a CPU but the two slowest: a call of torch-lce takes 20 times the limit's.
NOT_SLOWEST = tuple(
    row.name
    for row in select(NAME, device="cpu", dtype="float32")
    if row.name not in ("torch-lce", "liger")
)
MEASURED = tuple(name for name in (*NOT_SLOWEST, "liger") if name != "gemm")
#: Whose peak memory is measured where not everybody's is.
HELD = ("naive", "torch.compile", "liger-batch", "trl", "pyrl-cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A case of the grid with who is timed, for how many rounds, and whose memory is measured."""

    case: Case
    rounds: int
    names: tuple[str, ...] | None = None
    memory: bool | tuple[str, ...] = False
    check: bool = True
    """Against float64, which costs several calls; a large N repeats what a smaller one showed."""
    extra: bool = False
    """Only with --all."""


def head(n: int, dtype: str, rounds: int, kept: float = 1.0, **options: Any) -> Cell:
    case = Case(tokens=n, hidden=576, vocab=49152, dtype=dtype, kept_share=kept)
    return Cell(case=case, rounds=rounds, **options)


def shaped(n: int, d: int, v: int, dtype: str = "bfloat16", **options: Any) -> Cell:
    return Cell(case=Case(tokens=n, hidden=d, vocab=v, dtype=dtype), **options)


DTYPES = ("float32", "bfloat16")
GRID: tuple[Cell, ...] = (
    head(1024, "bfloat16", 5, memory=MEASURED),
    head(1024, "float32", 3, names=NOT_SLOWEST, memory=("naive", "torch.compile", "pyrl-cpu")),
    head(2048, "bfloat16", 4, names=CURVES, memory=HELD),
    head(2048, "float32", 3, names=("gemm", "torch.compile", "pyrl-cpu"), memory=("pyrl-cpu",)),
    *(head(2048, dtype, 4, kept, names=OURS) for dtype in DTYPES for kept in (0.5, 0.2)),
    head(512, "bfloat16", 4, names=("gemm", "naive", "torch.compile", "pyrl-cpu"), memory=HELD),
    head(4096, "bfloat16", 3, names=OURS, memory=("pyrl-cpu",), check=False),
    head(4096, "float32", 2, names=OURS, check=False),
    head(8192, "bfloat16", 2, names=OURS, memory=("pyrl-cpu",), check=False),
    shaped(512, 896, 151936, rounds=3, names=("gemm", "torch.compile", "pyrl-cpu")),
    # The grid's odd shapes with D and V an eighth of theirs: rows that fill no tile.
    shaped(1937, 448, 19008, rounds=3, names=OURS),
    shaped(1388, 512, 12800, rounds=3, names=OURS),
    shaped(8191, 256, 4000, rounds=3, names=OURS),
    *(head(2048, dtype, 5, memory=True, extra=True) for dtype in DTYPES),
    *(
        head(n, dtype, 4, kept, names=OURS, check=n < 4096, extra=True)
        for n in (1024, 4096)
        for dtype in DTYPES
        for kept in (0.5, 0.2)
    ),
    head(512, "bfloat16", 4, names=CURVES, memory=HELD, extra=True),
    head(4096, "bfloat16", 3, names=CURVES, memory=HELD, check=False, extra=True),
    head(8192, "bfloat16", 2, names=CURVES, memory=HELD, check=False, extra=True),
    shaped(512, 896, 151936, "float32", rounds=3, names=RIVALS, extra=True),
)
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
    """Rows of every case, written to `out`/linear_policy_loss.jsonl as each case ends."""
    rows: list[dict[str, Any]] = []
    for cell in QUICK if quick else GRID:
        if cell.extra and not everything:
            continue
        wanted = cell.names
        if names is not None:
            wanted = tuple(n for n in names if cell.names is None or n in cell.names)
            if not wanted:
                continue
        # Compiled code is kept per shape; without this a second case meets the recompile limit.
        torch._dynamo.reset()
        found = run_case(
            op_named(NAME),
            cell.case,
            rounds=rounds or cell.rounds,
            names=wanted,
            memory=cell.memory and not quick,
            check=cell.check,
            slow=SLOW,
            say=say,
        )
        write_rows(out / f"{NAME}.jsonl", found, whole_cases=names is None)
        rows += found
    return rows
