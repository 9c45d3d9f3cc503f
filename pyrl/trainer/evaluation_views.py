"""An evaluation's numbers as the pages and the terminal show them: texts, curves over k, counts.

`details` are those of `evaluation_stats.describe`, possibly read back from a file that somebody
edited: whatever is missing or no number shows as a dash.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyrl.trainer.charts import Axis, finite, label
from pyrl.trainer.html import safe_text

MISSING = "–"
BINS = 24


def look(tree: Any, *path: str) -> Any:
    """tree[path[0]][path[1]]…, None where that leads nowhere."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def number(value: Any, digits: int = 3) -> str:
    """Fixed point, or a dash."""
    shown = finite(value)
    # + 0.0: a small negative number rounds to -0.0.
    return (
        MISSING if shown is None else f"{round(shown, digits) + 0.0:,.{digits}f}".replace("-", "−")
    )


def percent(value: Any) -> str:
    """A share, or a dash."""
    shown = finite(value)
    return MISSING if shown is None else f"{shown:.1%}"


def span(entry: Any) -> str:
    """`0.251 to 0.374`, empty without an interval."""
    low, high = finite(look(entry, "low")), finite(look(entry, "high"))
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def estimate(table: Any, what: str, k: str) -> tuple[str, str]:
    """(mean, interval) of table[what][k]; the interval with the number of prompts it is from where
    that is not all the scored ones: some lack k scored samples, or answers."""
    entry = look(table, what, k)
    held, scored = finite(look(entry, "prompts")), finite(look(table, "prompts"))
    few = f", {held:,.0f} prompts" if held and held != scored else ""
    return number(look(entry, "mean")), span(entry) + few


def powers_of(details: Any, what: str) -> list[str]:
    """The k of `overall.pass` or `overall.majority`, ascending."""
    found = look(details, "overall", what)
    keys = found if isinstance(found, Mapping) else {}
    return sorted((k for k in keys if isinstance(k, str) and k.isdecimal()), key=int)


def rows(table: Any, ks: Sequence[str], votes: Sequence[str]) -> list[tuple[str, str, str]]:
    """(name, value, interval or remark) of a domain's statistics, in the order to read them."""
    n = max(map(int, ks), default=1)
    found = [(f"avg@{n}", number(look(table, "mean")), span(table))]
    for name, what, keys in (("pass", "pass", ks), ("maj", "majority", votes)):
        for k in keys if what == "pass" else [k for k in keys if int(k) > 1]:
            found.append((f"{name}@{k}", *estimate(table, what, k)))
    length = look(table, "length")
    found += [
        ("std between samples", number(look(table, "std")), ""),
        (
            "length, tokens",
            number(look(length, "mean"), 1),
            f"median {number(look(length, 'p50'), 0)}, 90% {number(look(length, 'p90'), 0)}, "
            f"max {number(look(length, 'max'), 0)}",
        ),
        ("truncated", percent(look(table, "truncated")), ""),
        ("empty", percent(look(table, "empty")), ""),
    ]
    if finite(look(table, "answered")) is not None:
        found.append(("with an answer", percent(look(table, "answered")), ""))
    found += [
        (f"prompts solved {kind}", percent(look(table, "solved", kind)), "")
        for kind in ("never", "sometimes", "always")
    ]
    lost, gone = finite(look(table, "lost")), finite(look(table, "lost_prompts"))
    remark = f"{gone:,.0f} prompts without a score" if gone else ""
    return [*found, ("samples lost", number(lost, 0), remark)]


def curves(
    title: str, note: str, lines: Sequence[tuple[str, str, Mapping[str, Any]]]
) -> dict[str, Any] | None:
    """What the template's `curves` draws: (name, colour class, {k: mean, low, high}) over k.

    The k are evenly spaced, in their order: they double. None when no line has a value.
    """
    held = [(name, colour, entries) for name, colour, entries in lines if entries]
    ks = sorted({k for _, _, entries in held for k in entries if k.isdecimal()}, key=int)
    values = [
        value
        for _, _, entries in held
        for entry in entries.values()
        for key in ("mean", "low", "high")
        if (value := finite(look(entry, key))) is not None
    ]
    if not values:
        return None
    axis = Axis([0.0, 1.0, *values], zero=True)
    at = {k: 50.0 if len(ks) == 1 else 100 * i / (len(ks) - 1) for i, k in enumerate(ks)}
    drawn, described = [], []
    for name, colour, entries in held:
        points = [(k, y) for k in ks if (y := finite(look(entries, k, "mean"))) is not None]
        if not points:
            continue
        edges = []
        for k, _ in points:
            low, high = finite(look(entries, k, "low")), finite(look(entries, k, "high"))
            if low is not None and high is not None:
                edges.append((at[k], axis.percent(low), axis.percent(high)))
        around = [(x, low) for x, low, _ in edges] + [(x, high) for x, _, high in edges[::-1]]
        dots = [(round(at[k], 2), round(axis.percent(y), 2)) for k, y in points]
        drawn.append(
            {
                "name": name,
                "colour": colour,
                "path": _path(dots),
                "band": _path(around) + "Z" if len(edges) > 1 else "",
                "dots": dots,
                "stems": edges if len(edges) == 1 else [],
                "last": number(points[-1][1]),
            }
        )
        described.append(
            f"{name} from {number(points[0][1])} at k = {points[0][0]} "
            f"to {number(points[-1][1])} at k = {points[-1][0]}"
        )
    return {
        "title": title,
        "note": note,
        "lines": drawn,
        "x": [(round(at[k], 2), k) for k in _thinned(ks)],
        "y": axis.labels(),
        "describe": f"{title}: {'; '.join(described)}",
    }


