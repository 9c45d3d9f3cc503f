"""RESULTS.md and the plots, made from the result files alone (no timing)."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import memory
import packing
import plots
import shared_prefix
import static_table
import table
import trainer_step
from harness import HERE, read_rows

HEAD = """# Benchmark results

Made by `make bench` (`benchmarks/run.py`) from `benchmarks/results/*.jsonl`; do not edit. Times are
medians over rounds in which every variant runs once on freshly drawn inputs, in shuffled order; ×
limit is the median over rounds of the ratio to the limit timed in the same round. A variant slower
than 2.5 times the limit is timed in every fifth round only. Peak memory is the growth above the
inputs in a fresh process, second call, gradients included. The error is the larger of the two
gradients' relative norm of difference to float64; `!` marks what breaks the loss contract's rule
(the naive form's own error + 5e-6 in fp32, + 1e-3 in bf16). `load` is the machine's load average
when a run began: well above 0 means that other work shared the cores.
"""
NAME = "linear_policy_loss"
LIMITS = {
    "linear_policy_loss": "The limit: the three matrix products of forward and backward (6NDV over "
    "the kept rows), outputs preallocated.",
    "logits_policy_loss": "The limit: a copy of the logits, which moves what must be moved: the "
    "kept rows read, the gradient written.",
    "policy_objective": "The limit: one copy of the inputs.",
    "group_advantage": "The limit: one copy of the inputs.",
}


def write(folder: Path, target: Path | None = None) -> list[Path]:
    """Write RESULTS.md (beside this file, or `target`) and the plots in `folder`; their paths."""
    by_name = {path.stem: read_rows(path) for path in sorted(folder.glob("*.jsonl"))}
    target = target or (
        HERE / "RESULTS.md" if folder == HERE / "results" else folder / "RESULTS.md"
    )
    parts, written = [HEAD], []
    losses = by_name.pop("linear_policy_loss", [])
    if losses:
        parts += [
            "## Hidden states to policy loss, forward + backward",
            "",
            LIMITS["linear_policy_loss"],
            "",
        ]
        for draw, name, text in (
            (plots.bars, NAME, "time and memory"),
            (plots.curves, f"{NAME}_by_tokens", "time and memory against N"),
            (plots.shares, f"{NAME}_share", "share of the limit"),
        ):
            picture = draw(losses, folder / f"{name}.png")
            if picture is not None:
                written.append(picture)
                parts.append(f"![{text}]({picture.relative_to(target.parent)})\n")
        parts += [table.grid_markdown(losses), table.kept_markdown(losses)]
        parts += ["### Every figure", "", table.markdown(losses)]
    logits = by_name.pop("logits_policy_loss", [])
    if logits:
        parts += ["## Logits to policy loss, forward + backward", "", LIMITS["logits_policy_loss"],
                  "", table.markdown(logits)]  # fmt: skip
    static = by_name.pop("static", [])
    if static:
        parts += ["## Static (no GPU)", ""]
        if not by_name.get("gpu_check"):
            parts += ["No GPU figure of this package has been measured yet.", ""]
        parts.append(static_table.markdown(static))
    by_name.pop("gpu_check_parts", None)
    steps = by_name.pop("trainer_step", [])
    if steps:
        parts += ["## A whole training step", "", trainer_step.markdown(steps)]
    lean = by_name.pop("memory", [])
    if lean:
        parts += ["## Training in less memory", "", memory.markdown(lean)]
    small = by_name.pop("small_ops", [])
    if small:
        parts += [
            "## Ops on [T] vectors",
            "",
            LIMITS["policy_objective"],
            "",
            table.markdown(small),
        ]
    packed = by_name.pop("packing", [])
    if packed:
        parts += ["## Packing", "", packing.markdown(packed)]
        picture = HERE.parent / "docs" / "images" / "packing.png"
        if target.parent == HERE:
            parts.append(f"![a batch, plain and shared](../{picture.relative_to(HERE.parent)})\n")
    shared = by_name.pop("shared_prefix", [])
    if shared:
        parts += ["## A policy update with shared prefixes", "", shared_prefix.markdown(shared)]
    scoring = by_name.pop("scoring_overlap", [])
    if scoring:
        parts += ["## What scoring adds to a training step", "", scoring_markdown(scoring)]
    for name, rows in by_name.items():
        parts += [f"## {name}", "", table.markdown(rows)]
    target.write_text("\n".join(parts))
    return [target, *written]


def scoring_markdown(rows: list[dict[str, Any]]) -> str:
    """A line an arm of the newest run of scoring_overlap.py, which is no part of run.py."""
    last = rows[-1]
    lines = [
        [
            arm,
            f"{statistics.median(step['seconds'] for step in steps):.2f}",
            f"{statistics.median(step['score'] for step in steps):.3f}",
            f"{last['added'][arm]:+.1%}",
        ]
        for arm, steps in last["rows"].items()
    ]
    columns = ("scoring", "s a step", "of which waiting for scores", "added to the same step")
    conditions = (
        f"{last['machine']}, torch {last['versions']['torch']}, commit {last['commit'][:7]}, "
        f"{last['steps']} steps (benchmarks/scoring_overlap.py)"
    )
    return "\n".join([*table.markdown_cells(columns, lines), "", conditions, ""])
