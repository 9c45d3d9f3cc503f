"""The report's page: charts as SVG, model output as safe text, and the template that holds them.

A chart is an SVG stretched to its box (`preserveAspectRatio="none"`, strokes that do not scale)
with its labels as HTML beside it, so that type keeps its size from a phone to a wide screen.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pyrl.trainer.charts import Axis, Chart, Steps, finite, label, points, smooth, svg_path, thin

PAGE = Path(__file__).parent / "page"
MAX_BARS = 120


def chart_view(
    chart: Chart,
    metrics: Sequence[Mapping[str, Any]],
    marks: Sequence[Mapping[str, Any]] = (),
    first: float | None = None,
) -> dict[str, Any] | None:
    """What the template draws for `chart`, or None when no step has any of its metrics.

    `marks`: {step, mean, low, high}, points with an interval laid over the lines.
    """
    lines = [(key, name, points(metrics, key)) for key, name in chart.series]
    lines = [entry for entry in lines if entry[2]]
    if not lines:
        return None
    values = [y for _, _, line in lines for _, y in line if not math.isnan(y)]
    for mark in marks:
        values += [y for k in ("mean", "low", "high") if (y := finite(mark.get(k))) is not None]
    axis = Axis(values, zero=chart.zero, log=chart.log)
    begin = metrics[0]["step"] if first is None else min(first, metrics[0]["step"])
    steps = Steps(float(begin), float(metrics[-1]["step"]))
    series, described = [], []
    for key, name, line in lines:
        # An average of extremes, or one that carries a spike on, would tell a wrong story.
        smoothed = [] if chart.log else smooth(line)
        ends = [p for p in line if not math.isnan(p[1])]
        raw = thin(line)
        dots = ends if len(ends) == 1 else []
        series.append(
            {
                "key": key,
                "name": name,
                "raw": svg_path(raw, steps, axis),
                "dense": len(raw) > 150,
                "smooth": svg_path(thin(smoothed), steps, axis),
                "dots": [(steps.percent(x), axis.percent(y)) for x, y in dots],
                "last": label(ends[-1][1]),
                "values": [[x, None if math.isnan(y) else float(f"{y:.4g}")] for x, y in raw],
            }
        )
        described.append(
            f"{name} from {label(ends[0][1])} at step {ends[0][0]:.0f} "
            f"to {label(ends[-1][1])} at step {ends[-1][0]:.0f}"
        )
    drawn = []
    for mark in marks:
        mean = finite(mark.get("mean"))
        if mean is None:
            continue
        low, high = finite(mark.get("low")), finite(mark.get("high"))
        drawn.append(
            {
                "x": steps.percent(mark["step"]),
                "y": axis.percent(mean),
                "low": axis.percent(mean if low is None else low),
                "high": axis.percent(mean if high is None else high),
                "interval": low is not None and high is not None,
            }
        )
    return {
        "title": chart.title,
        "note": chart.note + (", log scale" if axis.log else ""),
        "series": series,
        "marks": drawn,
        "x": steps.labels(),
        "y": axis.labels(),
        "zero": None if axis.log else round(axis.percent(0.0), 2),
        "describe": f"{chart.title}: {'; '.join(described)}",
        "data": {
            "first": steps.first,
            "last": steps.last,
            "series": [{"name": s["name"], "values": s["values"]} for s in series],
        },
    }


def phase_view(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Seconds by phase: totals, and a stack a step (the mean of neighbouring steps beyond
    `MAX_BARS`); what no phase accounts for is `other`. None when no step has a phase."""
    prefix = "seconds_"
    names = list(dict.fromkeys(k for m in metrics for k in m if k.startswith(prefix)))
    if not names:
        return None
    rows = []
    for m in metrics:
        row = [finite(m.get(name)) or 0.0 for name in names]
        rest = (finite(m.get("seconds")) or 0.0) - sum(row)
        # Clocks read a moment apart leave a sliver; only a real remainder is worth a colour.
        rows.append((m["step"], [*row, rest if rest > 0 else 0.0]))
    labels = [name.removeprefix(prefix) for name in names] + ["other"]
    totals = [sum(row[i] for _, row in rows) for i in range(len(labels))]
    whole = sum(totals)
    if whole == 0:
        return None
    shown = [i for i, total in enumerate(totals) if total / whole >= 5e-4]
    size = math.ceil(len(rows) / MAX_BARS)
    bars: list[dict[str, Any]] = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        means = [sum(row[i] for _, row in chunk) / len(chunk) for i in shown]
        steps = (chunk[0][0], chunk[-1][0])
        bars.append({"steps": steps, "parts": means})
    axis = Axis([sum(b["parts"]) for b in bars], zero=True)
    width = 100 / len(bars)
    for i, bar in enumerate(bars):
        edges = [axis.percent(sum(bar["parts"][:k])) for k in range(len(shown) + 1)]
        bar["x"], bar["width"] = round(i * width, 3), round(width, 3)
        bar["boxes"] = [
            (round(100 - top, 3), round(top - bottom, 3))
            for bottom, top in itertools.pairwise(edges)
        ]
    labelled = sorted({round(k * (len(bars) - 1) / 4) for k in range(5)})
    return {
        "names": [labels[i] for i in shown],
        "totals": [totals[i] for i in shown],
        "shares": [totals[i] / whole for i in shown],
        "bars": bars,
        "binned": size,
        "y": axis.labels(),
        "x": [(round((i + 0.5) * width, 2), f"{bars[i]['steps'][0]:,}") for i in labelled],
    }


def safe_text(text: Any, limit: int | None = None) -> str:
    """Text that displays as what it is: control, bidi-override and lone-surrogate characters become
    their code points, so that no output can reorder, hide or break the page. (Escaping of <, & and
    quotes is the template's, and always on.)"""
    text = text if isinstance(text, str) else str(text)
    cut = len(text) - limit if limit is not None and len(text) > limit else 0
    shown = text[: len(text) - cut] if cut else text
    out = "".join(
        c if c in _KEPT or unicodedata.category(c) not in _INVISIBLE else f"⟨U+{ord(c):04X}⟩"
        for c in shown.replace("\r\n", "\n")
    )
    return f"{out}\n[… {cut:,} more characters in samples.jsonl]" if cut else out


#: Control, format (bidi overrides, zero-width), surrogate: unicodedata's names.
_INVISIBLE = frozenset({"Cc", "Cf", "Cs"})
#: Line breaks, tabs, and the joiners that emoji and many scripts are spelled with.
_KEPT = frozenset("\n\t\u200c\u200d")


def config_lines(text: str) -> list[tuple[str, str, str]]:
    """(kind, key, rest) of config.toml's lines, for colouring only."""
    lines = []
    for line in safe_text(text).rstrip("\n").split("\n") if text else []:
        key, equals, rest = line.partition("=")
        if line.startswith("["):
            lines.append(("table", "", line))
        elif line.lstrip().startswith("#") or not equals:
            lines.append(("comment" if line.lstrip().startswith("#") else "plain", "", line))
        else:
            lines.append(("pair", key, equals + rest))
    return lines


def render_page(values: Mapping[str, Any], name: str = "page.html") -> str:
    """The template `name` of page/ with `values`, the pages' style and script inlined.

    The page's Content-Security-Policy allows that one script by its hash and no request at all, so
    text from a model cannot act even if some markup slipped through.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script = (PAGE / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(name).render(
        **values,
        style=Markup((PAGE / "page.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )
