"""`pyrl puzzles`: a file of puzzles, checked, and what is in it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyrl.tasks.temporal_clue.store import Record, read
from pyrl.tasks.temporal_clue.write import Progress, part_file, write

if TYPE_CHECKING:
    from rich.console import Console

SUMMARY = "Make Temporal Clue puzzles: a JSONL file for the task temporal_clue."
USAGE = (
    "--count N --out FILE [--seed S] [--level L] [--workers W] [--deadline SECONDS]\n"
    "                    [--verify K] [--report DIR]"
)
MORE = """The first N different puzzles of the seeds S, S + 1, …; the same ones for any number of
workers. Ctrl-C keeps what is done, and the same command goes on from there.
Exit status 1 when a verified puzzle has not exactly one solution or has a clue too many."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags; `run` checks their values."""
    parser.add_argument("--count", required=True, metavar="N", help="how many puzzles")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the JSONL file")
    parser.add_argument("--seed", default="0", metavar="S", help="the first seed (default: 0)")
    parser.add_argument(
        "--level", default="published", metavar="L",
        help="mini, 2x2, easy, medium, hard, published: sizes as in the published sets (default)",
    )  # fmt: skip
    parser.add_argument("--workers", default="1", metavar="W", help="processes (default: 1)")
    parser.add_argument(
        "--deadline", default="300", metavar="SECONDS",
        help="a seed that takes longer is skipped and counted (default: 300)",
    )  # fmt: skip
    parser.add_argument(
        "--verify", default="0", metavar="K",
        help="check K of the puzzles, evenly chosen, with a second, independent model",
    )  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="DIR", help="folder for difficulty.*")


def run(args: argparse.Namespace) -> int:
    """Writes, verifies, reports; the exit status."""
    from rich.console import Console

    from pyrl.tasks.temporal_clue.generate import LEVELS

    count, seed = _whole("count", args.count, 1), _whole("seed", args.seed, 0)
    workers, checks = _whole("workers", args.workers, 1), _whole("verify", args.verify, 0)
    deadline = _seconds("deadline", args.deadline)
    if args.level not in LEVELS:
        raise ValueError(f"--level {args.level}: expected one of {', '.join(LEVELS)}")
    if checks > count:
        raise ValueError(f"--verify {checks}: there are only {count} puzzles (--count)")
    if args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a folder")
    if args.report is not None:
        if args.report.exists() and not args.report.is_dir():
            raise ValueError(f"--report {args.report}: is no folder")
        args.report.mkdir(parents=True, exist_ok=True)  # not after the work
    messages, out = Console(stderr=True, highlight=False), Console(highlight=False)
    try:
        progress = _written(
            messages, args.out, count, seed=seed, level=args.level, workers=workers,
            deadline=deadline,
        )  # fmt: skip
    except KeyboardInterrupt:
        part = part_file(args.out, seed, args.level)
        done = f"what is done is in {part}; the same command goes on from there"
        if part.is_file() and not part.stat().st_size:
            part.unlink()
            done = "no puzzle was made yet"
        messages.print(done, soft_wrap=True)
        raise
    records = read(args.out)
    _print_summary(out, records, progress, args.out)
    wrong = _verified(messages, out, records, checks)
    if args.report is not None:
        from pyrl.tasks.temporal_clue.report import write_report

        out.print(f"report: {write_report(records, args.report)[-1].parent}", soft_wrap=True)
    return 1 if wrong else 0


def _whole(flag: str, text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ValueError(f"--{flag} {text}: expected a whole number, at least {least}")
    return number


def _seconds(flag: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ValueError(f"--{flag} {text}: expected seconds > 0")
    return number


def _written(
    console: Console, path: Path, count: int, *, seed: int, level: str, workers: int,
    deadline: float,
) -> Progress:  # fmt: skip
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("puzzles"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=console, transient=True) as bar:
        job = bar.add_task("", total=count, rate="")

        def seen(now: Progress) -> None:
            rate = (now.puzzles - now.resumed) / max(now.seconds, 1e-9)
            text = f"{rate:.2f}/s, {now.mean_seconds:.2f} s each"
            skipped = now.failed + now.late + now.repeated
            text += f", {skipped} seeds skipped" if skipped else ""
            bar.update(job, completed=now.puzzles, rate=text)

        return write(
            path, count, seed=seed, level=level, workers=workers, deadline=deadline, seen=seen
        )


def _print_summary(
    console: Console, records: Sequence[Record], progress: Progress, path: Path
) -> None:
    from rich.table import Table

    from pyrl.tasks.temporal_clue.report import COUNTS, figures, published

    found, theirs = figures(records), published(records)
    table = Table(title=f"{len(records):,} puzzles, level {records[0].level}", title_justify="left")
    names = ("a puzzle", "mean", "least", "greatest", "published mean")
    for name in names if theirs else names[:-1]:
        table.add_column(name, justify="left" if name == "a puzzle" else "right")
    for name in COUNTS:
        row = found[name]
        table.add_row(
            name, f"{row['mean']:,.1f}", f"{row['least']:,}", f"{row['greatest']:,}",
            *([f"{theirs[name]:,g}"] if theirs else []),
        )  # fmt: skip
    table.add_row("perfect sheet", f"{found['perfect']:.3f}")
    public = [str(theirs["legacy"])] if theirs else []
    table.add_row("by the public scorer", f"{found['legacy']:.3f}", "", "", *public)
    console.print(table)
    new = progress.puzzles - progress.resumed
    line = f"{new:,} made in {progress.seconds:.1f} s"
    if new:
        line += f", {progress.mean_seconds:.2f} s of a process each"
    if progress.resumed:
        line += f"; {progress.resumed:,} were there"
    parts = [
        f"{number} {what}"
        for number, what in (
            (progress.failed, "without a puzzle"),
            (progress.late, "too slow"),
            (progress.repeated, "repeated"),
        )
        if number
    ]
    console.print(f"{line}; seeds skipped: {', '.join(parts) or 'none'}")
    console.print(str(path), soft_wrap=True)


def _verified(messages: Console, out: Console, records: Sequence[Record], checks: int) -> int:
    """Prints what the second model says of some of the puzzles; how many are not as they should."""
    if not checks:
        return 0
    from rich.progress import track

    from pyrl.tasks.temporal_clue.verify import verify

    chosen = [records[i * len(records) // checks] for i in range(checks)]
    unique = irredundant = 0
    for record in track(chosen, "verifying", console=messages, transient=True):
        verdict = verify(record.puzzle())
        unique += verdict.true and verdict.unique
        irredundant += verdict.irredundant
        if not (verdict.true and verdict.unique and verdict.irredundant):
            extra = [i + 1 for i, needed in enumerate(verdict.needed) if not needed]
            messages.print(
                f"seed {record.seed}: true {verdict.true}, unique {verdict.unique}, "
                f"clues not needed: {extra or 'none'}"
            )
    out.print(f"verified {checks}: unique {unique}, irredundant {irredundant}")
    return checks - min(unique, irredundant)
