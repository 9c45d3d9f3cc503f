"""Metrics of micro-batches and ranks merge exactly, because they are sums, counts and extremes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

EXTREMES = {"ratio_min": min, "ratio_max": max, "correction_max": max}


def reduce_metrics(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """sum of every metric over `parts`; the minimum or maximum of the `EXTREMES`."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in total:
                total[name] = value
            elif name in EXTREMES:
                total[name] = EXTREMES[name](total[name], value)
            else:
                total[name] = total[name] + value
    return total
