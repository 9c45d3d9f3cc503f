"""Sampling budgets by gradient variance: how many of N samples each prompt gets (GVM, Neyman)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Numbers = Sequence[float] | NDArray[Any] | torch.Tensor

METHODS = ("gvm", "neyman")
#: Below it the float64 rounding of all quotas together stays far from one sample.
MAX_TOTAL = 2**40
#: second_moment may be below gradient_norm² by this share: both may come from fp32 sums.
JENSEN = 1e-5
#: A weight this small beside the largest gets no sample of MAX_TOTAL; as 0 it divides nothing.
NO_WEIGHT = 1e-100


def allocate_budget(
    accept_rate: Numbers,
    gradient_norm: Numbers,
    total: int,
    *,
    alpha: float = 1e-3,
    beta: float = 2.0,
    method: Literal["gvm", "neyman"] = "gvm",
    second_moment: Numbers | None = None,
    minimum: int = 0,
    maximum: int | None = None,
) -> Int64:
    """n_i = total * w_i / sum(w), rounded by largest remainders: int64 [n], of sum `total` exactly.

    "gvm": w_i = G_i / sqrt(p_i + alpha / p_i^(beta - 1)), p = accept_rate in [0, 1], G =
    gradient_norm >= 0 the mean over a prompt's accepted samples of |∇ log p(sample)|. It minimises
    sum_i G_i²/(p_i n_i), damped by alpha > 0 and beta >= 2 where acceptance is rare; at equal G the
    weight is largest at p = (alpha (beta - 1))^(1/beta). p_i = 0 or G_i = 0 gives n_i = 0.

    "neyman": w_i = sqrt(M_i / p_i - g_i²), M = second_moment = E[|∇|² | accepted] and g =
    gradient_norm = |E[∇ | accepted]|, without alpha and beta. With a in {0, 1} for accepted, the
    estimator ĝ_i = (1/(n_i p_i)) sum_j a_j ∇_j has the expectation E[∇ | accepted] and a variance
    (trace) of (E[a |∇|²]/p_i² - g_i²)/n_i = (M_i/p_i - g_i²)/n_i; n_i ∝ w_i minimises the sum of
    those over prompts. "gvm" drops g_i² and takes G_i² for M_i. A mean of norms, which is at least
    g_i, in its place would make accepted samples look more alike than they are.

    minimum <= n_i <= maximum for every prompt: n_i = clip(c w_i, minimum, maximum), which is the
    optimum under these bounds. All weights 0: the same for all prompts; so for the prompts without
    weight, when those with weight are full. Equal remainders go to the lower index; prompts that
    do not differ get numbers that differ by one at most. Everything in float64; sequences, arrays
    or tensors.

    ValueError naming the value, and its position, for lengths that differ, a number outside its
    range or not finite, a total that is negative, above 2^40 or not within the bounds.
    Source: arXiv 2505.02391.
    """
    p = _numbers("accept_rate", accept_rate, high=1.0)
    g = _numbers("gradient_norm", gradient_norm, like=p)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha={alpha!r}: expected a finite number > 0")
    if not (math.isfinite(beta) and beta >= 2):
        raise ValueError(f"beta={beta!r}: expected a finite number >= 2")
    low, high = _bounds(total, len(p), minimum, maximum)
    if method == "neyman":
        if second_moment is None:
            raise ValueError("method='neyman' needs second_moment, E[|gradient|² | accepted]")
        weight = _neyman(p, g, _numbers("second_moment", second_moment, like=p))
    elif second_moment is not None:
        raise ValueError("second_moment belongs to method='neyman'")
    else:
        # G / sqrt(p + alpha p^(1 - beta)), without a division by 0
        weight = _unit(g) * p ** ((beta - 1) / 2) / np.sqrt(p**beta + alpha)
    return _largest_remainders(_shares(weight, total, low, high), total)


def _neyman(p: Float64, g: Float64, moment: Float64) -> Float64:
    bad = np.flatnonzero(moment < g * g * (1 - JENSEN))
    if bad.size:
        i = int(bad[0])
        raise ValueError(
            f"second_moment[{i}]={moment[i]}: expected at least gradient_norm² = {g[i] ** 2}"
        )
    some = p > 0
    rare = float(p[some].min(initial=1.0))  # a factor for all: keeps M / p from overflowing
    peak = float(moment.max(initial=0.0)) or 1.0
    variance = np.divide(moment / peak * rare, p, out=np.zeros_like(p), where=some)
    variance -= np.where(some, g * (g / peak) * rare, 0.0)
    return np.sqrt(variance.clip(min=0.0))


def _unit(g: Float64) -> Float64:
    """g over its largest, so that no product of it over- or underflows."""
    return g / (float(g.max(initial=0.0)) or 1.0)


def _shares(weight: Float64, total: int, low: int, high: int) -> Float64:
    """clip(c w, low, high) with c such that it sums to total; without weight: all the same."""
    weight = _unit(weight)
    weight = np.where(weight < NO_WEIGHT, 0.0, weight)
    some = weight > 0
    n, with_weight = weight.size, int(np.count_nonzero(some))
    if with_weight == 0:
        return np.full(n, total / max(1, n))
    if high * with_weight + low * (n - with_weight) <= total:  # all with weight are full
        rest = (total - high * with_weight) / max(1, n - with_weight)
        return np.where(some, float(high), rest)

    def clipped(c: float) -> Float64:
        return np.clip(c * weight, low, high)

    # c lies between two neighbours of the values at which a prompt meets a bound. There the sum is
    # linear in c, so what is left for the prompts between their bounds gives c.
    meets = [np.divide(bound, weight, out=np.zeros(n), where=some) for bound in (low, high)]
    edges = np.unique(np.concatenate([[0.0], meets[0][some], meets[1][some]]))
    left, right = 0, len(edges) - 1  # sum at left <= total < sum at right
    while right - left > 1:
        middle = (left + right) // 2
        left, right = (middle, right) if clipped(edges[middle]).sum() <= total else (left, middle)
    inside = some & (meets[0] <= edges[left]) & (meets[1] >= edges[right])
    fixed = np.rint(clipped(edges[left])[~inside]).sum()
    free = math.fsum(weight[inside])  # exact: the same in any order of the prompts
    c = (total - fixed) / free if free else edges[left]
    return clipped(min(max(c, edges[left]), edges[right]))  # the sums above are rounded


def _largest_remainders(share: Float64, total: int) -> Int64:
    count = np.floor(share).astype(np.int64)
    missing = total - int(count.sum())
    assert 0 <= missing <= share.size, "the shares sum to the total"
    count[np.argsort(count - share, kind="stable")[:missing]] += 1
    return count


def _bounds(total: int, prompts: int, minimum: int, maximum: int | None) -> tuple[int, int]:
    """minimum and maximum (without one: `total`), checked."""
    whole = {"total": total, "minimum": minimum, "maximum": 0 if maximum is None else maximum}
    for name, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(f"{name}={value!r}: expected a whole number >= 0")
    low, high = int(minimum), int(max(total, minimum) if maximum is None else maximum)
    if total > MAX_TOTAL:
        raise ValueError(f"total={total}: expected at most {MAX_TOTAL}")
    if not low * prompts <= total:
        raise ValueError(f"total={total}: below minimum={low} for each of {prompts} prompts")
    if not (total <= high * prompts and low <= high):
        raise ValueError(f"total={total}: above maximum={high} for each of {prompts} prompts")
    return low, high


def _numbers(
    name: str, values: Numbers, *, high: float = math.inf, like: Float64 | None = None
) -> Float64:
    """float64 [n] of finite values in [0, high], as many as `like` has."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected [n], got {array.ndim} dimensions")
    if like is not None and array.shape != like.shape:
        raise ValueError(f"{name}: {array.size} values for {like.size} prompts")
    bad = np.flatnonzero(~(np.isfinite(array) & (array >= 0) & (array <= high)))
    if bad.size:
        i = int(bad[0])
        limit = "a finite number >= 0" if high == math.inf else f"a number in [0, {high:g}]"
        raise ValueError(f"{name}[{i}]={array[i]}: expected {limit}")
    return array
