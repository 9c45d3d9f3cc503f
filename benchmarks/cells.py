"""What a benchmark of an op is made of: cases, each with who is timed and whose memory is measured.

A cell that is `extra` runs only with --all; the others are chosen so that `make bench` stays under
20 minutes on two cores. Rows are written as each cell ends: an interrupted run keeps them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import known_or_raise, write_rows
from registry import known_names
from suite import op_named, run_case


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A case with who is timed (None: all), for how many rounds, and whose memory is measured."""

    case: Any
    rounds: int
    op: str = ""
    """Default: the name of the benchmark."""
    names: tuple[str, ...] | None = None
    memory: bool | tuple[str, ...] = False
    check: bool = True
    """Against float64, which costs several calls; a large N repeats what a smaller one showed."""
    absent: bool = False
    """With `names`: those that need another device are rows that say so, as without names."""
    slow: float = math.inf
    """Slower than this times the limit: timed in every fifth round."""
    extra: bool = False


def run_cells(
    benchmark: str,
    cells: Sequence[Cell],
    out: Path,
    *,
    everything: bool = False,
    memory: bool = True,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of every cell, written to `out`/`benchmark`.jsonl as each one ends. `names` narrows each
    cell to those of its rows; ValueError where the registry has no such row."""
    ops = {cell.op or benchmark for cell in cells}
    known_or_raise(benchmark, names, (name for op in ops for name in known_names(op)))
    rows: list[dict[str, Any]] = []
    for cell in cells:
        if cell.extra and not everything:
            continue
        op, wanted = cell.op or benchmark, cell.names
        if names is not None:
            among = cell.names or known_names(op)
            wanted = tuple(name for name in names if name in among)
            if not wanted:
                continue
        # Compiled code is kept per shape; without this a second case meets the recompile limit.
        torch._dynamo.reset()
        found = run_case(
            op_named(op), cell.case, rounds=rounds or cell.rounds, names=wanted,
            memory=cell.memory if memory else False, check=cell.check, slow=cell.slow,
            absent=cell.absent and names is None, say=say,
        )  # fmt: skip
        write_rows(out / f"{benchmark}.jsonl", found, whole_cases=names is None)
        rows += found
    return rows
