"""Group-relative advantages: one pass over groups of any sizes, and the sums of the batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import require
from .tuning import GROUP_PROGRAMS, GROUPS

#: The methods in the order of the integer that selects them.
METHODS = (
    "grpo",
    "mean",
    "rloo",
    "positive",
    "raw",
    "batch_std",
    "whiten",
    "whiten_baseline",
    "correct",
    "scaled",
)
#: Sums and counts in the order of `metrics`.
METRICS = (
    "samples",
    "groups",
    "zero_std_groups",
    "filtered",
    "nan_rewards",
    "reward_sum",
    "reward_sq_sum",
    "kept",
)

_METRICS = tl.constexpr(len(METRICS))
_GRPO, _MEAN, _RLOO, _POSITIVE, _RAW, _BATCH_STD, _WHITEN, _WHITEN_BASELINE, _CORRECT, _SCALED = (
    tl.constexpr(i) for i in range(len(METHODS))
)


@triton.jit
def _samples(
    order_ptr, rewards_ptr, begin, end, start, HAS_ORDER: tl.constexpr, LANES: tl.constexpr
):
    """Sample index, reward (nan outside) and mask [GROUPS, LANES] of members start ... of each
    group."""
    position = begin[:, None] + (start + tl.arange(0, LANES))[None, :]
    inside = position < end[:, None]
    sample = position
    if HAS_ORDER:
        sample = tl.load(order_ptr + position, mask=inside, other=0)
    reward = tl.load(rewards_ptr + sample, mask=inside, other=float("nan"))
    return sample, reward, inside


@triton.jit
def _value(r, count, mean, std, low, high, eps, offset, scale, METHOD: tl.constexpr):
    """The advantage of rewards r [GROUPS, LANES] from the statistics [GROUPS, 1] of their groups,
    or what the batch then scales."""
    alone = count <= 1
    mapped = offset + scale * r
    centred = tl.where(alone, mapped, scale * (r - mean))
    if METHOD == _GRPO or METHOD == _SCALED:  # noqa: SIM109  the compiler knows no `in`
        above = centred if METHOD == _GRPO else mapped
        # Equal rewards: no 0 / 0 for eps = 0.
        equal = (low == high) & (count > 1)
        spread = tl.where(alone, 1.0, tl.abs(scale) * std)
        # One division a group, not one a reward.
        value = tl.where(equal, 0.0, above * (1.0 / (tl.where(equal, 1.0, spread) + eps)))
    elif METHOD == _RLOO:
        value = tl.where(alone, 0.0, centred * (count / tl.maximum(count - 1, 1.0)))
    elif METHOD == _POSITIVE:
        value = tl.where(r == tl.where(scale > 0, high, low), 1.0, 0.0)
    elif METHOD == _CORRECT:
        value = tl.where(mapped > 0, 1.0, 0.0)
    elif METHOD == _RAW or METHOD == _WHITEN:  # noqa: SIM109  the compiler knows no `in`
        value = mapped
    else:
        value = centred
    return value


@triton.jit
def _group_advantage_kernel(
    rewards_ptr,
    order_ptr,
    offsets_ptr,
    value_ptr,
    keep_ptr,
    partial_ptr,
    groups,
    eps: tl.float64,
    offset: tl.float64,
    scale: tl.float64,
    METHOD: tl.constexpr,
    OF_BATCH: tl.constexpr,
    UNBIASED: tl.constexpr,
    ALL_CORRECT: tl.constexpr,
    ALL_WRONG: tl.constexpr,
    ZERO_STD: tl.constexpr,
    DROP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """GROUPS groups at a time, in float64, NaN rewards left out.

    A program leaves GROUPS columns of sums, one for each of its tile's rows: partial [13, columns],
    the metrics and then count, mean, squared deviations, low and high of what the batch needs.
    """
    zero = tl.zeros([GROUPS], tl.float64)
    n_samples, n_groups, n_flat, n_filtered, n_nan, n_kept = zero, zero, zero, zero, zero, zero
    reward_sum, reward_sq_sum = zero, zero
    b_count, b_mean, b_squares = zero, zero, zero
    b_low = tl.full([GROUPS], float("inf"), tl.float64)
    b_high = tl.full([GROUPS], -float("inf"), tl.float64)

    for tile in range(tl.program_id(0), tl.cdiv(groups, GROUPS), tl.num_programs(0)):
        group = tile * GROUPS + tl.arange(0, GROUPS).to(tl.int64)
        begin = tl.load(offsets_ptr + group, mask=group < groups, other=0)
        end = tl.load(offsets_ptr + group + 1, mask=group < groups, other=0)
        longest = tl.max(end - begin, axis=0)

        count, total, square_sum = zero, zero, zero
        low = tl.full([GROUPS], float("inf"), tl.float64)
        high = tl.full([GROUPS], -float("inf"), tl.float64)
        for start in range(0, longest, LANES):
            _, r, _ = _samples(order_ptr, rewards_ptr, begin, end, start, HAS_ORDER, LANES)
            scored = r == r
            count += tl.sum(tl.where(scored, 1.0, 0.0).to(tl.float64), axis=1)
            total += tl.sum(tl.where(scored, r, 0.0), axis=1)
            square_sum += tl.sum(tl.where(scored, r * r, 0.0), axis=1)
            low = tl.minimum(low, tl.min(tl.where(scored, r, float("inf")), axis=1))
            high = tl.maximum(high, tl.max(tl.where(scored, r, -float("inf")), axis=1))

        # Second pass: deviations from a mean that is off by its rounding, which their sum corrects.
        mean = total / tl.maximum(count, 1.0)
        deviation, squares = zero, zero
        for start in range(0, longest, LANES):
            _, r, _ = _samples(order_ptr, rewards_ptr, begin, end, start, HAS_ORDER, LANES)
            d = tl.where(r == r, r - mean[:, None], 0.0)
            deviation += tl.sum(d, axis=1)
            squares += tl.sum(d * d, axis=1)
        scored_any = count > 0
        flat = scored_any & (low == high)
        mean = mean + deviation / tl.maximum(count, 1.0)
        mean = tl.where(flat, low, tl.where(scored_any, mean, 0.0))
        squares = squares - deviation * deviation / tl.maximum(count, 1.0)
        squares = tl.where(flat, 0.0, squares)
        if UNBIASED:
            std = tl.sqrt(squares / tl.maximum(count - 1, 1.0))
        else:
            std = tl.sqrt(squares / tl.maximum(count, 1.0))

        filtered = count < 0
        if ALL_CORRECT:
            filtered = filtered | (scored_any & (low > 0))
        if ALL_WRONG:
            filtered = filtered | (scored_any & (high <= 0))
        if ZERO_STD:
            filtered = filtered | flat

        for start in range(0, longest, LANES):
            sample, r, inside = _samples(
                order_ptr, rewards_ptr, begin, end, start, HAS_ORDER, LANES
            )
            value = _value(
                r,
                count[:, None],
                mean[:, None],
                std[:, None],
                low[:, None],
                high[:, None],
                eps,
                offset,
                scale,
                METHOD,
            )
            scored = r == r
            live = scored & (filtered[:, None] == 0)
            dead = 0.0
            if OF_BATCH:
                dead = float("nan")  # marks what the batch must not scale
            value = tl.where(live, value, dead)
            tl.store(value_ptr + sample, value.to(value_ptr.dtype.element_ty), mask=inside)
            keep = live if DROP else scored
            tl.store(keep_ptr + sample, keep.to(tl.int8), mask=inside)

        size = (end - begin).to(tl.float64)
        out = tl.where(filtered, count, 0.0)
        n_samples += size
        n_groups += tl.where(size > 0, 1.0, 0.0)
        n_flat += tl.where(flat, 1.0, 0.0)
        n_filtered += out
        n_nan += size - count
        n_kept += (count - out) if DROP else count
        reward_sum += total
        reward_sq_sum += square_sum
        if OF_BATCH:
            in_batch = scored_any
            if DROP:
                in_batch = in_batch & (filtered == 0)
            mapped_low, mapped_high = offset + scale * low, offset + scale * high
            g_mean = offset + scale * mean
            if METHOD == _WHITEN_BASELINE:
                # Deviations from the group's own mean sum to exactly 0; a group of one has mean 0.
                g_mean = tl.where(count == 1, g_mean, 0.0)
                mapped_low = tl.where(count == 1, mapped_low, scale * (low - mean))
                mapped_high = tl.where(count == 1, mapped_high, scale * (high - mean))
            g_count = tl.where(in_batch, count, 0.0)
            share = g_count / tl.maximum(b_count + g_count, 1.0)
            apart = tl.where(in_batch, g_mean - b_mean, 0.0)
            b_squares += tl.where(in_batch, scale * scale * squares, 0.0)
            b_squares += apart * apart * (b_count * share)
            b_mean += apart * share
            b_count += g_count
            lower = tl.minimum(mapped_low, mapped_high)
            upper = tl.maximum(mapped_low, mapped_high)
            b_low = tl.minimum(b_low, tl.where(in_batch, lower, float("inf")))
            b_high = tl.maximum(b_high, tl.where(in_batch, upper, -float("inf")))

    columns = tl.num_programs(0) * GROUPS
    column = partial_ptr + tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    sums = (  # in the order of METRICS, then the batch
        n_samples,
        n_groups,
        n_flat,
        n_filtered,
        n_nan,
        reward_sum,
        reward_sq_sum,
        n_kept,
        b_count,
        b_mean,
        b_squares,
        b_low,
        b_high,
    )
    for i in tl.static_range(_METRICS + 5):
        tl.store(column + i * columns, sums[i])


def _batch_scale(batch: Tensor, method: int, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, standard deviation and flatness (0-d) from the columns batch [5, columns]."""
    count, mean, squares = batch[0].sum(), batch[1], batch[2]
    shift = (batch[0] * mean).sum() / count.clamp(min=1)
    squares = squares.sum() + (batch[0] * (mean - shift).square()).sum()
    std = (squares / (count - int(unbiased)).clamp(min=1)).sqrt()
    one = count <= 1  # a batch of one has mean 0 and standard deviation 1
    shift = torch.where(one | (method == _BATCH_STD.value), 0.0, shift)
    flat = ~one & (batch[3].min() == batch[4].max())
    return shift, torch.where(one, 1.0, std), flat


