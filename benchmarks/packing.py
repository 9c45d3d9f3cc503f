"""Packing sequences into rows of a token budget: seconds, and rows against the lower bound.

    python benchmarks/run.py --only packing

The bound is ceil(sum of lengths / capacity). Lengths follow two shapes: the skewed one of sampled
completions (log-normal, median 300, up to the capacity) and short answers (uniform, 16 to 160).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Timing, conditions, version_of, write_rows

NAME = "packing"
CAPACITY = 4096


def lengths(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [n], each in 1..CAPACITY."""
    if kind == "uniform 16-160":
        return rng.integers(16, 161, n)
    return np.clip(rng.lognormal(math.log(300), 0.9, n), 1, CAPACITY).astype(np.int64)


def planners() -> dict[str, Callable[[np.ndarray, int], np.ndarray]]:
    """Name -> plan(lengths, capacity) -> bin index of each; empty where the package is absent."""
    found: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {}
    try:
        from pyrl import _host

        found["pyrl-native"] = _host.best_fit
    except ImportError:
        pass
    return found


def run(
    out: Path,
    *,
    quick: bool = False,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of every planner and length distribution, written to `out`/packing.jsonl."""
    n = 10_000 if quick else 1_000_000
    where = conditions("cpu")
    rows = []
    table: dict[str, Callable[..., np.ndarray] | None] = {"pyrl-native": None, **planners()}
    for kind in ("uniform 16-160", "log-normal 300"):
        for name, plan in table.items():
            if names and name not in names:
                continue
            row: dict[str, Any] = {
                "op": NAME, "implementation": name, "package": "pyrl",
                "version": version_of("pyrl"), "dtype": "int64", "shape": [n], "kept_share": 1.0,
                "settings": f"{kind}, capacity {CAPACITY}", **where,
            }  # fmt: skip
            rows.append(row)
            if plan is None:
                row.update(
                    status="absent", reason="the compiled host module pyrl._host is not built"
                )
                continue
            say(f"packing: {name}, {n} lengths, {kind}")
            samples, excess = [], []
            for i in range(rounds or 3):
                drawn = lengths(kind, n, np.random.default_rng(i))
                began = time.perf_counter()
                bins = np.asarray(plan(drawn, CAPACITY))
                samples.append((time.perf_counter() - began) * 1e3)
                check(drawn, bins)
                excess.append((int(bins.max()) + 1) / math.ceil(drawn.sum() / CAPACITY))
            timing = Timing.of(samples)
            row.update(
                status="ok", rounds=timing.rounds, ms_p20=round(timing.p20, 2),
                ms_p50=round(timing.p50, 2), ms_p80=round(timing.p80, 2),
                rows_over_bound=round(float(np.median(excess)), 5),
            )  # fmt: skip
    write_rows(out / f"{NAME}.jsonl", rows)
    return rows


def check(drawn: np.ndarray, bins: np.ndarray) -> None:
    """Every sequence is in a bin and no bin overflows."""
    if bins.shape != drawn.shape or bins.min() < 0:
        raise AssertionError(f"a plan of shape {bins.shape} for {drawn.shape} lengths")
    filled = np.bincount(bins, weights=drawn)
    if filled.max() > CAPACITY:
        raise AssertionError(f"bin {filled.argmax()} holds {filled.max():.0f} > {CAPACITY} tokens")


COLUMNS = ("planner", "lengths", "sequences", "ms (p20–p80)", "rows / lower bound")


def cells(row: dict[str, Any]) -> list[str]:
    head = [row["implementation"], row["settings"], f"{row['shape'][0]:,}"]
    if row["status"] != "ok":
        return [*head, f"{row['status']}: {row['reason']}", ""]
    spread = f"{row['ms_p50']:.0f} ({row['ms_p20']:.0f}–{row['ms_p80']:.0f})"
    return [*head, spread, f"{row['rows_over_bound']:.4f}"]


def show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from table import terminal

    table = Table(title="packing", title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows:
        table.add_row(*cells(row))
    terminal().print(table)


def markdown(rows: list[dict[str, Any]]) -> str:
    from table import conditions_text

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", conditions_text(rows), ""])
