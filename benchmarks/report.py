"""RESULTS.md and the plots, made from the result files alone (no timing)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import memory
import packing
import shared_prefix
import table
import trainer_step
from harness import HERE, read_rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HEAD = """# Benchmark results

Made by `python benchmarks/run.py` from `benchmarks/results/*.jsonl`; do not edit. Times are medians
over rounds in which every variant runs once on freshly drawn inputs, in shuffled order; × limit is
the median over rounds of the ratio to the limit timed in the same round. Peak memory is the growth
above the inputs in a fresh process, second call, gradients included. The error is the larger of
the two gradients' relative norm of difference to float64; `!` marks what breaks the loss contract's
rule (the naive form's own error + 5e-6 in fp32, + 1e-3 in bf16). `load` is the machine's load
average when a run began: well above 0 means that other work shared the cores.
"""
LIMITS = {
    "linear_policy_loss": "The limit: the three matrix products of forward and backward (6NDV over "
    "the kept rows), outputs preallocated.",
    "policy_objective": "The limit: one copy of the inputs.",
    "group_advantage": "The limit: one copy of the inputs.",
}
COLOURS = {"limit": "#9a9a9a", "peer": "#6b8fb5", "pyrl": "#d1603d"}


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
        parts.append(table.markdown(losses))
        picture = plot_losses(losses, folder / "linear_policy_loss.png")
        if picture is not None:
            written.append(picture)
            parts.append(f"![time and memory]({picture.relative_to(target.parent)})\n")
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
    for name, rows in by_name.items():
        parts += [f"## {name}", "", table.markdown(rows)]
    target.write_text("\n".join(parts))
    return [target, *written]


def plot_losses(rows: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Bars per implementation: time over the limit, and peak memory over the gradients' own size,
    one row of axes per dtype, all rows kept."""
    timed = [
        r for r in rows
        if r["status"] == "ok" and r.get("ratio_to_limit") and r["kept_share"] == 1
        and r["role"] != "limit"
    ]  # fmt: skip
    dtypes = sorted({r["dtype"] for r in timed}, reverse=True)
    if not dtypes:
        return None
    figure, axes = plt.subplots(len(dtypes), 2, figsize=(9, 2.6 * len(dtypes)), squeeze=False)
    for (left, right), dtype in zip(axes, dtypes, strict=True):
        members = [r for r in timed if r["dtype"] == dtype][::-1]
        names = [r["implementation"] for r in members]
        colours = [COLOURS[r["role"]] for r in members]
        bars = left.barh(names, [r["ratio_to_limit"] for r in members], color=colours)
        left.bar_label(bars, fmt="×%.2f", padding=3, fontsize=8)
        left.axvline(1, color=COLOURS["limit"], linestyle="--", linewidth=1)
        left.set_title(f"{dtype}: time / bare matrix products", fontsize=9)
        peaks = [r.get("peak_mib") or 0.0 for r in members]
        bars = right.barh(names, peaks, color=colours)
        right.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        grads = max((r.get("grads_mib") or 0.0 for r in members), default=0.0)
        right.axvline(grads, color=COLOURS["limit"], linestyle="--", linewidth=1)
        right.set_title(f"{dtype}: peak MiB above inputs (dashed: the gradients)", fontsize=9)
        for axis in (left, right):
            axis.tick_params(labelsize=8)
            axis.margins(x=0.18)
            axis.spines[["top", "right"]].set_visible(False)
    first = timed[0]
    figure.suptitle(
        f"linear_policy_loss, {table.shape_text(first)}, {first['device']}", fontsize=10
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
