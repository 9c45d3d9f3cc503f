"""Group-relative advantages: one pass over groups of any sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import require
from .tuning import GROUPS

#: The methods in the order of the integer that selects them.
METHODS = ("grpo", "mean", "rloo", "positive", "raw")

_GRPO, _MEAN, _RLOO, _POSITIVE = (tl.constexpr(i) for i in range(4))


@triton.jit
def _samples(order_ptr, rewards_ptr, begin, end, start, LANES: tl.constexpr):
    """Sample index, reward (nan outside) and mask [GROUPS, LANES] of members start ... of each
    group."""
    position = begin[:, None] + (start + tl.arange(0, LANES))[None, :]
    inside = position < end[:, None]
    sample = tl.load(order_ptr + position, mask=inside, other=0)
    reward = tl.load(rewards_ptr + sample, mask=inside, other=float("nan"))
    return sample, reward.to(tl.float64), inside


@triton.jit
def _advantage(r, count, total, std, low, high, eps, METHOD: tl.constexpr):
    """The advantage of rewards r[GROUPS, LANES] from the statistics [GROUPS, 1] of their groups."""
    alone = count <= 1
    mean = tl.where(alone, 0.0, total / tl.maximum(count, 1.0))
    if METHOD == _GRPO:
        advantage = (r - mean) / (tl.where(alone, 1.0, std) + eps)
    elif METHOD == _MEAN:
        advantage = r - mean
    elif METHOD == _RLOO:
        others = (total - r) / tl.maximum(count - 1, 1.0)
        advantage = tl.where(alone, 0.0, r - others)
    elif METHOD == _POSITIVE:
        advantage = tl.where(r == high, 1.0, 0.0)
    else:
        advantage = r
    if METHOD <= _RLOO:
        # Equal rewards: no 0 / 0 for eps = 0.
        advantage = tl.where((low == high) & (count > 1), 0.0, advantage)
    return advantage


@triton.jit
def _group_advantage_kernel(
    rewards_ptr,
    order_ptr,
    offsets_ptr,
    advantages_ptr,
    low_ptr,
    high_ptr,
    n,
    eps: tl.float64,
    METHOD: tl.constexpr,
    UNBIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """GROUPS of the n possible groups a program; statistics in float64, NaN rewards left out."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    begin = tl.load(offsets_ptr + group, mask=group < n, other=0)
    end = tl.load(offsets_ptr + group + 1, mask=group < n, other=0)
    longest = tl.max(end - begin, axis=0)

    count = tl.zeros([GROUPS], tl.float64)
    total = tl.zeros([GROUPS], tl.float64)
    low = tl.full([GROUPS], float("inf"), tl.float64)
    high = tl.full([GROUPS], -float("inf"), tl.float64)
    for start in range(0, longest, LANES):
        _, r, _ = _samples(order_ptr, rewards_ptr, begin, end, start, LANES)
        scored = r == r
        count += tl.sum(tl.where(scored, 1.0, 0.0).to(tl.float64), axis=1)
        total += tl.sum(tl.where(scored, r, 0.0), axis=1)
        low = tl.minimum(low, tl.min(tl.where(scored, r, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(scored, r, -float("inf")), axis=1))

    std = tl.zeros([GROUPS], tl.float64)
    if METHOD == _GRPO:
        mean = total / tl.maximum(count, 1.0)
        for start in range(0, longest, LANES):
            _, r, _ = _samples(order_ptr, rewards_ptr, begin, end, start, LANES)
            deviation = tl.where(r == r, r - mean[:, None], 0.0)
            std += tl.sum(deviation * deviation, axis=1)
        if UNBIASED:
            std = tl.sqrt(std / tl.maximum(count - 1, 1.0))
        else:
            std = tl.sqrt(std / tl.maximum(count, 1.0))

    for start in range(0, longest, LANES):
        sample, r, inside = _samples(order_ptr, rewards_ptr, begin, end, start, LANES)
        scored = r == r
        advantage = _advantage(
            r,
            count[:, None],
            total[:, None],
            std[:, None],
            low[:, None],
            high[:, None],
            eps,
            METHOD,
        )
        nan = tl.full(r.shape, float("nan"), tl.float32)
        advantage = tl.where(scored, advantage.to(tl.float32), 0.0)
        tl.store(advantages_ptr + sample, advantage, mask=inside)
        tl.store(low_ptr + sample, tl.where(scored, low[:, None].to(tl.float32), nan), mask=inside)
        tl.store(
            high_ptr + sample, tl.where(scored, high[:, None].to(tl.float32), nan), mask=inside
        )


def group_advantage_terms(
    rewards: Tensor, order: Tensor, offsets: Tensor, method: int, unbiased: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantage, and lowest and highest reward of the sample's group, each fp32 [n].

    rewards [n] fp32; group g is order[offsets[g] : offsets[g + 1]] with order [n] and offsets
    [n + 1] int64 (trailing groups may be empty). By `method`, the index into METHODS:

        grpo      (r - mean) / (std + eps)      mean  r - mean      rloo  r - mean of the others
        positive  1[r = highest]                raw   r

    std divides by count - 1 if `unbiased`, else by count. A group of one has mean 0 and std 1
    (rloo: advantage 0); a group of equal rewards has advantage 0 under grpo, mean and rloo. A NaN
    reward leaves its group, with advantage 0 and low = high = nan. ValueError for another method,
    dtype, shape or stride.
    """
    if method not in range(len(METHODS)):
        raise ValueError(f"method={method!r}: expected an index into {list(METHODS)}")
    n = rewards.numel()
    require(torch.float32, (n,), rewards=rewards)
    require(torch.int64, (n,), order=order)
    require(torch.int64, (n + 1,), offsets=offsets)
    advantages, low, high = (torch.empty_like(rewards) for _ in range(3))
    if n == 0:
        return advantages, low, high
    with torch.cuda.device_of(rewards):
        _group_advantage_kernel[(triton.cdiv(n, GROUPS.groups),)](
            rewards,
            order,
            offsets,
            advantages,
            low,
            high,
            n,
            float(eps),
            METHOD=method,
            UNBIASED=bool(unbiased),
            GROUPS=GROUPS.groups,
            LANES=GROUPS.lanes,
            num_warps=GROUPS.warps,
            enable_fp_fusion=True,
        )
    return advantages, low, high
