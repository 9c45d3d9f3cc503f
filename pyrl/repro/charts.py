"""One image a result: its charts side by side, intervals over seeds as bands."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from pyrl.repro.claim import Chart, Line, Result
from pyrl.repro.statistics import t_interval
from pyrl.trainer.tracking import write_atomic

#: Told apart by every kind of colour vision, and by their dashes in grey (Okabe & Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#3b4350")
DASHES: tuple[Any, ...] = (
    "-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)), (0, (2.5, 1)), "-"
)  # fmt: skip
GREY = "#8a929e"
LOGIT_TICKS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def write_image(result: Result, path: Path) -> None:
    """PNG of every chart, at most three in a row; the same bytes for the same result."""
    # Not pyplot: a Figure of its own needs no display and leaves the caller's figures alone.
    from matplotlib.figure import Figure
    from PIL import Image  # matplotlib depends on it

    columns = min(3, len(result.charts))
    rows = math.ceil(len(result.charts) / columns)
    width = {1: 7.4, 2: 9.6, 3: 12.6}[columns]
    figure = Figure(figsize=(width, 4.0 * rows), dpi=120)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    legends: dict[str, Any] = {}
    titles = []
    for i, chart in enumerate(result.charts):
        axes = figure.add_subplot(rows, columns, i + 1)
        (_lines if chart.lines else _points)(axes, chart, result)
        titles.append(_style(axes, chart))
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            legends.setdefault(label, handle)
    if legends:
        figure.legend(
            legends.values(), legends.keys(), loc="outside lower center", frameon=False,
            fontsize=8.5, ncols=min(4, len(legends)), handlelength=3.2,
        )  # fmt: skip
    figure.draw_without_rendering()  # places the axes,
    figure.set_layout_engine("none")  # for good
    for title in titles:
        wide = title.get_window_extent().width / title.axes.bbox.width
        if wide > 1:  # it would run out of the image, or into the next chart
            title.set_fontsize(title.get_fontsize() / wide)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    # A palette: a quarter of the bytes, which are kept in the repository for good.
    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(128).save(small, format="png", optimize=True)
    write_atomic(path, small.getvalue())


def _lines(axes: Any, chart: Chart, result: Result) -> None:
    # An arm keeps its colour through all charts of a result.
    names = list(
        dict.fromkeys(
            line.name for each in result.charts for line in each.lines if not line.reference
        )
    )
    for line in chart.lines:
        if line.reference:
            axes.plot(line.x, line.y[0], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                line.name, (line.x[-1], line.y[0][-1]), xytext=(4, 0), fontsize=7.5,
                color="#5b6472", textcoords="offset points", ha="left", va="center",
            )  # fmt: skip
            continue
        i = names.index(line.name)
        _band(axes, line, COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)])


#: Seeds below which an interval says little: each is drawn instead.
FEW = 4


def _band(axes: Any, line: Line, colour: str, dash: Any) -> None:
    estimates = [t_interval(values) for values in zip(*line.y, strict=True)]
    axes.plot(
        line.x, [e.mean for e in estimates], color=colour, linestyle=dash, linewidth=1.7,
        label=line.name, zorder=3,
    )  # fmt: skip
    if len(line.y) < FEW:
        for values in line.y if len(line.y) > 1 else ():
            axes.plot(line.x, values, color=colour, linewidth=0.6, alpha=0.45, zorder=2)
        return
    axes.fill_between(
        line.x, [e.low for e in estimates], [e.high for e in estimates], color=colour,
        alpha=0.13, linewidth=0, zorder=2,
    )  # fmt: skip


def _points(axes: Any, chart: Chart, result: Result) -> None:
    arms = [arm for arm in result.arms if arm.quantity == chart.quantity]
    if chart.mark is not None:
        axes.axvline(chart.mark, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    for i, arm in enumerate(arms):
        mean, low, high, seeds = arm.estimate
        colour = COLOURS[i % len(COLOURS)]
        shifts = [0.16 * math.sin(2.4 * k) for k in range(seeds)]  # apart, the same every time
        axes.scatter(
            arm.values, [i + 0.0 + s for s in shifts], s=12, color=colour, alpha=0.6, linewidths=0
        )
        if seeds > 1:
            axes.plot([low, high], [i, i], color="#20262e", linewidth=2.2, zorder=4)
        axes.scatter([mean], [i], s=30, marker="D", color="#20262e", zorder=5)
    axes.set_yticks(range(len(arms)), [_wrapped(arm.name) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)


def _wrapped(name: str) -> str:
    first, comma, rest = name.partition(", ")
    return f"{first},\n{rest}" if comma else name


def _style(axes: Any, chart: Chart) -> Any:
    """Frame, labels and scales; returns the title's text."""
    title = axes.set_title(chart.title, loc="left", fontsize=10.5, fontweight="bold")
    if chart.note:
        axes.annotate(
            chart.note, (1, 1), xycoords="axes fraction", xytext=(0, 6), fontsize=8,
            textcoords="offset points", color="#5b6472", ha="right", va="bottom",
        )  # fmt: skip
    if chart.lines:
        axes.set_xlabel(chart.x_label, fontsize=9)
        axes.set_ylabel(chart.y_label, fontsize=9)
        axes.xaxis.get_major_locator().set_params(nbins=6)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if chart.scale == "zero":
            axes.set_ylim(bottom=0)
        elif chart.scale == "logit":
            axes.set_yscale("logit")
            axes.set_ylim(0.03, 0.999)
            axes.set_yticks(LOGIT_TICKS, [f"{tick:g}" for tick in LOGIT_TICKS])
            axes.minorticks_off()
    else:
        axes.set_xlabel(chart.y_label, fontsize=9)
    axes.grid(axis="both" if chart.lines else "x", color="#d9dde3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0, colors="#3b4350")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#aab1bc")
    return title