def group_advantage_terms(
    rewards: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    method: int,
    unbiased: bool,
    eps: float,
    filters: int,
    drop: bool,
    offset: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages fp32 [n], keep bool [n] and metrics float64 [len(METRICS)].

    rewards [n] float64; group g is order[offsets[g] : offsets[g + 1]] with order [n] (None: as
    they lie) and offsets [G + 1] int64, empty groups allowed. By `method`, the index into METHODS,
    with x = offset + scale * reward:

        grpo      (x - mean) / (std + eps)      mean  x - mean      rloo     x - mean of the others
        positive  1[x = highest]                raw   x             correct  1[x > 0]
        batch_std (x - mean) / (std of the batch + eps)
        whiten    (x - mean of the batch) / (std of the batch + eps)
        whiten_baseline  x - mean, then whitened as above

    std divides by count - 1 if `unbiased`, else by count. A group (or batch) of one has mean 0 and
    std 1 (rloo: advantage 0); equal rewards have advantage 0 where a mean is subtracted. A NaN
    reward leaves its group and the batch: advantage 0, keep false. Bits of `filters`: 1 every
    reward > 0, 2 every reward <= 0, 4 all equal; a filtered group has advantage 0 and, with `drop`,
    keep false and no part in the batch's statistics. Deterministic; nothing waits for the device.
    ValueError for another method, filter, dtype, shape or stride.
    """
    if method not in range(len(METHODS)):
        raise ValueError(f"method={method!r}: expected an index into {list(METHODS)}")
    if filters not in range(8):
        raise ValueError(f"filters={filters!r}: expected a set of the bits 1, 2 and 4")
    n, groups = rewards.numel(), offsets.numel() - 1
    require(torch.float64, (n,), rewards=rewards)
    require(torch.int64, (n,), order=order)
    require(torch.int64, (max(groups, 0) + 1,), offsets=offsets)
    of_batch = METHODS[method] in ("batch_std", "whiten", "whiten_baseline")
    value = torch.empty_like(rewards, dtype=torch.float64 if of_batch else torch.float32)
    keep = torch.empty_like(rewards, dtype=torch.bool)
    programs = max(1, min(triton.cdiv(groups, GROUPS.groups), GROUP_PROGRAMS))
    partial = rewards.new_empty(len(METRICS) + 5, programs * GROUPS.groups)
    with torch.cuda.device_of(rewards):
        _group_advantage_kernel[(programs,)](
            rewards,
            order,
            offsets,
            value,
            keep.view(torch.int8),
            partial,
            groups,
            float(eps),
            float(offset),
            float(scale),
            METHOD=method,
            OF_BATCH=of_batch,
            UNBIASED=bool(unbiased),
            ALL_CORRECT=bool(filters & 1),
            ALL_WRONG=bool(filters & 2),
            ZERO_STD=bool(filters & 4),
            DROP=bool(drop),
            HAS_ORDER=order is not None,
            GROUPS=GROUPS.groups,
            LANES=GROUPS.lanes,
            num_warps=GROUPS.warps,
            enable_fp_fusion=True,
        )
    metrics = partial[: len(METRICS)].sum(dim=1)
    if not of_batch:
        return value, keep, metrics
    shift, std, flat = _batch_scale(partial[len(METRICS) :], method, unbiased)
    scaled = torch.where(value.isnan() | flat, 0.0, (value - shift) / (std + eps))
    return scaled.float(), keep, metrics
