"""The report's section on held-out evaluations: evaluations.jsonl, before beside after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyrl.trainer import evaluation_views as views
from pyrl.trainer.charts import finite
from pyrl.trainer.html import safe_text


def view(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the template shows: the first and the last evaluation ("before", and "after" or the
    newest there is); None when there is none that has a number."""
    usable = [e for e in evaluations if finite(views.look(e, "details", "overall", "mean"))
              is not None]  # fmt: skip
    if not usable:
        return None
    before = [e for e in usable if e.get("label") == "before"][-1:]
    others = [e for e in usable if e.get("label") != "before"]
    chosen = before + others[-1:]
    details = [e["details"] for e in chosen]
    names = [safe_text(e.get("label", ""), 40) or "evaluation" for e in chosen]
    ks = sorted({k for d in details for k in views.powers_of(d, "pass")}, key=int)
    votes = sorted({k for d in details for k in views.powers_of(d, "majority")}, key=int)

    # The curve has those in between.
    ends = [k for k in ks if k in (ks[0], ks[-1])]
    tables = [views.rows(views.look(d, "overall"), ends, votes[-1:]) for d in details]
    titles = list(dict.fromkeys(name for table in tables for name, _, _ in table))
    by_name = [{name: (text, span) for name, text, span in table} for table in tables]
    blank = (views.MISSING, "")
    overall = [(title, [table.get(title, blank) for table in by_name]) for title in titles]
    first = sum("@" in title for title in titles)
    parts = [overall[:first], overall[first:]]

    held = [views.look(d, "domains") for d in details]
    domains = list(dict.fromkeys(name for d in held if isinstance(d, Mapping) for name in d))
    if domains:
        own = []
        for name in domains:
            found = [views.look(d, "domains", name) for d in details]
            shown = safe_text(name, 60) or "(no domain)"
            own.append(
                (shown, [(views.number(views.look(t, "mean")), views.span(t)) for t in found])
            )
        blended = [views.look(d, "blended") for d in details]
        own.append(
            ("blended", [(views.number(views.look(b, "mean")), views.span(b)) for b in blended])
        )
        parts.insert(1, own)

    colours = ["s5", "s0"] if len(chosen) > 1 else ["s0"]
    lines = [
        (name, colour, views.look(d, "overall", "pass") or {})
        for name, colour, d in zip(names, colours, details, strict=True)
    ]
    success = finite(views.look(details[-1], "success"))
    least = "" if success is None else f" A success is a reward of at least {success:g}."
    return {
        "names": names,
        "parts": parts,
        "lead": "avg@k: mean reward; pass@k: a success among k samples (unbiased)."
        f"{least} The ranges are 95% bootstrap intervals over prompts.",
        "curves": views.curves("pass@k", "over k; share of prompts", lines),
    }
