"""Logits to policy loss and their gradient, beside a copy of the logits.

python benchmarks/run.py --only logits_policy_loss
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import Cell, run_cells
from logits_peers import LogitsCase

NAME = "logits_policy_loss"
#: Slower than this times a copy: timed in every fifth round.
SLOW = 20
#: Whose peak memory is measured: in bf16, and in fp32.
HELD = ("naive", "torch.compile", "trl", "pyrl-cpu", "pyrl-cpu-inplace")
SOME = ("naive", "pyrl-cpu", "pyrl-cpu-inplace")


def cell(dtype: str, kept: float = 1.0, **options: Any) -> Cell:
    """SmolLM2's vocabulary; [N, V] is 96 MiB in bf16, beyond every cache."""
    case = LogitsCase(tokens=1024, vocab=49152, dtype=dtype, kept_share=kept)
    return Cell(case=case, rounds=5, slow=SLOW, **options)


DTYPES = ("float32", "bfloat16")
GRID: tuple[Cell, ...] = (
    cell("float32", memory=SOME),
    cell("bfloat16", memory=HELD),
    # At half the rows the same code runs: no second look at its memory.
    *(cell(dtype, 0.5, extra=True) for dtype in DTYPES),
)
QUICK = (Cell(case=LogitsCase(tokens=256, vocab=4096, dtype="float32"), rounds=3),)


def run(
    out: Path,
    *,
    quick: bool = False,
    everything: bool = False,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of every cell, written to `out`/logits_policy_loss.jsonl as each one ends."""
    return run_cells(
        NAME, QUICK if quick else GRID, out, everything=everything, rounds=rounds, names=names,
        say=say,
    )  # fmt: skip
