"""Which metrics are drawn together, and the geometry of drawing them: scales, ticks, smoothing.

Shared by report.html and curves.png. Positions are per cent of the plot, from the left and from the
bottom.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

#: More points than a chart has pixels only cost bytes; beyond this, bins keep their extremes.
MAX_POINTS = 400
SMOOTH_FROM = 12

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Metrics drawn together: `series` is a tuple of (metrics key, label)."""

    title: str
    series: tuple[tuple[str, str], ...]
    note: str = ""
    zero: bool = False
    """The axis includes 0 (shares, lengths, rates)."""
    log: bool = False
    """Logarithmic where the values allow it and span more than a factor of 20."""


CHARTS = (
    Chart("Reward", (("reward_mean", "training"),), "mean of the step's completions"),
    Chart("KL to the reference", (("kl", "KL"),), "k3 estimate, nats a token", zero=True),
    Chart("Entropy", (("entropy", "entropy"),), "nats a token", zero=True),
    Chart("Completion length", (("completion_length_mean", "tokens"),), "mean tokens", zero=True),
    Chart(
        "Truncation and flat groups",
        (("truncated_share", "truncated"), ("zero_variance_share", "zero-variance groups")),
        "shares",
        zero=True,
    ),
    Chart(
        "Loss",
        (
            ("loss", "loss"),
            ("policy_loss", "policy"),
            ("kl_loss", "KL"),
            ("entropy_loss", "entropy"),
        ),
        "and its parts",
    ),
    Chart("Gradient norm", (("grad_norm", "norm"),), "before clipping", log=True),
    Chart(
        "Probability ratio",
        (("ratio_max", "max"), ("ratio_mean", "mean"), ("ratio_min", "min")),
        "new to old policy, per token",
        log=True,
    ),
    Chart(
        "Clipped tokens",
        (("clip_high_share", "high"), ("clip_low_share", "low"), ("dual_clip_share", "dual")),
        "shares",
        zero=True,
    ),
    Chart("KL to the old policy", (("old_kl", "KL"),), "k3 estimate, nats a token", zero=True),
    Chart("Effective samples", (("ess", "ESS"),), "of the importance weights", zero=True),
    Chart("Log-probability", (("logprob_mean", "mean"),), "of the sampled tokens"),
    Chart("Learning rate", (("lr", "lr"),), "", zero=True),
    Chart("Speed", (("tokens_per_second", "tokens/s"),), "tokens a second", zero=True),
    Chart(
        "Tokens of the update",
        (("tokens", "computed"), ("shared_tokens", "shared")),
        "a step; shared: computed in a common prefix",
        zero=True,
    ),
    Chart(
        "Samples with an advantage",
        (("signal_share", "share"),),
        "of the step's completions",
        zero=True,
    ),
    Chart(
        "Reward terms",
        (
            ("bonus_mean", "sum"),
            ("overlong_mean", "overlong"),
            ("cosine_mean", "length"),
            ("nontermination_mean", "not ended"),
        ),
        "mean of the step's completions",
    ),
    Chart(
        "Critic",
        (("explained_variance", "explained variance"), ("value_clip_share", "clipped")),
        "of the values at the start of the step",
    ),
    Chart(
        "Preference",
        (("preference_accuracy", "accuracy"), ("preference_loss", "loss")),
        "pairs, before their update",
        zero=True,
    ),
    Chart("Completions", (("samples", "completions"),), "sampled, pilots included", zero=True),
    Chart("Age of the reference", (("reference_age", "steps"),), "since its last reset", zero=True),
    Chart("Peak memory", (("peak_rss_mib", "MiB"),), "resident, MiB", zero=True),
    Chart(
        "Engine against trainer",
        (("rollout_gap_max", "completions"), ("canary_max_diff", "canary")),
        "largest log-prob difference",
        log=True,
    ),
)
#: Keys that other parts of the page show, or that say nothing as a curve.
UNPLOTTED = {
    "step", "reward_std", "zero_variance_groups", "groups", "sampled_tokens", "seconds",
    "nan_rewards", "skipped_tokens", "heldout_mean", "heldout_low", "heldout_high",
    "samples_total", "updates", "reference_resets", "reward_prompt_mean", "filtered", "pairs",
}  # fmt: skip


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) of the steps where `key` is a finite number; y is nan where it is not."""
    found = [(float(m["step"]), finite(m.get(key))) for m in metrics]
    if all(y is None for _, y in found):
        return []
    return [(x, math.nan if y is None else y) for x, y in found]


def constant(line: Sequence[Point]) -> float | None:
    """The value that a line of at least 3 points never leaves, or None."""
    values = {y for _, y in line if not math.isnan(y)}
    return values.pop() if len(values) == 1 and len(line) >= 3 else None


def split_constant(
    charts: Sequence[Chart], metrics: Sequence[Mapping[str, Any]]
) -> tuple[list[Chart], list[tuple[str, float]]]:
    """The charts without the lines that never move, and those as (what it is, value): a flat line
    says in a chart's room what fits into a sentence. The reward is always drawn."""
    moving: list[Chart] = []
    still: list[tuple[str, float]] = []
    for chart in charts:
        kept = []
        for key, name in chart.series:
            value = None if key == "reward_mean" else constant(points(metrics, key))
            if value is None:
                kept.append((key, name))
            else:
                many = len(chart.series) > 1 and name.lower() != chart.title.lower()
                title = chart.title if chart.title[:2].isupper() else chart.title.lower()
                still.append((f"{title} ({name})" if many else title, value))
        if kept:
            moving.append(dataclasses.replace(chart, series=tuple(kept)))
    return moving, still


