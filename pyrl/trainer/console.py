"""What a run says while it works.

On a terminal: aligned rows, one a step, above a live line (phase, progress, reward trend, ETA).
Anywhere else (a pipe, a CI log, TERM=dumb): the same facts as one plain line a step, without a
control code. Nothing here imports torch or changes a number.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

HEADER_EVERY = 25
#: Steps whose median time the ETA rests on: recent, because completions change length.
ETA_WINDOW = 10
MISSING = "-"
SPARKS = "▁▂▃▄▅▆▇█"

#: (metrics key, heading, width, style) of a row, in order of importance: a narrow terminal shows
#: the first that fit.
COLUMNS = (
    ("reward_mean", "reward", 7, "bold"),
    ("kl", "kl", 8, ""),
    ("entropy", "entropy", 7, ""),
    ("loss", "loss", 8, ""),
    ("seconds", "time", 6, ""),
    ("tokens_per_second", "tok/s", 7, ""),
    ("completion_length_mean", "length", 6, ""),
    ("grad_norm", "grad", 8, ""),
)


def number(value: Any, digits: int = 3) -> str:
    """Short and steady: fixed point where that reads well, exponents where it would hide digits."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return MISSING if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if isinstance(value, int):
        return f"{value:,}"
    if size != 0 and (size < 10**-digits or size >= 1e6):
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits if size < 100 else 1}f}"


def duration(seconds: Any) -> str:
    """`4.1s`, `3m 05s`, `2h 07m`."""
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"


def sparkline(values: list[float]) -> str:
    """One bar a value, scaled between the least and the greatest."""
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in values)


def evaluation_text(result: Mapping[str, Any], details: Mapping[str, Any] | None = None) -> str:
    """`0.312 [0.251, 0.374] on 64 prompts, 256 samples`, with what `result` has of it; after it
    what `details` say of the greatest k: `, pass@4 0.580, maj@4 0.400`, and the domains' means.
    `no sample has a reward` where every one was lost."""
    mean = result.get("mean")
    if mean is not None and math.isnan(mean):
        return f"no sample has a reward: {number(result.get('nan_rewards'))} lost"
    text = number(mean)
    if result.get("low") is not None and result.get("high") is not None:
        text += f" [{number(result['low'])}, {number(result['high'])}]"
    counts = [f"{result[k]:,} {k}" for k in ("prompts", "samples") if result.get(k) is not None]
    text = f"{text} on {', '.join(counts)}" if counts else text
    if details:
        k = str(details["ks"][-1])
        for name, what in (("pass", "pass"), ("maj", "majority")):
            if k != "1" and details["overall"][what]:
                text += f", {name}@{k} {number(details['overall'][what][k]['mean'])}"
        means = [f"{name or '-'} {number(t['mean'])}" for name, t in details["domains"].items()]
        text += f" ({', '.join(means)})" if means else ""
    return text


def warnings(metrics: Mapping[str, Any]) -> list[str]:
    """What in a step's metrics deserves a second look, in words."""
    found = []
    if metrics.get("nan_rewards"):
        found.append(f"rewards without a value: {number(metrics['nan_rewards'])}")
    groups, flat = metrics.get("groups"), metrics.get("zero_variance_groups")
    if groups and flat is not None and flat >= groups and not metrics.get("updates"):
        found.append("every group has equal rewards: no gradient")
    if (metrics.get("truncated_share") or 0) > 0.5:
        found.append(f"{metrics['truncated_share']:.0%} of completions truncated")
    if metrics.get("skipped_tokens"):
        found.append(f"tokens skipped: {number(metrics['skipped_tokens'])}")
    # None: the step had no update, and so no loss.
    if metrics.get("loss") is not None and not math.isfinite(metrics["loss"]):
        found.append("the loss is not finite")
    return found


