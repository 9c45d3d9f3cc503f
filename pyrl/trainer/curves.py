"""curves.png: the report's charts as one picture, for places that show no HTML."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrl.trainer.charts import Axis, Chart, points, smooth
from pyrl.trainer.tracking import write_atomic

COLUMNS = 3
COLOURS = ("#2563c9", "#c2570c", "#0f7d6c")
#: Shown when the run has them; the report has the rest.
FIRST = 12


def write_curves(
    metrics: Sequence[Mapping[str, Any]],
    marks: Sequence[Mapping[str, Any]],
    charts: Sequence[Chart],
    path: Path,
) -> None:
    """Draws the first `FIRST` of `charts` that `metrics` have values for; `marks` go on the reward.

    `metrics` are the steps in order, at least one; `marks` as in `html.chart_view`.
    """
    # Not pyplot: a Figure of its own needs no display and leaves the caller's figures alone.
    from matplotlib.figure import Figure

    drawn = []
    for chart in charts:
        lines = [(name, line) for key, name in chart.series if (line := points(metrics, key))]
        if lines:
            drawn.append((chart, lines))
    drawn = drawn[:FIRST]
    rows = max(1, math.ceil(len(drawn) / COLUMNS))
    figure = Figure(figsize=(4.2 * COLUMNS, 2.7 * rows), dpi=120)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    for i, (chart, lines) in enumerate(drawn):
        axes = figure.add_subplot(rows, COLUMNS, i + 1)
        _draw(axes, chart, lines, marks if chart.title == "Reward" else ())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _draw(
    axes: Any, chart: Chart, lines: Sequence[Any], marks: Sequence[Mapping[str, Any]]
) -> None:
    values = [y for _, line in lines for _, y in line if not math.isnan(y)]
    for mark in marks:
        values += [v for k in ("mean", "low", "high") if (v := mark.get(k)) is not None]
    axis = Axis(values, zero=chart.zero, log=chart.log)
    for (name, line), colour in zip(lines, COLOURS, strict=False):
        x, y = [p[0] for p in line], [p[1] for p in line]
        bold = [] if chart.log else smooth(line)
        # A lone point, or one between two gaps, has no line to be seen by.
        marker = "o" if sum(not math.isnan(v) for v in y) <= 8 else None
        axes.plot(
            x, y, color=colour, alpha=0.3 if bold else 1, linewidth=1 if bold else 1.6,
            marker=marker, markersize=3.5, label=None if bold else name,
        )  # fmt: skip
        if bold:
            axes.plot(x, [p[1] for p in bold], color=colour, linewidth=1.8, label=name)
    for mark in marks:
        low, high = mark.get("low"), mark.get("high")
        has_interval = low is not None and high is not None
        axes.errorbar(
            mark["step"], mark["mean"],
            yerr=[[mark["mean"] - low], [high - mark["mean"]]] if has_interval else None,
            color=COLOURS[1], marker="D", markersize=5, capsize=3, linestyle="none",
            label="held-out" if mark is marks[0] else None, zorder=5,
        )  # fmt: skip
    if axis.log:
        axes.set_yscale("log")
    elif chart.zero:
        axes.set_ylim(bottom=min(0.0, *values), top=max(0.0, *values) * 1.05 or 1)
    limits = axes.get_ylim()
    axes.minorticks_off()
    axes.set_yticks(axis.ticks, [text for _, text in axis.labels()])
    axes.set_ylim(limits)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    title = axes.set_title(chart.title, loc="left", fontsize=10.5, fontweight="bold")
    title.set_parse_math(False)  # a metric's name may hold a $
    if chart.note:
        axes.annotate(
            f"{chart.note}{', log scale' if axis.log else ''}",
            xy=(1, 0), xycoords=title, xytext=(6, 0), textcoords="offset points",
            fontsize=8, color="#5b6472", va="bottom",
        )  # fmt: skip
    axes.grid(color="#d9dde3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0, colors="#3b4350")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#aab1bc")
    if len(lines) > 1 or marks:
        axes.legend(fontsize=8, frameon=False, loc="best")
