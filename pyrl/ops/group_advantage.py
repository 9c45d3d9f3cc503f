"""Group-relative advantages: normalisation inside each prompt's group of samples, and filters."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyrl.ops import reference
from pyrl.ops.backend import load, select

#: In the order of the integer that native kernels read.
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
#: In the order of the bits that native kernels read.
FILTERS = ("drop_all_correct", "drop_all_wrong", "drop_zero_std")
#: Order of the float64 vector of sums and counts that every backend returns.
METRICS = (
    "samples",
    "groups",  # with at least one sample
    "zero_std_groups",  # with scored samples, all equal
    "filtered",  # scored samples of filtered groups
    "nan_rewards",
    "reward_sum",  # of the rewards as given
    "reward_sq_sum",
    "kept",  # samples whose `keep` is true
)


class Advantages(NamedTuple):
    """Advantages [n] fp32, which samples stay in the batch [n] bool, and sums and counts."""

    advantages: Tensor
    keep: Tensor
    metrics: dict[str, Tensor]


def group_advantage(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_offsets: Tensor | None = None,
    method: str = "grpo",
    filter: str | tuple[str, ...] | None = None,
    filter_mode: Literal["zero", "drop"] = "zero",
    unbiased: bool = True,
    eps: float = 1e-6,
    reward_map: tuple[float, float] | None = None,
    backend: str | None = None,
) -> Advantages:
    """(r - mean_g) / (std_g + eps) inside each group g, and its variants.

    rewards [n] floating · groups, of any sizes: group_ids [n] integers, any values in any order, or
    group_offsets [G + 1] integers: group g is rewards[group_offsets[g] : group_offsets[g + 1]].

        grpo      (r - mean_g) / (std_g + eps)          mean      r - mean_g (Dr.GRPO)
        rloo      r - mean of the group's others        positive  1[r = max_g] (RAFT)
        raw       r                                     correct   1[r > 0]
        scaled    r / (std_g + eps), no mean
        batch_std (r - mean_g) / (std of all + eps)
        whiten    (r - mean of all) / (std of all + eps) (Reinforce++)
        whiten_baseline  x = r - mean_g, then (x - mean of all x) / (std of all x + eps)
                         (Reinforce++-baseline)

    `unbiased` standard deviations have ddof=1. A group, or batch, of one has mean 0 and std 1
    (rloo: 0). Equal rewards of a group give exactly 0 for grpo, scaled, mean, rloo and batch_std,
    equal rewards of the batch for every method that subtracts a mean. "All" are the samples of this
    call.
    reward_map (a, b): methods read a + (b - a) r instead of r; (-1, 1) makes {0, 1} rewards signed,
    another problem for raw and Reinforce.
    filter, on the rewards as given: drop_all_correct (every r > 0), drop_all_wrong (every r <= 0),
    drop_zero_std (all equal), or several; filter_mode "zero" sets A = 0 and keeps the tokens in the
    denominator, "drop" also clears `keep` and leaves the samples out of the batch's mean and std.
    A NaN reward leaves its group and the batch: A = 0, keep false, counted.

    Statistics are float64 and the same bits on every call; nothing waits for the device. metrics:
    see METRICS. Sources: GRPO arXiv 2402.03300, Dr.GRPO 2503.20783, RLOO 2402.14740, RAFT and the
    filters 2504.11343, Reinforce++ 2501.03262.
    """
    if rewards.dim() != 1 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards: expected floating [n], got {rewards.dtype} {tuple(rewards.shape)}"
        )
    if (group_ids is None) == (group_offsets is None):
        raise ValueError("expected either group_ids or group_offsets")
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
    if reward_map is not None and len(reward_map) != 2:
        raise ValueError(f"reward_map={reward_map!r}: expected two different finite numbers")
    low, high = reward_map or (0.0, 1.0)
    if not math.isfinite(high - low) or low == high:
        raise ValueError(f"reward_map={reward_map!r}: expected two different finite numbers")
    if _on_host(rewards):
        infinite = rewards.isinf().nonzero()
        if infinite.numel():
            i = int(infinite[0])
            raise ValueError(f"rewards[{i}] = {float(rewards[i])} is infinite")
    if group_ids is not None:
        order, offsets = _groups_of_ids(rewards, group_ids)
    else:
        order, offsets = None, _checked_offsets(rewards, group_offsets)
    advantages, keep, metrics = _group_advantage(
        rewards.detach().double().contiguous(),
        order,
        offsets,
        METHODS.index(method),
        unbiased,
        float(eps),
        sum(1 << FILTERS.index(name) for name in set(filters)),
        filter_mode == "drop",
        float(low),
        float(high - low),
        select(backend, rewards.device),
    )
    if _on_host(advantages):
        huge = (~advantages.isfinite()).nonzero()
        if huge.numel():
            i = int(huge[0])
            raise ValueError(
                f"rewards[{i}] = {float(rewards[i])}: its advantage is beyond fp32 (eps={eps})"
            )
    return Advantages(advantages, keep, dict(zip(METRICS, metrics.unbind(), strict=True)))


def _on_host(value: Tensor) -> bool:
    # Values are read where that costs no wait for the device and does not break a traced graph.
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def _groups_of_ids(rewards: Tensor, ids: Tensor) -> tuple[Tensor | None, Tensor]:
    """Sample indices sorted by group (None: they are), and n + 1 offsets of which those past the
    last group all say n: nobody asks the device how many groups there are."""
    _check_integers("group_ids", ids, rewards)
    if ids.shape != rewards.shape:
        raise ValueError(
            f"group_ids: expected integers {tuple(rewards.shape)}, got {tuple(ids.shape)}"
        )
    order, ids = None, ids.long()  # torch sorts few of the unsigned dtypes
    if not (_on_host(ids) and bool((ids[1:] >= ids[:-1]).all())):
        order = ids.argsort(stable=True)
        ids = ids[order]
    n = ids.numel()
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    offsets = torch.full((n + 1,), n, dtype=torch.int64, device=ids.device)
    position = torch.arange(n, device=ids.device)
    # A group's first sample writes its position; the others all write n to the last offset.
    slot = torch.where(first, first.cumsum(0) - 1, n)
    return order, offsets.scatter_(0, slot, torch.where(first, position, n))


def _checked_offsets(rewards: Tensor, group_offsets: Tensor | None) -> Tensor:
    assert group_offsets is not None
    _check_integers("group_offsets", group_offsets, rewards)
    if group_offsets.dim() != 1 or group_offsets.numel() < 1:
        raise ValueError(
            f"group_offsets: expected integers [G + 1], got {tuple(group_offsets.shape)}"
        )
    offsets = group_offsets.to(torch.int64).contiguous()
    if _on_host(offsets):
        n = rewards.numel()
        if int(offsets[0]) != 0 or int(offsets[-1]) != n:
            raise ValueError(
                f"group_offsets must run from 0 to n={n}, got {int(offsets[0])} … "
                f"{int(offsets[-1])}"
            )
        falls = (offsets.diff() < 0).nonzero()
        if falls.numel():
            i = int(falls[0])
            raise ValueError(
                f"group_offsets falls at {i + 1}: {int(offsets[i])} → {int(offsets[i + 1])}"
            )
    return offsets


def _check_integers(name: str, value: Tensor, rewards: Tensor) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {value.dtype}")
    if value.device != rewards.device:
        raise ValueError(f"{name}: expected a tensor on {rewards.device}, got {value.device}")


@torch.library.custom_op("pyrl::group_advantage", mutates_args=())
def _group_advantage(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages fp32 [n], keep bool [n], METRICS float64; methods read offset + scale * r."""
    arguments = (unbiased, eps, filters, drop, offset, scale)
    if backend != "reference":
        return load(backend).group_advantage_terms(rewards, order, offsets, method, *arguments)
    ids = torch.arange(offsets.numel() - 1, device=rewards.device).repeat_interleave(offsets.diff())
    group_ids = ids if order is None else torch.empty_like(ids).scatter_(0, order, ids)
    exact, keep, metrics = reference.group_advantage(
        rewards, group_ids, METHODS[method], *arguments
    )
    return exact.float(), keep, metrics


@_group_advantage.register_fake
def _(rewards, order, offsets, method, unbiased, eps, filters, drop, offset, scale, backend):
    return (
        torch.empty_like(rewards, dtype=torch.float32),
        torch.empty_like(rewards, dtype=torch.bool),
        rewards.new_empty(len(METRICS), dtype=torch.float64),
    )
