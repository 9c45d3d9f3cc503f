"""How hard a file of puzzles is: a figure, and a table beside the published sets."""

from __future__ import annotations

import io
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrl.tasks.temporal_clue.sheet import perfect_sheet, score_sheet
from pyrl.tasks.temporal_clue.store import SIZES, Record

#: Means of the published sets; the public scorer's value of a perfect sheet.
PUBLISHED = {"clues": 29.0, "questions": 6.7, "characters": 4100.0, "legacy": 0.926}
OURS, DARK, THEIRS, QUIET = "#2563c9", "#0b2a5c", "#c2570c", "#5b6472"
#: Column of the table -> what of a record it counts.
COUNTS = ("clues", "questions", "characters")


def figures(records: Sequence[Record]) -> dict[str, Any]:
    """Puzzles, levels, and of clues, questions, characters and each size: mean, least, quartiles,
    greatest; the mean scores of perfect sheets. ValueError without a record."""
    if not records:
        raise ValueError("records=[]: expected at least one")
    found: dict[str, Any] = {
        "puzzles": len(records),
        "levels": dict(Counter(r.level for r in records)),
    }
    for name in (*COUNTS, *SIZES):
        found[name] = _summary([count(r, name) for r in records])
        if name in PUBLISHED:
            found[name]["published"] = PUBLISHED[name]
    for name, legacy in (("perfect", False), ("legacy", True)):
        found[name] = statistics.fmean(
            score_sheet(r.answers, perfect_sheet(r.answers), legacy=legacy) for r in records
        )
    return found


def count(record: Record, name: str) -> int:
    """How many clues, questions, characters, suspects, … a puzzle has."""
    if name == "characters":
        return record.characters
    return len(getattr(record, name)) if name in COUNTS else record.sizes[name]


