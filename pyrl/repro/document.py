"""docs/reproductions.md from saved results: the same for the same files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pyrl.repro.charts import FEW, write_image
from pyrl.repro.claim import Claim, Result, Table, Verdict
from pyrl.repro.registry import MINIATURES
from pyrl.repro.statistics import Estimate, number
from pyrl.trainer.tracking import write_atomic

HEAD = """# Reproductions

What published claims come to at a scale where they can be run in minutes on two CPU cores: each is
stated, measured over seeds, and judged. Written by `pyrl repro` from the results in
`docs/reproductions/*.json`; to run everything again, or one of them:

    make repro
    pyrl repro NAME

**The rule.** A claim is that one arm is above, or below, another (or a number) in a quantity. Arms
share seeds: what is judged is the difference seed by seed, its mean over the seeds and the 95%
interval of Student's t. *Agrees*: the interval excludes 0 in the claimed direction. *Disagrees*: it
excludes 0 in the other. *Undecided*: it does not exclude 0. Each claim is judged by itself: of
twenty true nulls one would be misjudged.

**What this can show.** A miniature can show that a mechanism has the sign that a paper gives it,
where it was set up to act. It says nothing of the size of an effect in a language model, and naive
toys show nothing at all. The regimes follow a written description; where it leaves something open,
other choices are listed beside the one that is judged. These choices were made with figures in
sight: the rule for the step size of `entropy`, on which its order depends, and the second reading
of its regime, after a look at several step sizes; the number of seeds of `gvm-transformer`, after a
look at five seeds that are not used; and the baseline against which both `gvm` miniatures count the
pilot, changed when the figures against another were known. The caveats have the details.
"""


def save(result: Result, folder: Path) -> Path:
    """Writes folder/reproductions/NAME.json; returns its path."""
    path = folder / "reproductions" / f"{result.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.to_dict(), indent=1, ensure_ascii=False)
    # Numbers of a list on one line: a result is read by people too, and compared in reviews.
    text = re.sub(r"\[([\s\d.,eE+-]+)\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    write_atomic(path, (text + "\n").encode())
    return path


def load(folder: Path) -> list[Result]:
    """Every saved result, in the order of the registry, then by name; ValueError names a file."""
    found = {}
    for path in sorted((folder / "reproductions").glob("*.json")):
        try:
            found[path.stem] = Result.from_dict(json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    known = [name for name in MINIATURES if name in found]
    return [found[name] for name in dict.fromkeys([*known, *found])]


def write(folder: Path) -> Path:
    """Writes folder/reproductions.md and folder/images/repro-*.png from the saved results."""
    results = load(folder)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for result in results:
        if result.charts:
            write_image(result, images / f"repro-{result.name}.png")
    path = folder / "reproductions.md"
    write_atomic(path, markdown(results).encode())
    return path


def markdown(results: Sequence[Result]) -> str:
    """The whole document."""
    text = [HEAD, "## Summary\n"]
    text += table(
        ("miniature", "quantity", "claim", "difference, 95% interval", "verdict"),
        (
            (f"[{result.name}](#{_anchor(result)})", *_judged(result, claim))
            for result in results
            for claim in result.claims
            if result.verdict(claim) is not Verdict.REPORTED
        ),
    )
    for result in results:
        text += ["", *_section(result)]
    return "\n".join(text).rstrip() + "\n"


def console_text(result: Result) -> str:
    """What the terminal shows of a result."""
    lines = [f"{result.name}: {result.title} ({result.paper})", f"  published: {result.published}"]
    for quantity in dict.fromkeys(arm.quantity for arm in result.arms):
        lines.append(f"  {quantity}")
        lines += [
            f"    {arm.name:<44} {number(arm.estimate.mean)}  {interval(arm.estimate)}"
            f"  {arm.estimate.seeds} seeds"
            for arm in result.arms
            if arm.quantity == quantity
        ]
    for claim in result.claims:
        quantity, text, difference, verdict = _judged(result, claim)
        lines.append(f"  {verdict.replace('*', '').upper():<10} {quantity}: {text}: {difference}")
    lines.append(f"  {_conditions(result)}")
    return "\n".join(lines)


def _section(result: Result) -> list[str]:
    lines = [f"## {result.title}\n", f"`pyrl repro {result.name}` · {result.paper}\n"]
    for label, text in (
        ("Published", result.published),
        ("Run", result.regime),
        ("Figure", result.figure),
    ):
        if text:
            lines.append(f"**{label}.** {text}\n")
    if result.claims:
        lines += table(
            ("quantity", "claim", "difference, 95% interval", "verdict"),
            (_judged(result, claim) for claim in result.claims),
        )
        lines.append("")
    images = [f"images/repro-{result.name}.png"] if result.charts else []
    for image in images + result.images:
        lines.append(f"![{result.title}]({image})\n")
    if result.charts:
        lines.append(
            "Lines and diamonds are means over seeds, bands and bars their intervals; with fewer "
            f"than {FEW} seeds each has a thin line.\n"
        )
    if result.arms:
        quantities = list(dict.fromkeys(arm.quantity for arm in result.arms))
        rows = (
            (arm.quantity, arm.name, number(arm.estimate.mean), interval(arm.estimate))
            for arm in sorted(result.arms, key=lambda arm: quantities.index(arm.quantity))
        )
        lines += table(("quantity", "arm", "mean", "95% interval"), rows)
        lines.append("")
    for each in result.tables:
        lines += _table(each)
    if result.text:
        lines.append(result.text.strip() + "\n")
    if result.caveats:
        lines += ["**Caveats.**\n", *(f"- {caveat}" for caveat in result.caveats), ""]
    lines.append(f"*{_conditions(result)}*")
    return lines


def _table(each: Table) -> list[str]:
    lines = [f"**{each.title}.** {each.note}".rstrip() + "\n"]
    return [*lines, *table(each.columns, each.rows), ""]


def _judged(result: Result, claim: Claim) -> tuple[str, str, str, str]:
    difference = result.difference(claim)
    verdict = result.verdict(claim)
    word = f"**{verdict.value}**" if verdict is not Verdict.REPORTED else "reported"
    if result.conditions.get("quick"):
        word = "not judged"  # sizes at which nothing is shown
    text = claim.text + (f" ({claim.note})" if claim.note else "")
    return claim.quantity, text, f"{number(difference.mean)} {interval(difference)}", word


def _conditions(result: Result) -> str:
    """Seeds, seconds, commit and versions, as far as they are known."""
    found = result.conditions
    parts = []
    if "seeds" in found:
        parts.append(f"{found['seeds']} seed{'s' * (found['seeds'] != 1)}")
    if found.get("quick"):
        parts.append("QUICK: the code ran, nothing more")
    if "seconds" in found:
        parts.append(f"{found['seconds']:.0f} s {found.get('threads', 'on one thread')}")
    commits = found.get("commit") or []  # several, of a result that read other runs
    for each in [commits] if isinstance(commits, str) else commits:
        commit, plus, _ = each.partition("+")
        parts.append(f"commit {commit[:12]}{' and changes' if plus else ''}")
    versions = found.get("versions", {})
    parts += [f"{key} {versions[key]}" for key in ("python", "torch", "numpy") if key in versions]
    return " · ".join(parts) or "conditions unknown"


def _anchor(result: Result) -> str:
    """As GitHub makes them: lower case, no punctuation, dashes for spaces."""
    return re.sub(r"[^\w\- ]", "", result.title.lower()).replace(" ", "-")


def interval(estimate: Estimate) -> str:
    """[low, high]."""
    return f"[{number(estimate.low)}, {number(estimate.high)}]"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; bars in cells are escaped."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return lines
