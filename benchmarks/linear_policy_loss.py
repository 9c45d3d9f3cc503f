"""Hidden states to policy loss and back, beside the bare products, plain torch and other libraries.

    python benchmarks/run.py --only linear_policy_loss

Full: N 2048, D 576, V 49152 (SmolLM2's head) in fp32 and bf16, with every row kept and with half of
them. Quick: a shape small enough to finish in seconds; its figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import write_rows
from peers import Case
from suite import op_named, run_case

NAME = "linear_policy_loss"
#: (case fields, rounds): the half-kept case has fewer rounds, being a second look at the same code.
FULL: tuple[tuple[dict[str, Any], int], ...] = tuple(
    ({"tokens": 2048, "hidden": 576, "vocab": 49152, "dtype": dtype, "kept_share": kept}, rounds)
    for kept, rounds in ((1.0, 7), (0.5, 3))
    for dtype in ("float32", "bfloat16")
)
QUICK: tuple[tuple[dict[str, Any], int], ...] = tuple(
    ({"tokens": 256, "hidden": 64, "vocab": 4096, "dtype": dtype}, 3)
    for dtype in ("float32", "bfloat16")
)


def run(
    out: Path,
    *,
    quick: bool = False,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of every case, written to `out`/linear_policy_loss.jsonl as each case ends."""
    rows: list[dict[str, Any]] = []
    for fields, default_rounds in QUICK if quick else FULL:
        # Compiled code is kept per shape; without this a second case meets the recompile limit.
        torch._dynamo.reset()
        found = run_case(
            op_named(NAME),
            Case(**fields),
            rounds=rounds or default_rounds,
            names=names,
            memory=not quick,
            say=say,
        )
        write_rows(out / f"{NAME}.jsonl", found)
        rows += found
    return rows
