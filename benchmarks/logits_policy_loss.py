"""Logits to policy loss and their gradient, beside a copy of the logits.

python benchmarks/run.py --only logits_policy_loss
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import write_rows
from logits_peers import LogitsCase
from suite import op_named, run_case

NAME = "logits_policy_loss"
#: SmolLM2's vocabulary; [N, V] is 192 MiB in fp32, beyond every cache.
FULL = tuple(
    {"tokens": 1024, "vocab": 49152, "dtype": dtype, "kept_share": kept}
    for dtype in ("float32", "bfloat16")
    for kept in (1.0, 0.5)
)
QUICK = ({"tokens": 256, "vocab": 4096, "dtype": "float32"},)


def run(
    out: Path,
    *,
    quick: bool = False,
    everything: bool = False,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of every case, written to `out`/logits_policy_loss.jsonl."""
    rows: list[dict[str, Any]] = []
    for fields in QUICK if quick else FULL:
        torch._dynamo.reset()
        case = LogitsCase(**fields)
        # At half the rows the same code runs: no second look at its memory.
        memory = not quick and case.kept_share == 1
        rows += run_case(
            op_named(NAME), case, rounds=rounds or (3 if quick else 5), names=names,
            memory=memory, slow=20, say=say,
        )  # fmt: skip
    write_rows(out / f"{NAME}.jsonl", rows, whole_cases=names is None)
    return rows
