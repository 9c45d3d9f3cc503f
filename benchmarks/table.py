"""Result rows as a rich table on the terminal and as markdown."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

try:  # a GPU image may not have it: figures are worth more than their frame
    from rich.console import Console
    from rich.table import Table
except ImportError:
    Console = Table = None  # type: ignore[assignment, misc]

Row = Mapping[str, Any]


class Plain:
    """Prints text without markup, where rich is not installed."""

    def print(self, text: object, **_: Any) -> None:
        print(str(text).removeprefix("[dim]"), flush=True)


def terminal() -> Any:
    """The console; wide enough for the tables where output goes to a file or a log."""
    if Console is None:
        return Plain()
    return Console() if sys.stdout.isatty() else Console(width=132)


def print_cells(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int
) -> None:
    """Cells as a table on the terminal; all but the first `left` columns are flush right."""
    if Table is None:
        print("\n".join([title, *markdown_cells(columns, rows)]), flush=True)
        return
    table = Table(title=title, title_justify="left")
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at < left else "right")
    for cells in rows:
        table.add_row(*cells)
    terminal().print(table)


def markdown_cells(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *map(line, rows)]


def number(value: Any, digits: int = 3) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if value != 0 and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.{digits}g}" if abs(value) < 100 else f"{value:.0f}"


def shape_text(row: Row) -> str:
    names = {1: ("T",), 2: ("n", "V"), 3: ("N", "D", "V")}[len(row["shape"])]
    return " ".join(f"{n} {s}" for n, s in zip(names, row["shape"], strict=True))


def title_of(row: Row) -> str:
    kept = f", {row['kept_share']:.0%} of rows kept" if row["kept_share"] != 1 else ""
    return f"{row['op']}, {shape_text(row)}, {row['dtype']}{kept}"


def worst_error(row: Row) -> str:
    errors = row.get("errors")
    if not errors:
        return "–"
    grads = {k: v for k, v in errors.items() if k != "loss"} or errors
    return f"{max(grads.values()):.1e}" + (" !" if row.get("within_rule") is False else "")


COLUMNS = ("implementation", "version", "ms (p20–p80)", "× limit", "rate", "peak MiB", "error")


def cells(row: Row) -> list[str]:
    name, version = row["implementation"], row.get("version") or "–"
    if row["status"] != "ok" or row.get("ms_p50") is None:
        return [
            name,
            version,
            f"{row['status']}: {row.get('reason', '')}",
            "",
            "",
            "",
            worst_error(row),
        ]
    rate = (
        f"{row['gflops'] / 1e3:.0f} TFLOP/s"
        if row.get("gflops", 0) >= 1e4
        else f"{row['gflops']:.0f} GFLOP/s"
        if "gflops" in row
        else f"{row['gbytes_per_second']:.1f} GB/s"
        if "gbytes_per_second" in row
        else "–"
    )
    spread = f"{number(row['ms_p20'])}–{number(row['ms_p80'])}"
    if row.get("rounds") == 1:
        spread = "once"
    spread = f"{number(row['ms_p50'])} ({spread})"
    peak = "–" if row.get("peak_mib") is None else f"{row['peak_mib']:.0f}"
    return [name, version, spread, number(row.get("ratio_to_limit")), rate, peak, worst_error(row)]


def cell_key(row: Row) -> tuple[Any, ...]:
    """Rows of one run of a case: their times and memory stand side by side."""
    return (*row["shape"], row["dtype"], row["kept_share"], row["device"])


GRID_COLUMNS = (
    "N D V", "dtype", "kept", "limit ms", "pyrl", "ms", "× limit", "MiB over gradients",
    "next best", "× limit",
)  # fmt: skip


def grid_markdown(rows: Sequence[Row]) -> str:
    """A line a case: the limit, the best of this package, the best of the others."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "ok" and row.get("ratio_to_limit"):
            cases.setdefault(cell_key(row), []).append(row)
    lines = []
    for key in sorted(cases, key=lambda k: (k[-1], k[3] == "bfloat16", k[1:3], k[0], -k[4])):
        members = sorted(cases[key], key=lambda r: r["ratio_to_limit"])
        limit = next((r for r in members if r["role"] == "limit"), None)
        ours = next((r for r in members if r["role"] == "pyrl"), None)
        other = next((r for r in members if r["role"] == "peer"), None)
        if limit is None or ours is None:
            continue
        over = ours.get("peak_mib")
        lines.append([
            " ".join(map(str, key[:3])), key[3], f"{key[4]:.0%}", number(limit["ms_p50"]),
            ours["implementation"], number(ours["ms_p50"]), f"{ours['ratio_to_limit']:.2f}",
            "–" if over is None else f"{over - ours['grads_mib']:.0f}",
            other["implementation"] if other else "–",
            f"{other['ratio_to_limit']:.2f}" if other else "–",
        ])  # fmt: skip
    if not lines:
        return ""
    return "\n".join(["### The grid at a glance", "", *markdown_cells(GRID_COLUMNS, lines), ""])


