"""The ops on [T] vectors (policy objective, group advantage) beside a copy of their inputs.

python benchmarks/run.py --only small_ops
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import write_rows
from small_peers import SmallCase
from suite import op_named, run_case

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
    """Rows of both ops, written to `out`/small_ops.jsonl."""
    rows: list[dict[str, Any]] = []
    for op in OPS:
        torch._dynamo.reset()
        case = SmallCase(op=op, tokens=QUICK_TOKENS if quick else FULL_TOKENS, device=device)
        rows += run_case(
            op_named(op),
            case,
            rounds=rounds or (3 if quick else 5),
            names=names,
            memory=HELD if not quick and device == "cpu" else False,
            slow=SLOW,
            say=say,
        )
    write_rows(out / f"{NAME}.jsonl", rows, whole_cases=names is None)
    return rows
