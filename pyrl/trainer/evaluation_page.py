"""What `pyrl eval --out DIR` leaves: eval.json, samples.jsonl and eval.html to read and share.

eval.html is one file that asks the network for nothing, in the style of report.html.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrl.algorithms import Group
from pyrl.trainer import evaluation_views as views
from pyrl.trainer import html
from pyrl.trainer.charts import label, nice_ticks
from pyrl.trainer.console import duration, number
from pyrl.trainer.evaluate import Evaluation
from pyrl.trainer.evaluation_run import remarks
from pyrl.trainer.html import safe_text
from pyrl.trainer.samples_view import prompt_text, reward_range, sample_view
from pyrl.trainer.tracking import encode, plain, provenance, write_atomic

EXTREMES = 3
IN_ORDER = 20
MAX_SAMPLES = 4
#: Domains drawn as curves: as many as there are colours that tell apart.
CURVES = 8


def as_json(found: Evaluation, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """One object: model, task, the result's keys, `conditions`, `details`; None for NaN."""
    head = {"model": conditions["model"], "task": conditions["task"]}
    whole = {**head, **found.result, "conditions": conditions, "details": found.details}
    return dict(plain(whole))


def write_evaluation(folder: Path, found: Evaluation, conditions: Mapping[str, Any]) -> Path:
    """Writes the three files into `folder`, made if need be; returns the path of eval.html."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = provenance()
    whole = {**as_json(found, conditions), **origin}
    write_atomic(folder / "eval.json", encode(whole, indent=2))
    lines = [encode(row) for row in sample_rows(found)]
    write_atomic(folder / "samples.jsonl", b"".join(lines))
    page = html.render_page(_page(found, conditions, origin), "evaluation.html")
    write_atomic(folder / "eval.html", page.encode("utf-8", "replace"))
    return folder / "eval.html"


def sample_rows(found: Evaluation) -> list[dict[str, Any]]:
    """One object a completion, prompt by prompt."""
    return [row for i in range(len(found.groups)) for row in _rows(found, i)]


def _rows(found: Evaluation, i: int) -> list[dict[str, Any]]:
    group = found.groups[i]
    return [
        {
            "prompt_id": group.prompt_id,
            **({"domain": group.domain} if group.domain else {}),
            "prompt": group.prompt_text,
            "completion": attempt.text,
            "reward": attempt.reward,
            "tokens": len(attempt.tokens),
            "finish_reason": attempt.finish_reason,
            **({"answer": found.answers[i][j]} if found.answers else {}),
            **({"error": attempt.error} if attempt.error else {}),
        }
        for j, attempt in enumerate(group.attempts)
    ]


def _page(
    found: Evaluation, conditions: Mapping[str, Any], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything page/evaluation.html shows."""
    details = found.details
    ks, votes = views.powers_of(details, "pass"), views.powers_of(details, "majority")
    facts = [
        ("prompts", f"{conditions['prompts']:,}"),
        ("samples a prompt", f"{conditions['samples_per_prompt']:,}"),
        ("temperature", f"{conditions['temperature']:g}"),
        ("token limit", f"{conditions['max_new_tokens']:,}"),
        ("seed", str(conditions["seed"])),
        ("time", duration(conditions["seconds"])),
        ("tokens/s", number(conditions["tokens_per_second"], 0)),
    ]
    versions = origin.get("versions") or {}
    rows = {**conditions, **{k: origin[k] for k in ("commit", "machine")}, **versions}
    return {
        "title": safe_text(f"{conditions['model']} on {conditions['task']}"),
        "headline": _headline(details),
        "k": details["ks"][-1],
        "success": label(details["success"]),
        "facts": facts,
        "remarks": remarks(found),
        "tables": _tables(details, ks, votes),
        "blended": _blended(details),
        "charts": _charts(found, ks),
        "extremes": _extremes(found),
        "in_order": [_entry(found, i, False) for i in range(min(len(found.groups), IN_ORDER))],
        "all_prompts": len(found.groups),
        "titles": {"best": "Best completion", "worst": "Worst completion", "all": "Completions"},
        "origin": [
            (safe_text(name.replace("_", " ")), safe_text(_shown(value), 200))
            for name, value in rows.items()
            if value is not None and value != {}
        ],
    }


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _headline(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """avg@n on a scale; None when nothing was scored."""
    overall = details["overall"]
    if overall["mean"] is None:
        return None
    ends = [overall[key] for key in ("mean", "low", "high")]
    # Rewards are usually shares: the scale is 0 to 1 unless they leave it.
    low, high = min(0.0, *ends), max(1.0, *ends)
    scale = 100 / (high - low)
    counts = f"{overall['prompts']:,} prompts, {overall['samples']:,} samples"
    return {
        "mean": views.number(overall["mean"]),
        "range": f"{views.span(overall)} · {counts}",
        "x": (overall["mean"] - low) * scale,
        "low": (overall["low"] - low) * scale,
        "high": (overall["high"] - low) * scale,
        "scale": [(round((t - low) * scale, 2), label(t, 0.25)) for t in nice_ticks(low, high)],
    }


def _tables(
    details: Mapping[str, Any], ks: Sequence[str], votes: Sequence[str]
) -> list[dict[str, Any]]:
    """One table a subject, with a row for the whole and one for every domain: narrow enough each
    to be read without scrolling sideways on most screens."""
    whole, *domains = views.domain_rows(details)
    n, shown = ks[-1], views.number

    subjects: list[tuple[str, list[str], Any]] = [
        (
            "Reward",
            [f"avg@{n}", "std between samples", "prompts", "samples", "lost"],
            lambda t: [
                (shown(t["mean"]), views.span(t)),
                (shown(t["std"]), ""),
                (shown(t["prompts"], 0), ""),
                (shown(t["samples"], 0), ""),
                (shown(t["lost"], 0), f"{t['lost_prompts']} prompts" if t["lost_prompts"] else ""),
            ],
        ),
        (
            "Success",
            [f"pass@{k}" for k in ks],
            lambda t: [views.estimate(t, "pass", k) for k in ks],
        ),
        (
            "Majority",
            [f"maj@{k}" for k in votes if k != "1"] + ["with an answer"] if votes else [],
            lambda t: (
                [views.estimate(t, "majority", k) for k in votes if k != "1"]
                + [(views.percent(t["answered"]), "")]
            ),
        ),
        (
            "Prompts solved",
            ["never", "sometimes", "always"],
            lambda t: [
                (views.percent(t["solved"][k]), "") for k in ("never", "sometimes", "always")
            ],
        ),
        (
            "Length and format",
            ["mean tokens", "median", "90%", "max", "truncated", "empty"],
            lambda t: [
                (shown(views.look(t, "length", "mean"), 1), ""),
                *((shown(views.look(t, "length", k), 0), "") for k in ("p50", "p90", "max")),
                (views.percent(t["truncated"]), ""),
                (views.percent(t["empty"]), ""),
            ],
        ),
    ]
    return [
        {
            "title": title,
            "heads": heads,
            "rows": [(kind if domains else "", name, cells(table))
                     for kind, name, table in (whole, *domains)],
        }
        for title, heads, cells in subjects
        if heads
    ]  # fmt: skip


def _blended(details: Mapping[str, Any]) -> str | None:
    """The weighted mean of the domains in words; None without domains."""
    if not details["domains"]:
        return None
    blended = details["blended"]
    weights = ", ".join(
        f"{safe_text(name, 60) or '(no domain)'} {share:.2f}"
        for name, share in blended["weights"].items()
    )
    around = views.span(blended)
    return f"{views.number(blended['mean'])}{f' ({around})' if around else ''}, weights {weights}"


def _charts(found: Evaluation, ks: Sequence[str]) -> dict[str, list[Any]]:
    details = found.details
    overall, domains = details["overall"], details["domains"]
    lines = [("pass@k", "s0", overall["pass"]), ("maj@k", "s1", overall["majority"] or {})]
    title = "pass@k and maj@k" if overall["majority"] else "pass@k"
    drawn = [views.curves(title, "over k; means and 95% intervals", lines)]
    if len(domains) > 1:
        own = [
            (safe_text(name, 40) or "(no domain)", f"s{i}", _means(table["pass"]))
            for i, (name, table) in enumerate(list(domains.items())[:CURVES])
        ]
        note = (
            f"over k; the first {CURVES} of {len(domains)}"
            if len(domains) > CURVES
            else "over k; means"
        )
        drawn.append(views.curves("pass@k by domain", note, own))
    attempts = [a for group in found.groups for a in group.attempts]
    ended = [len(a.tokens) for a in attempts if a.finish_reason != "length"]
    cut = [len(a.tokens) for a in attempts if a.finish_reason == "length"]
    shares = [("ended", "s0", ended), ("cut off", "s1", cut)]
    rewards = [("completions", "s2", [a.reward for a in attempts])]
    counts = [
        views.histogram("Completion length", "tokens; completions each", shares),
        views.histogram("Reward", "completions each", rewards),
    ]
    return {"curves": [c for c in drawn if c], "histograms": [c for c in counts if c]}


def _means(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Without intervals: those of several lines would hide one another."""
    return {k: {"mean": views.look(entry, "mean")} for k, entry in entries.items()}


def _mean(group: Group) -> float:
    """NaN without a scored completion."""
    scored = [a.reward for a in group.attempts if not math.isnan(a.reward)]
    return sum(scored) / len(scored) if scored else math.nan


def _extremes(found: Evaluation) -> list[tuple[str, list[dict[str, Any]]]]:
    """The prompts with the highest and the lowest mean reward; a prompt is in one list only."""
    means = [_mean(group) for group in found.groups]
    order = sorted((i for i in range(len(means)) if not math.isnan(means[i])),
                   key=lambda i: (-means[i], i))  # fmt: skip
    count = min(EXTREMES, len(order) // 2)
    parts = (("Highest mean reward", order[:count]), ("Lowest mean reward", order[::-1][:count]))
    return [(title, [_entry(found, i, True) for i in chosen]) for title, chosen in parts if chosen]


def _entry(found: Evaluation, i: int, ends: bool) -> dict[str, Any]:
    """A prompt's card: its best and worst completion, or the first ones in their order."""
    group, rows = found.groups[i], _rows(found, i)
    low, high = reward_range([{"reward": a.reward} for g in found.groups for a in g.attempts])
    mean = _mean(group)
    words = [safe_text(group.prompt_id, 80), safe_text(group.domain, 40)]
    words.append("" if math.isnan(mean) else f"mean {label(mean)}")
    ranked = sorted((r for r in rows if not math.isnan(r["reward"])), key=lambda r: -r["reward"])
    if ends and len(ranked) > 1:
        chosen = [("best", ranked[:1], 0), ("worst", ranked[-1:], 0)]
    else:
        chosen = [("all", rows[:MAX_SAMPLES], max(0, len(rows) - MAX_SAMPLES))]
    return {
        "id": " · ".join(word for word in words if word),
        "change": "",
        "prompt": prompt_text(group.prompt_text),
        "sides": [
            {
                "name": name,
                "mean": None,
                "samples": [sample_view(row, low, high) for row in some],
                "more": more,
            }
            for name, some, more in chosen
        ],
    }