def kept_markdown(rows: Sequence[Row]) -> str:
    """ms at a share of kept rows over ms at all of them, same shape, dtype and commit."""
    times = {
        (r["implementation"], tuple(r["shape"]), r["dtype"], r["device"], r["kept_share"]): r
        for r in rows
        if r["status"] == "ok" and r.get("ms_p50")
    }
    lines = []
    for key in sorted(times, key=lambda k: (k[1], k[2], k[0])):
        half, fifth = (times.get((*key[:4], share)) for share in (0.5, 0.2))
        if key[4] != 1 or (half is None and fifth is None):
            continue
        cells_ = ["–" if r is None else f"{r['ms_p50'] / times[key]['ms_p50']:.2f}"
                  for r in (half, fifth)]  # fmt: skip
        lines.append(
            [key[0], shape_text(times[key]), key[2], number(times[key]["ms_p50"]), *cells_]
        )
    if not lines:
        return ""
    columns = ("implementation", "shape", "dtype", "ms, all kept", "50% kept", "20% kept")
    return "\n".join([
        "### Kept share: time over the time with every row kept", "",
        "Targets: at most .55 with half of the rows, .25 with a fifth. Each share is a case of its "
        "own, timed minutes from the others.", "",
        *markdown_cells(columns, lines), "",
    ])  # fmt: skip


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of one op, shape, dtype, kept share and device, keyed by a title."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{title_of(row)} on {row['device']}", []).append(row)
    return found


def show(rows: Sequence[Row]) -> None:
    for title, members in groups(rows).items():
        print_cells(title, COLUMNS, [cells(row) for row in members], 2)
        print(conditions_text(members), flush=True)


def conditions_text(rows: Sequence[Row]) -> str:
    """A line for each set of conditions among the rows, with what else the cores did."""
    busy: dict[str, list[Row]] = {}
    for r in rows:
        busy.setdefault(
            f"{r['device']}, {r['threads']} threads, torch {r['torch']}, python {r['python']}, "
            f"commit {r['commit']}, {r['date'][:10]}", []
        ).append(r)  # fmt: skip
    return "\n".join(f"{line}, {others_text(members)}" for line, members in sorted(busy.items()))


def others_text(rows: Sequence[Row]) -> str:
    """How busy other processes were: measured beside the timing, or else the load before it."""
    others = [r["other_cores"] for r in rows if r.get("other_cores") is not None]
    if others:
        return f"other work {span(others)} cores"
    return f"load {span([r['load'] for r in rows])} before the run"


def span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def markdown(rows: Sequence[Row]) -> str:
    parts = []
    for title, members in groups(rows).items():
        lines = [f"### {title}", "", *markdown_cells(COLUMNS, [cells(row) for row in members])]
        parts.append("\n".join(lines) + f"\n\n{conditions_text(members)}\n")
    return "\n".join(parts)
