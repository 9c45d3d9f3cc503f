"""Terms that a recipe adds to the task's reward: length and termination."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from pyrl.algorithms.experience import Group


def overlong(length: int, *, max_new_tokens: int, buffer: int) -> float:
    """0 up to max_new_tokens - buffer tokens, then linearly down to -1 at max_new_tokens.

    buffer 0: always 0. Source: DAPO's soft overlong punishment, arXiv 2503.14476.
    """
    if not buffer:
        return 0.0
    return -min(1.0, max(0.0, (length - (max_new_tokens - buffer)) / buffer))


def cosine(length: int, *, max_new_tokens: int, low: float, high: float) -> float:
    """low + (high - low) (1 + cos(pi t)) / 2, t = length / max_new_tokens up to 1: `high` for the
    shortest completion, `low` for the longest. Source: ProRL v2's length term."""
    t = min(1.0, length / max_new_tokens)
    return low + (high - low) * (1 + math.cos(math.pi * t)) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardTerms:
    """bonus = overlong_penalty * overlong + cosine (while it is on) - nontermination_penalty
    [finish_reason = "length"]; by default 0. ValueError names the field that makes no sense."""

    overlong_buffer: int = 0
    """Tokens before the limit over which the overlong term falls; 0: no such term."""
    overlong_penalty: float = 1.0
    """What it has fallen to at the limit, >= 0."""
    cosine_low: float = 0.0
    """The cosine term of a completion of max_new_tokens."""
    cosine_high: float = 0.0
    """The cosine term of an empty completion, >= cosine_low."""
    cosine_on: int = 0
    """Steps that the cosine term is on, from step 1; 0: never."""
    cosine_off: int = 0
    """Steps that it is then off, before it is on again; 0: it stays on."""
    nontermination_penalty: float = 0.0
    """Taken from a completion that no stop token ended, >= 0."""

    def __post_init__(self) -> None:
        for name in ("overlong_buffer", "cosine_on", "cosine_off"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} = {value!r}: expected a whole number >= 0")
        for name in ("overlong_penalty", "nontermination_penalty", "cosine_low", "cosine_high"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            signed = name.startswith("cosine")
            if not number or not math.isfinite(value) or not (signed or value >= 0):
                expected = "a finite number" if signed else "a finite number >= 0"
                raise ValueError(f"{name} = {value!r}: expected {expected}")
        if self.cosine_low > self.cosine_high:
            raise ValueError(
                f"cosine_low = {self.cosine_low!r} is above cosine_high = {self.cosine_high!r}: "
                "longer completions would earn more"
            )
        if self.cosine_off and not self.cosine_on:
            raise ValueError(f"cosine_off = {self.cosine_off}: the term is never on, cosine_on = 0")

    def cosine_is_on(self, step: int) -> bool:
        """Of the steps 1, 2, ..., in cycles of cosine_on + cosine_off."""
        cycle = self.cosine_on + self.cosine_off
        return cycle > 0 and (step - 1) % cycle < self.cosine_on

    def terms(
        self, length: int, finish_reason: str, *, max_new_tokens: int, step: int
    ) -> dict[str, float]:
        """Each term by name; those that are off are 0. ValueError: a buffer above the limit."""
        if self.overlong_buffer > max_new_tokens:
            raise ValueError(
                f"overlong_buffer = {self.overlong_buffer}: expected at most max_new_tokens = "
                f"{max_new_tokens}"
            )
        unit = overlong(length, max_new_tokens=max_new_tokens, buffer=self.overlong_buffer)
        low, high = self.cosine_low, self.cosine_high
        return {
            "overlong": self.overlong_penalty * unit,
            "cosine": cosine(length, max_new_tokens=max_new_tokens, low=low, high=high)
            if self.cosine_is_on(step)
            else 0.0,
            "nontermination": -self.nontermination_penalty if finish_reason == "length" else 0.0,
        }

    def bonus(self, length: int, finish_reason: str, *, max_new_tokens: int, step: int) -> float:
        """The sum of the terms, for a completion of `length` tokens."""
        terms = self.terms(length, finish_reason, max_new_tokens=max_new_tokens, step=step)
        return sum(terms.values())

    def apply(self, groups: Sequence[Group], *, max_new_tokens: int, step: int) -> dict[str, float]:
        """Sets the bonus of every attempt, 0 of a lost one. Metrics: means over the others of
        `bonus` and of each term (NaN without any)."""
        sums = dict.fromkeys(
            ("bonus_mean", "overlong_mean", "cosine_mean", "nontermination_mean"), 0.0
        )
        scored = 0
        for attempt in (a for group in groups for a in group.attempts):
            attempt.bonus = 0.0
            if math.isnan(attempt.reward):
                continue
            terms = self.terms(
                len(attempt.tokens), attempt.finish_reason, max_new_tokens=max_new_tokens, step=step
            )
            attempt.bonus = sum(terms.values())
            scored += 1
            sums["bonus_mean"] += attempt.bonus
            for name, value in terms.items():
                sums[f"{name}_mean"] += value
        return {name: total / scored if scored else math.nan for name, total in sums.items()}
