"""Intervals over seeds."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """Mean over seeds and its interval; infinite bounds where one seed says nothing of spread."""

    mean: float
    low: float
    high: float
    seeds: int


def number(value: float) -> str:
    """Three significant digits, fixed point where that is short."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}".replace("inf", "∞").replace("-", "−")
    digits = max(0, min(5, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f}".replace("-", "−")


def t_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """mean ± t_{(1 + level) / 2, n - 1} s / sqrt(n), s with ddof=1.

    ValueError: no values, or one that is not finite (its position is named).
    """
    n = len(values)
    if n == 0:
        raise ValueError("expected at least one value")
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"values[{i}] = {value}: expected a finite number")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = t_quantile((1 + level) / 2, n - 1) * error
    return Estimate(mean, mean - half, mean + half, n)


def paired(left: Sequence[float], right: Sequence[float]) -> Estimate:
    """`t_interval` of left - right, seed by seed; ValueError where one has more seeds."""
    return t_interval([a - b for a, b in zip(left, right, strict=True)])


@functools.lru_cache(maxsize=256)
def t_quantile(p: float, dof: int) -> float:
    """x with P(T <= x) = p for Student's T of `dof` degrees of freedom; 1/2 <= p < 1."""
    if not 0.5 <= p < 1 or dof < 1:
        raise ValueError(f"p={p}, dof={dof}: expected 1/2 <= p < 1 and dof >= 1")
    low, high = 0.0, 1.0
    while t_cdf(high, dof) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if t_cdf(middle, dof) < p:
            low = middle
        else:
            high = middle
    return high


def t_cdf(x: float, dof: int) -> float:
    """P(T <= x), x >= 0, by the finite sums for whole `dof` (Abramowitz & Stegun 26.7.3-4)."""
    angle = math.atan(x / math.sqrt(dof))
    cosine, sine = math.cos(angle), math.sin(angle)
    term = cosine if dof % 2 else 1.0
    total = 0.0
    for k in range((dof - 1) // 2 if dof % 2 else dof // 2):
        if k:
            term *= cosine**2 * ((2 * k) / (2 * k + 1) if dof % 2 else (2 * k - 1) / (2 * k))
        total += term
    within = 2 / math.pi * (angle + sine * total) if dof % 2 else sine * total
    return 0.5 + within / 2
