"""A run's folder, retold: `report.html` to read and share, `curves.png` to paste.

Made from the folder's files alone, at any time: while the run works, after it was killed, on
another machine. report.html is one file that asks the network for nothing.
"""

from __future__ import annotations

import datetime
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrl.trainer import charts as charting
from pyrl.trainer import heldout_view, html, packing_view
from pyrl.trainer.charts import CHARTS, UNPLOTTED, Chart, finite, label
from pyrl.trainer.console import duration, number
from pyrl.trainer.curves import write_curves
from pyrl.trainer.html import safe_text
from pyrl.trainer.samples_view import prompt_text, reward_range, sample_view
from pyrl.trainer.tracking import RunFolder, RunRecord, write_atomic

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

MAX_PROMPTS = 100
SHOWN_PROMPTS = 6
MAX_SAMPLES = 4
MAX_TRAINING_SAMPLES = 24
MAX_TABLE_ROWS = 200
TABLE = (
    "reward_mean", "reward_std", "kl", "entropy", "loss", "grad_norm", "lr",
    "completion_length_mean", "truncated_share", "tokens_per_second", "seconds",
)  # fmt: skip


def write_report(run: str | os.PathLike[str] | RunFolder) -> Path:
    """Writes RUN/report.html and, when a step has been recorded, RUN/curves.png; returns the path
    of report.html.

    Unfinished and resumed runs, missing fields and unreadable lines are all reported as what they
    are. A path that holds none of a run's files is a ValueError.
    """
    path = run.path if isinstance(run, RunFolder) else Path(run)
    names = ("config.toml", "metrics.jsonl", "summary.json")
    if not any((path / name).is_file() for name in names):
        raise ValueError(f"{path} is not a run folder: it has none of {', '.join(names)}")
    folder = RunFolder(path)
    record = folder.read()
    record.metrics[:] = [_with_shares(m) for m in record.metrics]
    if record.metrics:
        charts, _ = charting.split_constant(_charts(record), record.metrics)
        write_curves(record.metrics, _marks(record), charts, folder.curves_path)
    try:
        packing = packing_view.views(record.packing)
    except ValueError:
        packing, record.unreadable[folder.packing_path.name] = [], [0]
    page = html.render_page({**_page(record), "packing": packing})
    write_atomic(folder.report_path, page.encode("utf-8", "replace"))
    return folder.report_path