def smooth(line: Sequence[Point]) -> list[Point]:
    """Exponential moving average with the start's bias removed; gaps stay gaps. Empty when the line
    is too short to need one."""
    present = sum(not math.isnan(y) for _, y in line)
    span = smoothing_span(present)
    if span == 0:
        return []
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    out = []
    for x, y in line:
        if not math.isnan(y):
            total, weight = keep * total + y, keep * weight + 1
        out.append((x, math.nan if math.isnan(y) else total / weight))
    return out


def smoothing_span(count: int) -> int:
    """Steps that the moving average of `count` steps looks back over, roughly; 0 for too few."""
    if count < SMOOTH_FROM:
        return 0
    return min(50, max(3, count // 8))


def thin(line: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points: of each bin of steps its least and greatest, so spikes stay."""
    if len(line) <= limit:
        return list(line)
    size = math.ceil(len(line) / (limit // 2))
    out: list[Point] = []
    for start in range(0, len(line), size):
        bin_ = line[start : start + size]
        present = [p for p in bin_ if not math.isnan(p[1])]
        if not present:
            out.append(bin_[0])
            continue
        extremes = {min(present, key=lambda p: p[1]), max(present, key=lambda p: p[1])}
        out.extend(sorted(extremes))
    return out


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], thinned to five; 1-2-5 steps when fewer than three."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**e for e in exponents if low <= 10.0**e <= high]
    if len(tens) < 3:
        return [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return tens[:: math.ceil(len(tens) / 5)]


def label(value: float, step: float | None = None) -> str:
    """A tick or reading: as many digits as `step`, the distance of the ticks, calls for; without
    it four significant ones, three below 1."""
    size = abs(value)
    if value == 0:
        text = "0"
    elif size >= 1e5 or size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    elif step is not None and step > 0:
        text = f"{value:,.{min(4, max(0, -math.floor(math.log10(step) + 1e-9)))}f}"
    else:
        order = math.floor(math.log10(size))
        text = f"{value:,.{max(0, (3 if order >= 0 else 2) - order)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", "−")


class Axis:
    """Value → per cent of the plot, linear or logarithmic, with 5% of air around the data."""

    def __init__(self, values: Sequence[float], *, zero: bool = False, log: bool = False) -> None:
        low, high = min(values), max(values)
        self.log = log and low > 0 and high / low > 20
        if zero and not self.log:
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            air = abs(low) * 0.5 or 0.5
            low, high = (low - air, high + air) if not zero else (min(low, 0), max(high, 1))
        a, b = self._scale(low), self._scale(high)
        air = (b - a) * 0.05
        self._low = a if zero and low == 0 else a - air
        self._high = b + air
        self.ticks = log_ticks(low, high) if self.log else nice_ticks(low, high)

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def percent(self, value: float) -> float:
        """0 at the low end, 100 at the high end."""
        return 100 * (self._scale(value) - self._low) / (self._high - self._low)

    def labels(self) -> list[tuple[float, str]]:
        """(per cent, text) of the ticks."""
        step = None
        if not self.log and len(self.ticks) > 1:
            step = self.ticks[1] - self.ticks[0]
        return [(round(self.percent(t), 2), label(t, step)) for t in self.ticks]


class Steps:
    """Step number → per cent of the width; from the first step shown to the last, no air."""

    def __init__(self, first: float, last: float) -> None:
        self.first, self.last = first, last
        inside = [t for t in nice_ticks(first, last, 5) if t == int(t)]
        # The last step is what people look for: it replaces a round number that is too close.
        span = last - first
        self.ticks = [t for t in inside if last - t > span * 0.12] + [last]

    def percent(self, step: float) -> float:
        """50 when there is only one step."""
        span = self.last - self.first
        return 50.0 if span == 0 else 100 * (step - self.first) / span

    def labels(self) -> list[tuple[float, str]]:
        """(per cent, text) of the ticks."""
        return [(round(self.percent(t), 2), f"{t:,.0f}") for t in self.ticks]


def svg_path(line: Sequence[Point], steps: Steps, axis: Axis) -> str:
    """SVG path data in a 0-100 box; a nan, or a 0 on a log axis, lifts the pen."""
    commands, down = [], False
    for x, y in line:
        if math.isnan(y) or (axis.log and y <= 0):
            down = False
            continue
        commands.append(f"{'L' if down else 'M'}{steps.percent(x):.2f} {100 - axis.percent(y):.2f}")
        down = True
    return "".join(commands)
