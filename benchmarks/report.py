"""RESULTS.md and the plots, made from the result files alone (no timing)."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import headline
import memory
import packing
import plots
import shared_prefix
import static_table
import table
import trainer_step
from harness import HERE, read_rows

Row = dict[str, Any]
HEAD = """# Benchmark results

Made by `make bench` (`benchmarks/run.py`) from `benchmarks/results/*.jsonl`; do not edit.
"""
HOW = """## How the figures are taken

Times are medians over rounds in which every variant runs once on freshly drawn inputs, in shuffled
order; × limit is the median over rounds of the ratio to the limit timed in the same round. A limit
is what torch's own products or copy take here: a kernel with better products can be below 1. A
peer slower than 1.5 times the head's limit (20 and 100 times the copies) is timed in every fifth
round only, `once` where that is one. Peak memory is the growth above the inputs in a fresh
process, second call, gradients included. The error is the larger of the two gradients' relative
norm of difference to float64 (– where a smaller N of the same code was compared); `!` marks what
breaks the loss contract's rule (the naive form's own error + 5e-6 in fp32, + 1e-3 in bf16), where
the naive form ran in the same case. `other work` counts the cores that other processes kept busy
during the timing; where it was not counted, `load` is the load average before the run, which the
run's own earlier cases raise. A `+` after a commit: with changes not committed.
"""
NAME = "linear_policy_loss"
#: The files with a section of their own, in their order.
ORDER = (
    NAME, "logits_policy_loss", "trainer_step", "memory", "small_ops", "packing", "shared_prefix",
    "scoring_overlap", "static", "gpu_check_parts",
)  # fmt: skip
LIMITS = {
    "linear_policy_loss": "The limit: the three matrix products of forward and backward (6NDV over "
    "the kept rows), outputs preallocated.",
    "logits_policy_loss": "The limit: a copy of the logits, which moves what must be moved: the "
    "kept rows read, the gradient written.",
    "policy_objective": "The limit: one copy of the inputs.",
    "group_advantage": "The limit: one copy of the inputs.",
}


def write(folder: Path, target: Path | None = None) -> list[Path]:
    """Write RESULTS.md (beside this file, or `target`) and the plots in `folder`; their paths.
    ValueError where there is nothing to report."""
    by_name = {path.stem: read_rows(path) for path in sorted(folder.glob("*.jsonl"))}
    if not by_name:
        raise ValueError(f"{folder}: no *.jsonl to report on")
    target = target or (
        HERE / "RESULTS.md" if folder == HERE / "results" else folder / "RESULTS.md"
    )
    written: list[Path] = []

    def head(rows: list[Row]) -> str:
        return head_markdown(rows, folder, target, written)

    targets = section("Targets", None, lambda: headline.markdown(by_name))
    parts = [HEAD, *([targets] if targets else []), HOW]
    for name, (title, text) in {
        "linear_policy_loss": ("Hidden states to policy loss, forward + backward", head),
        "logits_policy_loss": ("Logits to policy loss, forward + backward", limited),
        "trainer_step": ("A whole training step", trainer_step.markdown),
        "memory": ("Training in less memory", memory.markdown),
        "small_ops": ("Ops on [T] vectors", limited),
        "packing": ("Packing", lambda rows: packing_markdown(rows, target)),
        "shared_prefix": ("A policy update with shared prefixes", shared_prefix.markdown),
        "scoring_overlap": ("What scoring adds to a training step", scoring_markdown),
        "static": (
            "Static (no GPU)",
            lambda rows: "\n".join([*no_gpu_figure(by_name), static_table.markdown(rows)]),
        ),
        "gpu_check_parts": ("", None),
        **{name: (name, table.markdown) for name in by_name if name not in ORDER},
    }.items():
        rows = by_name.get(name)
        if rows and text is not None:
            body = section(title, name, lambda rows=rows, text=text: text(rows))
            parts += [f"## {title}", "", body]
    target.write_text("\n".join(parts))
    return [target, *written]


def no_gpu_figure(by_name: Mapping[str, list[Row]]) -> list[str]:
    return [] if by_name.get("gpu_check") else [headline.NO_GPU_FIGURE, ""]


def section(title: str, name: str | None, text: Callable[[], str]) -> str:
    """text(), or which field a row lacks: of an older version, or edited by hand."""
    try:
        return text()
    except KeyError as error:
        where = f"results/{name}.jsonl has a row" if name else "a result file has a row"
        remedy = f"`pyrl bench --only {name}` writes it anew" if name in ORDER else "made anew"
        return f"Not shown: {where} without {error} ({title}; {remedy}).\n"


def limited(rows: list[Row]) -> str:
    """The tables of an op, its limit first."""
    limits = dict.fromkeys(LIMITS[row["op"]] for row in rows)
    return "\n".join([*limits, "", table.markdown(rows)])


def head_markdown(rows: list[Row], folder: Path, target: Path, written: list[Path]) -> str:
    parts = [LIMITS[NAME], "", table.grid_markdown(rows), table.kept_markdown(rows)]
    for draw, name, text in (
        (plots.bars, NAME, "time and memory"),
        (plots.curves, f"{NAME}_by_tokens", "time and memory against N"),
        (plots.shares, f"{NAME}_share", "share of the limit"),
    ):
        picture = draw(rows, folder / f"{name}.png")
        if picture is not None:
            written.append(picture)
            parts.append(f"![{text}]({os.path.relpath(picture, target.parent)})\n")
    return "\n".join([*parts, "### Every figure", "", table.markdown(rows)])


def packing_markdown(rows: list[Row], target: Path) -> str:
    text = packing.markdown(rows)
    if target.parent == HERE:
        text += "\n![a batch, plain and shared](../docs/images/packing.png)\n"
    return text


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