def phases(metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(name, seconds) of the step's phases, in the order they were recorded."""
    prefix = "seconds_"
    return [
        (key[len(prefix) :], value)
        for key, value in metrics.items()
        if key.startswith(prefix)
        and isinstance(value, (int, float))
        and (value or key != "seconds_pilot")  # most runs have none
    ]


class Console:
    """Context manager around a run of `total_steps` steps.

        with Console(total_steps) as console:
            console.banner({"model": ..., "task": ...})
            console.evaluation("before", result)
            for ...: console.phase("sample"); ...; console.step(metrics)
            console.finish(summary)

    `quiet` prints only `message`s. `rich_console` is where it prints (default: standard output).
    """

    def __init__(
        self, total_steps: int, quiet: bool = False, *, rich_console: RichConsole | None = None
    ) -> None:
        self.total_steps = total_steps
        self.quiet = quiet
        self._out = rich_console or RichConsole(highlight=False)
        self._interactive = self._out.is_terminal and not self._out.is_dumb_terminal
        self._unicode = self._out.encoding.lower().startswith("utf")
        self._live: Live | None = None
        self._done = 0
        self._rows = 0
        self._phase = "starting"
        self._seconds: deque[float] = deque(maxlen=ETA_WINDOW)
        self._rewards: deque[float] = deque(maxlen=24)
        self._before: float | None = None

    def __enter__(self) -> Console:
        if self._interactive and not self.quiet:
            # Twice a second is enough to look alive and too little to slow the step being watched.
            self._live = Live(
                console=self._out,
                get_renderable=self._status,
                refresh_per_second=2,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def banner(self, settings: Mapping[str, Any]) -> None:
        """The run's headline settings."""
        shown = {key: str(value) for key, value in settings.items() if value is not None}
        if self.quiet or not shown:
            return
        if not self._interactive:
            width = max(map(len, shown))
            for key, value in shown.items():
                self._line(f"{key:<{width}}  {value}")
            return
        columns = 2 if self._out.width >= 100 and len(shown) > 4 else 1
        self._print(self._panel(shown, "pyrl train", "cyan", columns))

    def evaluation(
        self, label: str, result: Mapping[str, Any], details: Mapping[str, Any] | None = None
    ) -> None:
        """A held-out evaluation: mean, interval, counts, and the change since the first one."""
        mean = result.get("mean")
        if not self.quiet:
            text = Text.assemble((f"held-out {label}  ", "bold"), evaluation_text(result, details))
            if self._before is not None and mean is not None:
                change = mean - self._before
                text.append(f"  ({change:+.3f})", "bold green" if change > 0 else "bold yellow")
            self._line(text)
        if self._before is None:
            self._before = mean

    def phase(self, name: str) -> None:
        """Names what the run is doing now; seen on the live line only."""
        self._phase = name

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A finished step: `metrics` as in metrics.jsonl; keys that are missing show as `-`."""
        self._done = int(metrics.get("step", self._done + 1))
        if metrics.get("seconds") is not None:
            self._seconds.append(float(metrics["seconds"]))
        reward = metrics.get("reward_mean")
        if reward is not None and math.isfinite(reward):
            self._rewards.append(float(reward))
        if self.quiet:
            return
        if self._interactive:
            self._row(metrics)
        else:
            self._line(self._plain_step(metrics))

    def message(self, text: str) -> None:
        """A sentence for the user; printed even when quiet."""
        self._line(Text(text, style="yellow"))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run's outcome, from what summary.json holds."""
        self._phase = "done"
        if self.quiet:
            return
        before, after = summary.get("heldout_before") or {}, summary.get("heldout_after") or {}
        rows: dict[str, str] = {}
        for label, result in (("before", before), ("after", after)):
            if result:
                rows[f"held-out {label}"] = evaluation_text(result)
        if before.get("mean") is not None and after.get("mean") is not None:
            rows["change"] = f"{after['mean'] - before['mean']:+.3f}"
        if summary.get("steps") is not None:
            rows["steps"] = f"{summary['steps']:,} in {duration(summary.get('seconds'))}"
        parts = dict(summary.get("seconds_by_phase") or {})
        if not parts.get("pilot", True):
            del parts["pilot"]
        if parts:
            rows["time"] = ", ".join(f"{name} {duration(value)}" for name, value in parts.items())
        if summary.get("tokens_per_second") is not None:
            rows["speed"] = f"{number(summary['tokens_per_second'])} tokens/s"
        if summary.get("peak_rss_mib") is not None:
            rows["peak memory"] = f"{summary['peak_rss_mib'] / 1024:.2f} GiB"
        for key in ("run", "report", "model_path"):
            if summary.get(key):
                rows[key.removesuffix("_path")] = str(summary[key])
        if not self._interactive:
            width = max((len(key) for key in rows), default=0)
            for key, value in rows.items():
                self._line(f"{key:<{width}}  {value}")
        elif rows:
            self._print(self._panel(rows, "finished", "green", 1))

    # -- drawing ---------------------------------------------------------------------------------

    def _line(self, text: str | Text) -> None:
        text = Text(text) if isinstance(text, str) else text
        text.plain = self._encodable(text.plain)
        # soft_wrap: a log line stays one line, however narrow rich believes the log to be.
        self._print(text, soft_wrap=True)

    def _print(self, what: RenderableType, **how: Any) -> None:
        try:
            self._out.print(what, **how)
        except OSError:  # a log on a full disk loses lines, not the run
            self._out.quiet = True  # rich keeps what it could not print; quiet drops it
            self._out.print()
            self._out.quiet = False

    def _encodable(self, text: str) -> str:
        # A prompt's or path's character that the log cannot hold must not end the run.
        encoding = self._out.encoding
        return text if self._unicode else text.encode(encoding, "replace").decode(encoding)

    def _panel(self, rows: Mapping[str, str], title: str, colour: str, columns: int) -> Panel:
        grid = Table.grid(padding=(0, 2))
        for _ in range(columns):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(overflow="fold")
        items = [(Text(k), Text(self._encodable(v))) for k, v in rows.items()]
        half = -(-len(items) // columns)
        for i in range(half):
            cells = [cell for item in items[i::half] for cell in item]
            grid.add_row(*cells)
        return Panel(grid, title=title, title_align="left", border_style=colour, expand=False)

    def _eta(self) -> float | None:
        if not self._seconds:
            return None
        return statistics.median(self._seconds) * max(0, self.total_steps - self._done)

    def _row(self, metrics: Mapping[str, Any]) -> None:
        count = len(str(self.total_steps))
        used, columns = 2 * count + 1, []
        for column in COLUMNS:
            if used + 2 + column[2] > self._out.width:
                break
            used += 2 + column[2]
            columns.append(column)
        if self._rows % HEADER_EVERY == 0:
            heads = "".join(f"  {head:>{width}}" for _, head, width, _ in columns)
            self._line(Text(f"{'step':>{2 * count + 1}}{heads}", style="dim"))
        self._rows += 1
        row = Text(f"{self._done:>{count}}")
        row.append(f"/{self.total_steps}", "dim")
        row.append(" " * (2 * count + 1 - len(row)))
        for key, _, width, style in columns:
            value = metrics.get(key)
            shown = {
                "seconds": duration,
                "kl": lambda v: number(v, 4),
                "loss": lambda v: number(v, 4),
                "tokens_per_second": lambda v: number(v, 0),
                "completion_length_mean": lambda v: number(v, 1),
                "grad_norm": lambda v: number(v, 2),
            }.get(key, number)(value)
            row.append(f"  {shown:>{width}}", style)
        parts = " ".join(f"{name} {seconds:.1f}" for name, seconds in phases(metrics))
        if parts and used + 2 + len(parts) <= self._out.width:
            row.append(f"  {parts}", "dim")
        self._line(row)
        for text in warnings(metrics):
            self._line(Text(f"{'':>{2 * count + 1}}  ! {text}", style="yellow"))

    def _plain_step(self, metrics: Mapping[str, Any]) -> str:
        count = len(str(self.total_steps))
        line = f"step {self._done:>{count}}/{self.total_steps}"
        line += f"  reward {number(metrics.get('reward_mean'))}"
        for key, head, digits in (
            ("kl", "kl", 4),
            ("entropy", "entropy", 3),
            ("loss", "loss", 4),
            ("grad_norm", "grad", 2),
            ("completion_length_mean", "length", 1),
            ("tokens_per_second", "tok/s", 0),
        ):
            if metrics.get(key) is not None:
                line += f"  {head} {number(metrics[key], digits)}"
        line += f"  {duration(metrics.get('seconds'))}"
        parts = " ".join(f"{name} {seconds:.1f}" for name, seconds in phases(metrics))
        line += f" ({parts})" if parts else ""
        line += f"  eta {duration(self._eta())}"
        notes = "; ".join(warnings(metrics))
        return f"{line}  ! {notes}" if notes else line

    def _status(self) -> RenderableType:
        """The live line; called by rich's refresh thread."""
        grid = Table.grid(padding=(0, 1))
        facts = [Text(f"{self._done}/{self.total_steps}"), Text(self._phase, style="cyan")]
        eta = self._eta()
        if eta is not None:
            facts.append(Text(f"{statistics.median(self._seconds):.1f} s/step", style="dim"))
            facts.append(Text(f"ETA {duration(eta)}"))
        if len(self._rewards) > 1 and self._unicode and self._out.width >= 90:
            facts.append(Text(f"reward {sparkline(list(self._rewards))}", style="green"))
        taken = sum(len(fact) + 1 for fact in facts) + 3
        bar = ProgressBar(
            total=max(1, self.total_steps),
            completed=self._done,
            width=max(4, min(30, self._out.width - taken)),
        )
        grid.add_row(Spinner("dots" if self._unicode else "line"), bar, *facts)
        return grid