def _thinned(ks: Sequence[str]) -> list[str]:
    """At most about eight labels, the last one among them."""
    step = math.ceil(len(ks) / 8)
    return list(ks[::-1][::step][::-1])


def _path(points: Sequence[tuple[float, float]]) -> str:
    """SVG path data in a 0-100 box."""
    return "".join(f"{'L' if i else 'M'}{x:.2f} {100 - y:.2f}" for i, (x, y) in enumerate(points))


def _bins(values: Sequence[float]) -> tuple[list[float], list[str], list[tuple[float, str]]]:
    """Bins of sorted values: lower edges, names, and (share of the width, text) of the labels.

    A bin reaches to the next one's edge, the last has no end. One bin a whole number where they lie
    close, one a value where there are few different ones, else about `BINS` equal ones, between
    whole numbers if the values are whole.
    """
    distinct = sorted(set(values))
    first, reach = distinct[0], distinct[-1] - distinct[0]
    whole = all(float(v).is_integer() for v in distinct)
    if whole and reach < BINS:
        distinct = [first + i for i in range(int(reach) + 1)]
    few = len(distinct) <= BINS // 2 and (len(distinct) < len(values) or len(values) < 3)
    if few or (whole and reach < BINS):
        names = [label(v) for v in distinct]
        ticks = [((i + 0.5) / len(names), name) for i, name in enumerate(names)]
        return distinct, names, ticks[:: math.ceil(len(ticks) / 8)]
    if whole:
        width = math.ceil((reach + 1) / BINS)
        edges = [first + i * width for i in range(math.ceil((reach + 1) / width))]
        names = [f"{e:,.0f} to {e + width - 1:,.0f}" for e in edges]
    else:
        edges = [first + i * reach / BINS for i in range(BINS)]
        names = [f"{label(e)} to {label(e + reach / BINS)}" for e in edges]
    every = math.ceil(len(edges) / 6)
    return edges, names, [(i / len(edges), label(edges[i])) for i in range(0, len(edges), every)]


def histogram(
    title: str, note: str, parts: Sequence[tuple[str, str, Sequence[float]]]
) -> dict[str, Any] | None:
    """What the template's `histogram` draws: counts of (name, colour class, values), stacked.

    None without a finite value.
    """
    held = [
        (name, colour, [v for v in given if finite(v) is not None]) for name, colour, given in parts
    ]
    values = sorted(v for _, _, own in held for v in own)
    if not values:
        return None
    edges, names, ticks = _bins(values)
    counts = [[0] * len(held) for _ in edges]
    for part, (_, _, own) in enumerate(held):
        for v in own:
            counts[bisect.bisect_right(edges, v) - 1][part] += 1
    axis = Axis([float(sum(row)) for row in counts], zero=True)
    room, air = 100 / len(edges), 0.25 if len(edges) <= 6 else 0.06
    bars = []
    for i, (name, row) in enumerate(zip(names, counts, strict=True)):
        boxes, below = [], 0
        for (_, colour, _), count in zip(held, row, strict=True):
            if count:
                top, bottom = axis.percent(below + count), axis.percent(below)
                boxes.append((colour, round(100 - top, 3), round(top - bottom, 3)))
            below += count
        said = [f"{part[0]} {count:,}" for part, count in zip(held, row, strict=True) if count]
        bars.append(
            {
                "x": round((i + air) * room, 3),
                "width": round(room * (1 - 2 * air), 3),
                "boxes": boxes,
                "title": f"{name}: {', '.join(said) or 'none'}",
            }
        )
    return {
        "title": title,
        "note": note,
        "bars": bars,
        "parts": [(colour, name, f"{len(own):,}") for name, colour, own in held if own],
        "x": [(round(100 * x, 2), text) for x, text in ticks],
        "y": [(at, text) for at, text in axis.labels() if "." not in text],
        "describe": f"{title}: from {label(values[0])} to {label(values[-1])}, "
        f"median {label(values[len(values) // 2])}",
    }


def domain_rows(details: Any) -> list[tuple[str, str, Any]]:
    """(kind, name, table): the whole first, then the domains in their order."""
    found = [("whole", "all prompts", look(details, "overall"))]
    domains = look(details, "domains")
    for name, table in domains.items() if isinstance(domains, Mapping) else ():
        found.append(("part", safe_text(name, 60) or "(no domain)", table))
    return found
