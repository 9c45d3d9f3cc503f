"""The first table of RESULTS.md: what was to be reached, what the newest rows say, and whether."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from table import markdown_cells

Row = Mapping[str, Any]
#: (what, target, measured, whether it is met)
Line = tuple[str, str, str, bool]
COLUMNS = ("what", "target", "measured", "met")
NO_GPU_FIGURE = "No GPU figure of this package has been measured yet."
#: SmolLM2's head, in which the CPU targets are stated.
HEAD = (576, 49152)
TIMES_LIMIT, MIB_OVER_GRADIENTS = 1.05, 64
KEPT = {0.5: 0.55, 0.2: 0.25}
STEP_SHARE = 1 / 3
PACK_SECONDS, PACK_ROWS = 1.0, 1.01


def markdown(by_name: Mapping[str, Sequence[Row]]) -> str:
    """The targets that the rows speak of; empty where they speak of none. `by_name` holds the rows
    of each result file."""
    lines = [
        *head_lines([r for r in by_name.get("linear_policy_loss", ()) if _cpu(r)]),
        *step_lines([r for r in by_name.get("trainer_step", ()) if r["status"] == "ok"]),
        *packing_lines([r for r in by_name.get("packing", ()) if r["status"] == "ok"]),
    ]
    if not lines:
        return ""
    cells = [[what, target, got, "yes" if met else "**no**"] for what, target, got, met in lines]
    said = ["## Targets", "", *markdown_cells(COLUMNS, cells), ""]
    if not by_name.get("gpu_check"):
        said += [NO_GPU_FIGURE, ""]
    said += ["Every figure of this table is in a table below, with its conditions.", ""]
    return "\n".join(said)


def _cpu(row: Row) -> bool:
    return row["status"] == "ok" and row["role"] == "pyrl" and row["backend"] == "cpu"


def head_lines(rows: Sequence[Row]) -> Iterator[Line]:
    """hidden -> loss on the CPU: times the limit, memory, and the share of kept rows."""
    times = {(*r["shape"], r["dtype"], r["kept_share"]): r for r in rows if r.get("ratio_to_limit")}
    for d, v in (HEAD, (896, 151936)):
        for n, dtype in sorted({(k[0], k[3]) for k in times if k[1:3] == (d, v)}):
            row = times.get((n, d, v, dtype, 1.0))
            if row is None:
                continue
            what = f"hidden → loss, CPU, N {n} D {d} V {v}, {dtype}"
            ratio, peak = row["ratio_to_limit"], row.get("peak_mib")
            target, got = f"≤ ×{TIMES_LIMIT} of the bare products", f"×{ratio:.3f}"
            met = ratio <= TIMES_LIMIT
            if peak is not None:
                over = peak - row["grads_mib"]
                target += f", ≤ gradients + {MIB_OVER_GRADIENTS} MiB"
                got += f", + {over:.0f} MiB"
                met &= over <= MIB_OVER_GRADIENTS
            yield what, target, got, met
    for n, d, v, dtype, kept in sorted(times):
        whole = times.get((n, d, v, dtype, 1.0))
        if kept in KEPT and whole is not None:
            share = times[n, d, v, dtype, kept]["ms_p50"] / whole["ms_p50"]
            yield (
                f"{kept:.0%} of the rows kept, N {n}, {dtype}", f"≤ {KEPT[kept]} of the whole time",
                f"{share:.3f}", share <= KEPT[kept],
            )  # fmt: skip


def step_lines(rows: Sequence[Row]) -> Iterator[Line]:
    """The trainer's step against the reference trainer's fastest and leanest of the same run, dtype
    by dtype; nothing where that run had none."""
    for ours, theirs in (("pyrl", ("trl", "trl-lean")), ("pyrl-bf16", ("trl-bf16",))):
        mine = next((r for r in rows if r["implementation"] == ours), None)
        rivals = [
            r for r in rows if mine and r["implementation"] in theirs and r["run"] == mine["run"]
        ]
        if mine is None or not rivals:
            continue
        fast = min(rivals, key=lambda r: r["seconds"])
        lean = min(rivals, key=lambda r: r["peak_mib"])
        share = mine["seconds"] / fast["seconds"]
        yield (
            f"training step, CPU, {mine['dtype']}, beside {fast['implementation']}",
            "≤ ⅓ of its seconds", f"{share:.2f}", share <= STEP_SHARE,
        )  # fmt: skip
        yield (
            f"memory of it, beside {lean['implementation']}", "less",
            f"{mine['peak_mib']:.0f} against {lean['peak_mib']:.0f} MiB",
            mine["peak_mib"] < lean["peak_mib"],
        )  # fmt: skip


def packing_lines(rows: Sequence[Row]) -> Iterator[Line]:
    """The slowest and the fullest plan of a million sequences."""
    million = [r for r in rows if r["shape"] == [1_000_000]]
    if million:
        ms = max(r["ms_p50"] for r in million)
        over = max(r["rows_over_bound"] for r in million)
        yield (
            "packing 1,000,000 sequences", f"< {PACK_SECONDS:.0f} s, ≤ {PACK_ROWS} × lower bound",
            f"{ms / 1e3:.2f} s, × {over:.4f}", ms < 1e3 * PACK_SECONDS and over <= PACK_ROWS,
        )  # fmt: skip