def write_report(records: Sequence[Record], folder: str | os.PathLike[str]) -> list[Path]:
    """difficulty.json, difficulty.md and difficulty.png in the folder; returns their paths."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    found = figures(records)
    paths = [place / f"difficulty.{ending}" for ending in ("json", "md", "png")]
    paths[0].write_text(json.dumps(found, indent=1) + "\n")
    paths[1].write_text(markdown(found))
    paths[2].write_bytes(picture(records))
    return paths


def markdown(found: Mapping[str, Any]) -> str:
    """The table of `figures`."""
    levels = ", ".join(f"{n:,} {level}" for level, n in found["levels"].items())
    lines = [
        f"# {found['puzzles']:,} puzzles ({levels})",
        "",
        "| a puzzle | mean | published | least | quarter | median | three quarters | greatest |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in (*COUNTS, *SIZES):
        row = found[name]
        cells = [row[k] for k in ("least", "quarter", "median", "three_quarters", "greatest")]
        published = f"{row['published']:,g}" if "published" in row else ""
        lines.append(
            f"| {name} | {row['mean']:,.1f} | {published} | "
            + " | ".join(f"{v:,.0f}" for v in cells)
            + " |"
        )
    lines += [
        "",
        f"A perfect sheet scores {found['perfect']:.3f}, and {found['legacy']:.3f} by the public "
        f"scorer's rule, which reads no times (published sets: {PUBLISHED['legacy']}).",
    ]
    return "\n".join(lines) + "\n"


def picture(records: Sequence[Record]) -> bytes:
    """A PNG: distributions of clues, questions and characters, the kinds of clues, the sizes, and
    clues by suspects."""
    # Not pyplot: a Figure of its own needs no display and leaves the caller's figures alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.2), dpi=120)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.14)
    axes = figure.subplots(2, 3)
    for place, name in zip(axes[0], COUNTS, strict=True):
        _distribution(place, name, [count(r, name) for r in records])
    _by_suspects(axes[1][0], records)
    _sizes(axes[1][1], records)
    _kinds(axes[1][2], records)
    levels = ", ".join(dict.fromkeys(r.level for r in records))
    figure.suptitle(
        f"Temporal Clue: {len(records):,} puzzles, level {levels}",
        x=0.01, ha="left", fontsize=13, fontweight="bold",
    )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _summary(values: Sequence[int]) -> dict[str, float]:
    ordered = sorted(values)
    quarters = (
        statistics.quantiles(ordered, n=4, method="inclusive")
        if len(ordered) > 1
        else [ordered[0]] * 3
    )
    return {
        "mean": statistics.fmean(ordered),
        "least": ordered[0],
        "quarter": quarters[0],
        "median": quarters[1],
        "three_quarters": quarters[2],
        "greatest": ordered[-1],
    }


def _distribution(axes: Any, name: str, values: Sequence[int]) -> None:
    low, high = min(values), max(values)
    width = max(
        1, math.ceil((high - low + 1) / 28)
    )  # whole numbers a bar, so none is twice as full
    edges = [low - 0.5 + width * i for i in range((high - low) // width + 2)]
    axes.hist(values, bins=edges, color=OURS, alpha=0.7, rwidth=0.9)
    mean = statistics.fmean(values)
    shown = f"{mean:,.0f}" if mean >= 1000 else f"{mean:,.1f}"
    axes.axvline(mean, color=DARK, linewidth=1.8, label=f"mean {shown}")
    if name in PUBLISHED:
        theirs = PUBLISHED[name]
        label = f"published mean {theirs:,g}"
        axes.axvline(theirs, color=THEIRS, linewidth=1.6, linestyle=(0, (4, 2)), label=label)
    _style(axes, {"characters": "Characters of the prompt"}.get(name, name.capitalize()), "puzzles")
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=5)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(fontsize=8, frameon=False, loc="best")


def _by_suspects(axes: Any, records: Sequence[Record]) -> None:
    groups: dict[int, list[int]] = {}
    for r in records:
        groups.setdefault(count(r, "suspects"), []).append(len(r.clues))
    places = sorted(groups)
    for x in places:
        values = groups[x]
        spread = [x + 0.26 * (2 * ((i * 0.618) % 1) - 1) for i in range(len(values))]
        axes.scatter(spread, values, s=9, color=OURS, alpha=0.35, linewidths=0)
    medians = [statistics.median(groups[x]) for x in places]
    axes.plot(places, medians, color=THEIRS, marker="o", markersize=4, label="median")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    axes.set_ylim(bottom=0)
    axes.set_xticks(places)
    _style(axes, "Clues", "by number of suspects")


def _sizes(axes: Any, records: Sequence[Record]) -> None:
    for y, name in enumerate(SIZES):
        row = _summary([count(r, name) for r in records])
        axes.plot((row["least"], row["greatest"]), (y, y), color=OURS, alpha=0.25, linewidth=7,
                  solid_capstyle="round")  # fmt: skip
        axes.plot((row["quarter"], row["three_quarters"]), (y, y), color=OURS, linewidth=7,
                  solid_capstyle="round")  # fmt: skip
        axes.plot(row["mean"], y, marker="D", color="white", markeredgecolor=OURS, markersize=5)
        axes.annotate(
            f"{row['mean']:.1f}", (row["mean"], y), xytext=(0, 8), textcoords="offset points",
            ha="center", fontsize=8, color=QUIET,
        )  # fmt: skip
    axes.set_yticks(range(len(SIZES)), SIZES)
    axes.set_ylim(len(SIZES) - 0.5, -0.6)
    axes.set_xlim(left=0)
    _style(axes, "Sizes", "range, middle half, mean")


def _kinds(axes: Any, records: Sequence[Record]) -> None:
    counts = Counter(family(clue[0]) for r in records for clue in r.clues)
    kinds = [kind for kind, _ in counts.most_common()]
    means = [counts[kind] / len(records) for kind in kinds]
    axes.barh(kinds, means, color=OURS, alpha=0.85, height=0.7)
    for y, mean in enumerate(means):
        axes.annotate(f"{mean:.1f}", (mean, y), xytext=(3, 0), textcoords="offset points",
                      va="center", fontsize=8, color=QUIET)  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.12)
    _style(axes, "Kinds of clues", "mean number a puzzle")


#: What a kind's name holds -> what the figure calls it; the first that fits.
_FAMILIES = (
    ("xor", "exclusive or"), ("iff", "if and only if"), ("together", "together once"),
    ("_with", "same room"), ("same_room", "same room"), ("carried", "a weapon moves"),
    ("moved", "a character moves"), ("_of", "adjacency"), ("at", "a place at a time"),
)  # fmt: skip


def family(kind: str) -> str:
    """The class of clues that a kind of fact belongs to."""
    for part, name in _FAMILIES:
        if kind == part or (part != "at" and kind.endswith(part)) or kind.endswith(f"_{part}"):
            return name
    return "motive" if kind == "motive" else "the murder"


def _style(axes: Any, title: str, note: str) -> None:
    shown = axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.annotate(
        note, xy=(1, 0), xycoords=shown, xytext=(6, 0), textcoords="offset points",
        fontsize=8, color=QUIET, va="bottom",
    )  # fmt: skip
    axes.grid(color="#d9dde3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, length=0, colors="#3b4350")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#aab1bc")