def _with_shares(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The step with `zero_variance_share`: a count of groups means little without their number."""
    flat, groups = finite(metrics.get("zero_variance_groups")), finite(metrics.get("groups"))
    share = {} if flat is None or not groups else {"zero_variance_share": flat / groups}
    return {**metrics, **share}


def _charts(record: RunRecord) -> list[Chart]:
    """`CHARTS`, after the reward that of a mixture's domains, and one for every other number in the
    metrics, so that a new metric is seen the day it is logged."""
    rewards = tuple((f"reward_{domain}", domain) for domain in _domains(record))
    charts = list(CHARTS)
    if rewards:
        charts.insert(1, Chart("Reward by domain", rewards, "mean of the step's completions"))
    known = {key for chart in charts for key, _ in chart.series} | UNPLOTTED
    keys = dict.fromkeys(k for m in record.metrics for k in m if k not in known)
    extra = [
        Chart(key.replace("_", " "), ((key, key),))
        for key in keys
        if not key.startswith(("seconds_", "heldout_"))
        and any(finite(m.get(key)) is not None for m in record.metrics)
    ]
    return [*charts, *extra]


def _domains(record: RunRecord) -> list[str]:
    """Of the mixture, in the recipe's order; none for a single task or an unreadable recipe."""
    try:
        return list(tomllib.loads(record.config).get("task", {}).get("mix", {}))
    except (tomllib.TOMLDecodeError, AttributeError, TypeError):
        return []


def _heldout(record: RunRecord) -> tuple[dict[str, Any], dict[str, Any]]:
    """The evaluations before and after, {} where there is none."""
    found = (record.summary.get("heldout_before"), record.summary.get("heldout_after"))
    before, after = (
        r if isinstance(r, dict) and finite(r.get("mean")) is not None else {} for r in found
    )
    return before, after


def _marks(record: RunRecord) -> list[dict[str, Any]]:
    """The held-out evaluations as points of the reward chart, those during training included."""
    before, after = _heldout(record)
    found = [(0, before)]
    for m in record.metrics:
        found.append((m["step"], {k: m.get(f"heldout_{k}") for k in ("mean", "low", "high")}))
    if record.metrics:
        found.append((record.metrics[-1]["step"], after))
    return [{**r, "step": step} for step, r in found if finite(r.get("mean")) is not None]


def _page(record: RunRecord) -> dict[str, Any]:
    """Everything page/page.html shows."""
    metrics, summary = record.metrics, record.summary
    charts = []
    moving, still = charting.split_constant(_charts(record), metrics)
    for chart in moving if metrics else []:
        is_reward = chart.title == "Reward"
        view = html.chart_view(
            chart, metrics, _marks(record) if is_reward else (), 0 if is_reward else None
        )
        if view:
            charts.append(view)
    return {
        "title": safe_text(record.path.resolve().name),
        "status": _status(record),
        "facts": _facts(record),
        "headline": _headline(record),
        "heldout": heldout_view.view(record.evaluations),
        "charts": charts,
        "still": [(safe_text(name), label(value)) for name, value in still],
        "smoothing": charting.smoothing_span(len(metrics))
        if len(metrics) >= charting.SMOOTH_FROM
        else 0,
        "phases": html.phase_view(metrics) if metrics else None,
        "duration": duration,
        "checks": _checks(record),
        "prompts": _prompts(record),
        "shown_prompts": SHOWN_PROMPTS,
        "all_prompts": len(
            {s.get("prompt_id") for s in record.samples if s.get("phase") != "train"}
        ),
        "training_samples": _training_samples(record),
        "table": _table(metrics),
        "config": html.config_lines(record.config),
        "provenance": _provenance(record),
        "model": safe_text(summary.get("model") or ""),
        "task": safe_text(summary.get("task") or ""),
    }


def _status(record: RunRecord) -> tuple[str, str]:
    """(kind, words): whether these files tell a whole run."""
    last = record.metrics[-1]["step"] if record.metrics else 0
    if record.summary and record.summary.get("steps", last) == last:
        return (
            ("done", "finished") if not record.summary.get("interrupted") else ("part", "stopped")
        )
    if not record.metrics:
        return "part", "no step yet"
    return "part", f"unfinished: {last:,} steps so far"


def _headline(record: RunRecord) -> dict[str, Any] | None:
    """The held-out rewards on one scale; None when nothing was evaluated."""
    before, after = _heldout(record)
    rows = [(n, r) for n, r in (("before", before), ("after", after)) if r]
    if not rows:
        return None
    ends = [
        y for _, r in rows for k in ("mean", "low", "high") if (y := finite(r.get(k))) is not None
    ]
    # Rewards are usually shares: showing all of 0 to 1 keeps a small change looking small.
    low, high = min(0.0, *ends), max(1.0, *ends)
    scale = 100 / (high - low)

    def bar(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
        mean = float(result["mean"])
        least, most = finite(result.get("low")), finite(result.get("high"))
        counts = [f"{result[k]:,} {k}" for k in ("prompts", "samples") if finite(result.get(k))]
        return {
            "name": name,
            "mean": f"{mean:.3f}",
            "interval": None if least is None or most is None else f"{least:.3f} to {most:.3f}",
            "counts": ", ".join(counts),
            "x": (mean - low) * scale,
            "low": ((mean if least is None else least) - low) * scale,
            "high": ((mean if most is None else most) - low) * scale,
        }

    change = verdict = None
    if before and after:
        change = float(after["mean"]) - float(before["mean"])
        edges = [
            finite(r.get(k))
            for r, k in ((before, "high"), (after, "low"), (before, "low"), (after, "high"))
        ]
        if None not in edges:
            apart = edges[0] < edges[1] or edges[3] < edges[2]  # type: ignore[operator]
            verdict = "The intervals do not overlap." if apart else "The intervals overlap."
    return {
        "bars": [bar(name, result) for name, result in rows],
        "change": None if change is None else f"{change:+.3f}".replace("-", "−"),
        "rising": change is not None and change > 0,
        "verdict": verdict,
        "scale": [
            (round((t - low) * scale, 2), label(t, 0.25)) for t in charting.nice_ticks(low, high)
        ],
    }


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """The numbers beside the headline."""
    metrics, summary = record.metrics, record.summary
    facts = [("steps", f"{metrics[-1]['step']:,}" if metrics else "0")]
    seconds = finite(summary.get("seconds"))
    if seconds is None and metrics:
        seconds = sum(finite(m.get("seconds")) or 0.0 for m in metrics) or None
    if seconds is not None:
        facts.append(("time", duration(seconds)))
    per_step = [y for m in metrics if (y := finite(m.get("seconds"))) is not None]
    if per_step:
        facts.append(("median step", duration(statistics.median(per_step))))
    speed = finite(summary.get("tokens_per_second"))
    if speed is None:
        speeds = [y for m in metrics if (y := finite(m.get("tokens_per_second"))) is not None]
        speed = statistics.median(speeds) if speeds else None
    if speed is not None:
        facts.append(("tokens/s", number(speed, 0)))
    peaks = [y for m in (summary, *metrics) if (y := finite(m.get("peak_rss_mib"))) is not None]
    if peaks:
        facts.append(("peak memory", f"{max(peaks) / 1024:.2f} GiB"))
    sampled = sum(finite(m.get("sampled_tokens")) or 0 for m in metrics)
    if sampled:
        facts.append(("tokens sampled", f"{sampled:,.0f}"))
    return facts


def _checks(record: RunRecord) -> list[tuple[str, str, str, str]]:
    """(kind, name, value, meaning) of what can silently go wrong; kind is ok, note or plain."""
    metrics = record.metrics
    rows: list[tuple[str, str, str, str]] = []

    def column(key: str) -> list[float]:
        return [y for m in metrics if (y := finite(m.get(key))) is not None]

    def add(kind: str, name: str, value: str, meaning: str) -> None:
        rows.append((kind, name, value, meaning))

    def count(name: str, total: float, meaning: str, after: str = "") -> None:
        add("note" if total else "ok", name, f"{total:,.0f}{after}", meaning)

    if nan := column("nan_rewards"):
        count("Rewards without a value", sum(nan), "scoring raised, hung or returned NaN; no loss")
    groups, flat = sum(column("groups")), column("zero_variance_groups")
    if groups and flat:
        share = sum(flat) / groups
        value = f"{sum(flat):,.0f} of {groups:,.0f} ({share:.0%})"
        kind = "note" if share > 0.5 else "plain"
        add(kind, "Zero-variance groups", value, "all completions scored alike: nothing to learn")
    if truncated := column("truncated_share"):
        late = statistics.fmean(truncated[-10:])
        value = f"{statistics.fmean(truncated):.1%}, last 10 steps {late:.1%}"
        kind = "note" if late > 0.5 else "plain"
        add(kind, "Truncated completions", value, "ended by the length limit")
    if canary := column("canary_max_diff"):
        worst = max(canary)
        at = next(m["step"] for m in metrics if finite(m.get("canary_max_diff")) == worst)
        meaning = "largest log-prob difference of the canary after a sync"
        add("plain", "Engine against trainer", f"{worst:.1e} at step {at:,}", meaning)
    if skipped := column("skipped_tokens"):
        count("Tokens skipped", sum(skipped), "left out of the loss")
    if done := [m for m in metrics if "loss" in m and m.get("tokens") != 0]:  # 0: no update
        lost = [m["step"] for m in done if finite(m["loss"]) is None]
        after = f", first at step {lost[0]:,}" if lost else ""
        count("Steps without a finite loss", len(lost), "NaN or infinite", after)
    if metrics:
        missing = metrics[-1]["step"] - metrics[0]["step"] + 1 - len(metrics)
        count("Steps missing", missing, "between the first and last of metrics.jsonl")
    for name, lines in record.unreadable.items():
        where = "the whole file" if lines == [0] else f"line {', '.join(map(str, lines[:5]))}"
        add("note", f"Unreadable in {name}", where, "not a JSON object; left out")
    return rows


def _prompts(record: RunRecord) -> list[dict[str, Any]]:
    """Held-out prompts in the file's order (not by how well they turned out), each with its
    completions before and after training; of several evaluations, the first and the last."""
    low, high = reward_range(record.samples)
    edge = {"before": min, "after": max}
    chosen: dict[str, list[dict[str, Any]]] = {}
    for phase, pick in edge.items():
        samples = [s for s in record.samples if s.get("phase") == phase]
        step = pick((finite(s.get("step")) or 0.0 for s in samples), default=0.0)
        chosen[phase] = [s for s in samples if (finite(s.get("step")) or 0.0) == step]
    ids = dict.fromkeys(s.get("prompt_id") for phase in edge for s in chosen[phase])
    out = []
    for identity in list(ids)[:MAX_PROMPTS]:
        entry: dict[str, Any] = {"id": safe_text(identity, 80), "sides": []}
        means: list[float | None] = []
        for phase in (phase for phase in edge if chosen[phase]):
            own = [s for s in chosen[phase] if s.get("prompt_id") == identity]
            rewards = [y for s in own if (y := finite(s.get("reward"))) is not None]
            means.append(statistics.fmean(rewards) if rewards else None)
            if own:
                entry.setdefault("prompt", prompt_text(own[0].get("prompt")))
            entry["sides"].append(
                {
                    "name": phase,
                    "mean": None if means[-1] is None else label(means[-1]),
                    "samples": [sample_view(s, low, high) for s in own[:MAX_SAMPLES]],
                    "more": max(0, len(own) - MAX_SAMPLES),
                }
            )
        before, after = means[0], means[-1]
        if len(means) < 2 or before is None or after is None:
            entry["change"] = "unknown"
        else:
            entry["change"] = "better" if after > before else "worse" if after < before else "same"
        out.append(entry)
    return out


def _training_samples(record: RunRecord) -> list[dict[str, Any]]:
    """Some of the training samples, evenly spread over the run."""
    samples = [s for s in record.samples if s.get("phase") == "train"]
    count = min(len(samples), MAX_TRAINING_SAMPLES)
    low, high = reward_range(record.samples)
    spread = sorted({round(i * (len(samples) - 1) / max(1, count - 1)) for i in range(count)})
    return [
        {**sample_view(samples[i], low, high), "prompt": prompt_text(samples[i].get("prompt"))}
        for i in spread
    ]


def _table(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The curves' numbers as a table, for readers who cannot or would not read a chart."""
    keys = [k for k in TABLE if any(finite(m.get(k)) is not None for m in metrics)]
    stride = max(1, -(-len(metrics) // MAX_TABLE_ROWS))
    rows = [*metrics[::stride]]
    if metrics and rows[-1] is not metrics[-1]:
        rows.append(metrics[-1])
    return {
        "keys": keys,
        "stride": stride,
        "rows": [(f"{m['step']:,}", [number(m.get(k)) for k in keys]) for m in rows],
    }


def _provenance(record: RunRecord) -> list[tuple[str, str]]:
    """Where the figures come from."""
    summary = record.summary
    rows = [
        (k, summary[k])
        for k in ("model", "task", "seed", "commit", "machine")
        if summary.get(k) is not None
    ]
    versions = summary.get("versions")
    if isinstance(versions, dict):
        rows += [(name, version) for name, version in versions.items() if version]
    resumed = summary.get("resumed")
    if isinstance(resumed, list) and resumed:
        rows.append(("resumed after step", ", ".join(str(step) for step in resumed)))
    metrics = record.path / "metrics.jsonl"
    if metrics.exists():
        when = datetime.datetime.fromtimestamp(metrics.stat().st_mtime, datetime.timezone.utc)
        rows.append(("last step written", f"{when:%Y-%m-%d %H:%M} UTC"))
    return [(safe_text(name), safe_text(value, 200)) for name, value in rows]
