"""The ops on [T] vectors (policy objective, group advantage) beside a copy of their inputs.

python benchmarks/run.py --only small_ops
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import Cell, run_cells
from small_peers import SmallCase

NAME = "small_ops"
OPS = ("policy_objective", "group_advantage")
#: Larger than the 32 MiB last-level cache of the usual test machine: 2^22 tokens hold 52 MiB.
FULL_TOKENS = 2**22
QUICK_TOKENS = 2**14
#: Slower than this times a copy (autograd in float64): timed in every fifth round.
SLOW = 100
#: Whose peak memory is measured, each in a process of its own.
HELD = ("naive", "pyrl-cpu")


def run(
    out: Path,
    *,
    quick: bool = False,
    everything: bool = False,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], None] = print,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Rows of both ops, written to `out`/small_ops.jsonl as each one ends."""
    tokens = QUICK_TOKENS if quick else FULL_TOKENS
    cells = [
        Cell(
            op=op, case=SmallCase(op=op, tokens=tokens, device=device), rounds=3 if quick else 5,
            memory=HELD if device == "cpu" else False, slow=SLOW,
        )
        for op in OPS
    ]  # fmt: skip
    return run_cells(NAME, cells, out, memory=not quick, rounds=rounds, names=names, say=say)
