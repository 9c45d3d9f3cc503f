"""The pictures of RESULTS.md, from result rows alone. Colours are Okabe and Ito's, told apart
by every kind of colour vision; lines differ in their markers too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

Row = dict[str, Any]
COLOURS = {"limit": "#8c8c8c", "peer": "#56b4e9", "pyrl": "#d55e00"}
#: Colour, marker and line of an implementation that has a curve.
LINES = {
    "gemm": ("#8c8c8c", "", ":"),
    "naive": ("#000000", "s", "-"),
    "torch.compile": ("#0072b2", "^", "-"),
    "liger-batch": ("#009e73", "D", "-"),
    "trl": ("#cc79a7", "v", "-"),
    "pyrl-cpu": ("#d55e00", "o", "-"),
}
INK = "#3b4350"


def timed(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r["status"] == "ok" and r.get("ratio_to_limit")]


def shape_name(row: Row) -> str:
    n, d, v = row["shape"]
    kept = "" if row["kept_share"] == 1 else f", {row['kept_share']:.0%} kept"
    return f"N {n} D {d} V {v}{kept}"


def conditions_line(rows: Sequence[Row]) -> str:
    """What the rows have in common, for a caption."""
    parts = [
        "; ".join(sorted({str(r[key]) for r in rows}))
        for key in ("device", "threads", "torch", "commit")
    ]
    return f"{parts[0]}, {parts[1]} threads, torch {parts[2]}, commit {parts[3]}"


def finish(figure: Any, title: str, caption: str, path: Path) -> Path:
    _, height = figure.get_size_inches()
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left", y=1 - 0.1 / height,
                    va="top")  # fmt: skip
    figure.text(0.01, 0.1 / height, caption, fontsize=7.5, color=INK, va="bottom")
    lines = caption.count("\n") + 1
    figure.get_layout_engine().set(
        rect=(0, (0.12 + 0.15 * lines) / height, 1, 1 - (0.5 + 0.15 * lines) / height)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path


def tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=INK)


def cut(values: Sequence[float], text: str) -> tuple[list[float], list[str]]:
    """Lengths and labels of bars; one that is more than twice the next is drawn shorter and says
    so, or the others could not be told apart."""
    ordered = sorted(values)
    longest = max(ordered)
    if len(ordered) > 1 and longest > 2 * ordered[-2] > 0:
        longest = 1.25 * ordered[-2]
    labels = [text.format(v) + (" (cut)" if v > longest else "") for v in values]
    return [min(v, longest) for v in values], labels


def bars(rows: Sequence[Row], path: Path) -> Path | None:
    """Time over the limit and peak memory, a line of axes a dtype: at the shape where most
    implementations were timed in it, the largest of those."""
    full = [r for r in timed(rows) if r["kept_share"] == 1 and r["role"] != "limit"]
    if not full:
        return None
    by_dtype = []
    for dtype in sorted({r["dtype"] for r in full}, reverse=True):
        shapes = [tuple(r["shape"]) for r in full if r["dtype"] == dtype]
        shape = max(sorted(set(shapes), reverse=True), key=shapes.count)
        members = [r for r in full if r["dtype"] == dtype and tuple(r["shape"]) == shape]
        by_dtype.append(sorted(members, key=lambda r: -r["ratio_to_limit"]))
    heights = [len(members) + 2.5 for members in by_dtype]
    figure, axes = plt.subplots(
        len(by_dtype), 2, figsize=(10, 1.1 + 0.24 * sum(heights)), squeeze=False,
        layout="constrained", height_ratios=heights,
    )  # fmt: skip
    for (left, right), members in zip(axes, by_dtype, strict=True):
        what = f"{members[0]['dtype']}, {shape_name(members[0])}"
        names = [r["implementation"] for r in members]
        colours = [COLOURS[r["role"]] for r in members]
        lengths, labels = cut([r["ratio_to_limit"] for r in members], "×{:.2f}")
        left.axvline(1, color=COLOURS["limit"], linestyle="--", linewidth=1, zorder=0.5)
        left.bar_label(
            left.barh(names, lengths, color=colours), labels, padding=3, fontsize=8, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
        left.set_title(f"{what}: time / bare products", fontsize=9, loc="left")
        left.set_xlabel("times the limit (dashed: 1)", fontsize=8, color=INK)
        peaks = [r.get("peak_mib") for r in members]
        lengths, labels = cut([p or 0.0 for p in peaks], "{:.0f}")
        labels = [
            "not measured" if p is None else text for p, text in zip(peaks, labels, strict=True)
        ]
        right.bar_label(
            right.barh(names, lengths, color=colours), labels, padding=3, fontsize=8, color=INK
        )
        grads = max((r.get("grads_mib") or 0.0 for r in members), default=0.0)
        right.axvline(grads, color=COLOURS["limit"], linestyle="--", linewidth=1)
        right.set_title("peak memory above the inputs", fontsize=9, loc="left")
        right.set_xlabel(f"MiB (dashed: the gradients' own {grads:.0f})", fontsize=8, color=INK)
        right.set_yticks(range(len(names)), [""] * len(names))
        for axis in (left, right):
            tidy(axis)
            axis.margins(x=0.2)
    return finish(
        figure, "Hidden states to policy loss, forward + backward",
        "Orange: this package. Medians over rounds of the ratio to the three matrix products timed "
        "in the same round; memory in a fresh process.\n"
        + conditions_line([r for members in by_dtype for r in members]), path,
    )  # fmt: skip


def curves(rows: Sequence[Row], path: Path) -> Path | None:
    """Milliseconds and peak MiB against N, all rows kept, for the (D, V, dtype) of most sizes N."""
    full = [r for r in rows if r["status"] == "ok" and r["kept_share"] == 1 and r.get("ms_p50")]
    families: dict[tuple[Any, ...], list[Row]] = {}
    for r in full:
        if r["implementation"] in LINES:
            families.setdefault((*r["shape"][1:], r["dtype"]), []).append(r)
    sizes = {key: len({r["shape"][0] for r in members}) for key, members in families.items()}
    if not sizes or max(sizes.values()) < 3:
        return None
    key = max(sorted(sizes), key=lambda k: sizes[k])
    members = families[key]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    gradients = "gradients alone"
    for name, (colour, marker, line) in LINES.items():
        mine = sorted((r for r in members if r["implementation"] == name), key=lambda r: r["shape"])
        style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5}
        style |= {"linewidth": 2.2 if name.startswith("pyrl") else 1.4, "label": name}
        if mine:
            left.plot([r["shape"][0] for r in mine], [r["ms_p50"] / 1e3 for r in mine], **style)
        held = [r for r in mine if r.get("peak_mib") and r["role"] != "limit"]
        if held:
            right.plot([r["shape"][0] for r in held], [r["peak_mib"] for r in held], **style)
    grads = [r["grads_mib"] for r in members if r.get("grads_mib")]
    if grads:
        right.axhline(min(grads), color=COLOURS["limit"], linestyle="--", linewidth=1.4,
                      label=gradients)  # fmt: skip
    ticks = sorted({r["shape"][0] for r in members})
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel("N, tokens", fontsize=9, color=INK)
        axis.grid(color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
        tidy(axis)
    left.set_title("time of a call (dotted: bare products)", fontsize=9, loc="left")
    left.set_ylabel("seconds", fontsize=9, color=INK)
    right.set_title("peak memory above the inputs", fontsize=9, loc="left")
    right.set_ylabel("MiB", fontsize=9, color=INK)
    named = {}
    for axis in (left, right):
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(
        named.values(), named.keys(), fontsize=8, frameon=False, loc="outside right upper"
    )
    d, v, dtype = key
    return finish(
        figure, f"Against N: D {d}, V {v}, {dtype}, every row kept",
        "Both axes logarithmic: a straight line of slope 1 is linear, a level one flat. Medians; "
        "memory in a fresh process.\n" + conditions_line(members), path,
    )  # fmt: skip


def shares(rows: Sequence[Row], path: Path) -> Path | None:
    """limit's time / time: a bar an implementation, a group a shape, a column a dtype."""
    found = [r for r in timed(rows) if r["role"] != "limit"]
    dtypes = sorted({r["dtype"] for r in found}, reverse=True)
    if not dtypes:
        return None
    columns = []
    for dtype in dtypes:
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for r in found:
            if r["dtype"] == dtype:
                groups.setdefault((*r["shape"][1:], r["shape"][0], -r["kept_share"]), []).append(r)
        columns.append([groups[key] for key in sorted(groups)])
    tall = max(sum(len(g) + 1.6 for g in groups) for groups in columns)
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(5.2 * len(dtypes), 1.2 + 0.19 * tall), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, dtype, groups in zip(axes[0], dtypes, columns, strict=True):
        at, places, names = 0.0, [], []
        for group in groups:
            axis.text(0, at, shape_name(group[0]), fontsize=8, fontweight="bold", va="center")
            for row in sorted(group, key=lambda r: r["ratio_to_limit"]):
                at += 1
                share = row["share_of_limit"]
                axis.barh(at, share, height=0.8, color=COLOURS[row["role"]])
                inside = share > 0.88  # beyond it the label would lie on the dashed line
                axis.text(
                    share - 0.01 if inside else share + 0.01, at, f"{share:.0%}", fontsize=7,
                    va="center", ha="right" if inside else "left",
                    color="white" if inside and row["role"] == "pyrl" else INK,
                )  # fmt: skip
                places.append(at)
                names.append(row["implementation"])
            at += 1.6
        axis.set_yticks(places, names)
        axis.set_ylim(tall - 0.6, -0.8)
        axis.axvline(1, color=COLOURS["limit"], linestyle="--", linewidth=1)
        axis.set_xlim(0, max(1.08, *(r["share_of_limit"] + 0.1 for g in groups for r in g)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axis.set_title(dtype, fontsize=9, loc="left")
        axis.set_xlabel("share of the bare products' speed (dashed: all of it)", fontsize=8,
                        color=INK)  # fmt: skip
        tidy(axis)
        axis.tick_params(axis="y", labelsize=7.5, length=0)
    return finish(
        figure, "Share of the limit: hidden states to policy loss, forward + backward",
        "The limit: 6NDV of matrix products over the kept rows, timed in the same rounds; "
        "orange: this package.\n" + conditions_line(found), path,
    )  # fmt: skip
