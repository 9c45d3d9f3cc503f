"""Group-relative advantages: normalisation inside each prompt's group of samples, and filters."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyrl.ops import reference
from pyrl.ops.backend import load, select

METHODS = ("grpo", "mean", "rloo", "positive", "raw")
FILTERS = ("drop_all_correct", "drop_all_wrong", "drop_zero_std")


class Advantages(NamedTuple):
    """Advantages [n] fp32, which samples stay in the batch [n] bool, and sums and counts."""

    advantages: Tensor
    keep: Tensor
    metrics: dict[str, Tensor]


def group_advantage(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    method: str = "grpo",
    filter: str | tuple[str, ...] | None = None,
    filter_mode: Literal["zero", "drop"] = "zero",
    unbiased: bool = True,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Advantages:
    """(r - mean_g) / (std_g + eps) inside each group g, and its variants.

    rewards [n] floating · group_ids [n] integers, any values, any order, any group sizes.
    method: grpo (above; `unbiased` std has ddof=1) · mean (r - mean; Dr.GRPO) · rloo (r - mean of
    the others) · positive (1[r = max of the group]; RAFT) · raw (r). A group of one has mean 0 and
    std 1 (rloo: 0). Equal rewards give exactly 0 for grpo, mean and rloo.
    filter: drop_all_correct (every r > 0), drop_all_wrong (every r <= 0), drop_zero_std (all
    equal), or several; filter_mode "zero" sets A = 0 and keeps the tokens in the denominator,
    "drop" also clears `keep`. A NaN reward leaves its group: A = 0, keep false, counted.

    metrics: samples, groups, zero_std_groups, filtered, nan_rewards. Sources: GRPO arXiv
    2402.03300, RLOO arXiv 2402.14740, RAFT and the filters arXiv 2504.11343.
    """
    n = rewards.numel()
    if rewards.dim() != 1 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards: expected floating [n], got {rewards.dtype} {tuple(rewards.shape)}"
        )
    if group_ids.shape != rewards.shape or group_ids.is_floating_point():
        raise ValueError(
            f"group_ids: expected integers {tuple(rewards.shape)}, "
            f"got {group_ids.dtype} {tuple(group_ids.shape)}"
        )
    if group_ids.device != rewards.device:
        raise ValueError(
            f"group_ids: expected a tensor on {rewards.device}, got {group_ids.device}"
        )
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {list(METHODS)}")
    filters = (filter,) if isinstance(filter, str) else tuple(filter or ())
    for name in filters:
        if name not in FILTERS:
            raise ValueError(f"filter={name!r}: expected one of {list(FILTERS)}")
    if filter_mode not in ("zero", "drop"):
        raise ValueError(f"filter_mode={filter_mode!r}: expected 'zero' or 'drop'")
    if not eps >= 0:
        raise ValueError(f"eps={eps!r}: expected a number >= 0")
    if rewards.device.type == "cpu" and not torch.compiler.is_compiling():
        infinite = rewards.isinf().nonzero()
        if infinite.numel():
            i = int(infinite[0])
            raise ValueError(f"rewards[{i}] = {float(rewards[i])} is infinite")

    which = select(backend, rewards.device)
    r = rewards.detach()
    order = group_ids.argsort(stable=True)
    ids = group_ids[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    if which == "reference":
        advantages, low, high = reference.group_advantage(r, group_ids, method, unbiased, eps)
        advantages, low, high = advantages.float(), low.float(), high.float()
    else:
        # Group bounds without asking the device how many groups there are: n + 1 offsets, of which
        # those past the last group all say n.
        dense = first.cumsum(0) - 1
        counts = torch.zeros(n, dtype=torch.int64, device=r.device)
        counts = counts.scatter_add(0, dense, torch.ones_like(dense))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        advantages, low, high = _group_advantage(
            r.float().contiguous(), order, offsets, METHODS.index(method), unbiased, eps, which
        )

    scored = ~r.isnan()
    filtered = torch.zeros_like(scored)
    for name in filters:
        filtered |= {
            "drop_all_correct": low > 0,
            "drop_all_wrong": high <= 0,
            "drop_zero_std": low == high,
        }[name]
    advantages = torch.where(filtered, 0.0, advantages)
    keep = scored & ~filtered if filter_mode == "drop" else scored
    # One flag a group: whether any scored member says the group has no spread.
    flat = torch.zeros_like(order).scatter_reduce(
        0, first.cumsum(0) - 1, (scored & (low == high))[order].long(), "amax"
    )
    metrics = {
        "samples": torch.tensor(n, device=r.device),
        "groups": first.sum(),
        "zero_std_groups": flat.sum(),
        "filtered": filtered.sum(),
        "nan_rewards": (~scored).sum(),
    }
    return Advantages(advantages, keep, {k: v.double() for k, v in metrics.items()})


@torch.library.custom_op("pyrl::group_advantage", mutates_args=())
def _group_advantage(
    rewards: Tensor,
    order: Tensor,
    offsets: Tensor,
    method: int,
    unbiased: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, group minimum and group maximum, each fp32 [n] in the samples' order."""
    return load(backend).group_advantage_terms(rewards, order, offsets, method, unbiased, eps)


@_group_advantage.register_fake
def _(rewards, order, offsets, method, unbiased, eps, backend):
    return tuple(torch.empty_like(rewards) for _ in range(3))
