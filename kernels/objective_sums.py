"""The metrics of the policy objective: what they are and how they add up over blocks and programs,
always in the same order, so that the result does not depend on the schedule."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Metrics(NamedTuple):
    """One value each, or a block's contributions [BLOCK]; in the order of pyrl/ops/spec.py, which
    kernels may not import: a test compares them."""

    tokens: Any
    policy_loss: Any
    kl_loss: Any
    entropy_loss: Any
    logprob_sum: Any
    entropy_sum: Any
    kl_k1_sum: Any
    kl_k3_sum: Any
    old_kl_sum: Any
    rollout_kl_sum: Any
    ratio_sum: Any
    ratio_sq_sum: Any
    ratio_min: Any
    ratio_max: Any
    clip_low: Any
    clip_high: Any
    dual_clip: Any
    correction_sum: Any
    correction_sq_sum: Any
    correction_max: Any
    correction_masked: Any
    off_policy_masked: Any
    zero_advantage: Any
    nan_old: Any
    nan_ref: Any
    nan_rollout: Any


METRICS = Metrics._fields

#: How a metric merges where it is not a float64 sum. Counts are int32, half the registers.
_MERGES = {
    "ratio_min": "min",
    **dict.fromkeys(("ratio_max", "correction_max"), "max"),
    **dict.fromkeys(("tokens", "clip_low", "clip_high", "dual_clip", "zero_advantage"), "count"),
    **dict.fromkeys(("correction_masked", "off_policy_masked"), "count"),
    **dict.fromkeys(("nan_old", "nan_ref", "nan_rollout"), "count"),
}

_METRICS = tl.constexpr(len(METRICS))
_MERGE = tl.constexpr(tuple(_MERGES.get(name, "sum") for name in METRICS))
ROW = tl.constexpr(triton.next_power_of_2(len(METRICS)))  # one program's partial sums
_FIRST_LOSS = tl.constexpr(METRICS.index("policy_loss"))
_LAST_LOSS = tl.constexpr(METRICS.index("entropy_loss"))
_RATIO_MIN = tl.constexpr(METRICS.index("ratio_min"))
_RATIO_MAX = tl.constexpr(METRICS.index("ratio_max"))
_CORRECTION_MAX = tl.constexpr(METRICS.index("correction_max"))


@triton.jit
def no_sums(BLOCK: tl.constexpr):
    """What `merged` starts from."""
    sums = ()
    for i in tl.static_range(_METRICS):
        if _MERGE[i] == "count":
            sums += (tl.zeros([BLOCK], tl.int32),)
        elif _MERGE[i] == "min":
            sums += (tl.full([BLOCK], float("inf"), tl.float64),)
        elif _MERGE[i] == "max":
            sums += (tl.full([BLOCK], -float("inf"), tl.float64),)
        else:
            sums += (tl.zeros([BLOCK], tl.float64),)
    return sums


@triton.jit
def merged(sums, metrics):
    """The sums of earlier blocks with those of one more, lane by lane."""
    both = ()
    for i in tl.static_range(_METRICS):
        if _MERGE[i] == "min":
            both += (tl.minimum(sums[i], metrics[i]),)
        elif _MERGE[i] == "max":
            both += (tl.maximum(sums[i], metrics[i]),)
        else:
            both += (sums[i] + metrics[i],)
    return both


@triton.jit
def store_row(row_ptr, sums):
    """One program's partial sums [BLOCK], reduced into its row."""
    for i in tl.static_range(_METRICS):
        if _MERGE[i] == "min":
            total = tl.min(sums[i], axis=0)
        elif _MERGE[i] == "max":
            total = tl.max(sums[i], axis=0)
        else:
            total = tl.sum(sums[i], axis=0).to(tl.float64)
        tl.store(row_ptr + i, total)


@triton.jit
def add_rows(partial_ptr, programs, loss_ptr, metrics_ptr, ROWS: tl.constexpr):
    """All programs' rows into the metrics, and their loss; ROWS rows at a time."""
    metric = tl.arange(0, ROW)
    total = tl.zeros([ROW], tl.float64)
    lowest = tl.full([ROW], float("inf"), tl.float64)
    highest = tl.full([ROW], -float("inf"), tl.float64)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (metric < _METRICS)[None, :]
        # .cg reads the L2, where the other programs' stores are.
        part = tl.load(
            partial_ptr + row[:, None].to(tl.int64) * ROW + metric[None, :],
            mask=mask,
            other=0.0,
            cache_modifier=".cg",
        )
        total += tl.sum(part, axis=0)
        lowest = tl.minimum(lowest, tl.min(tl.where(mask, part, float("inf")), axis=0))
        highest = tl.maximum(highest, tl.max(tl.where(mask, part, -float("inf")), axis=0))
    largest = (metric == _RATIO_MAX) | (metric == _CORRECTION_MAX)
    total = tl.where(metric == _RATIO_MIN, lowest, tl.where(largest, highest, total))
    tl.store(metrics_ptr + metric, total, mask=metric < _METRICS)
    is_loss = (metric >= _FIRST_LOSS) & (metric <= _LAST_LOSS)
    loss = tl.sum(tl.where(is_loss, total, 0.0), axis=0)
    tl.store(loss_ptr, loss.to(tl.float32))
