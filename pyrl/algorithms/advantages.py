"""Advantages of a batch of groups, through the fused `group_advantage`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from pyrl.algorithms.experience import Group
from pyrl.ops.group_advantage import group_advantage


def assign_advantages(
    groups: Sequence[Group],
    *,
    method: str = "grpo",
    filter: str | Sequence[str] | None = None,
    filter_mode: Literal["zero", "drop"] = "zero",
    unbiased: bool = True,
    eps: float = 1e-6,
    reward_map: Literal["identity", "signed"] = "identity",
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> dict[str, float]:
    """Sets `advantage` and `keep` of every attempt: A = group_advantage(map(rewards), groups).

    reward_map: identity r, signed 2r - 1 (rewards in {0, 1} become {-1, 1}; Reinforce and the
    correct/wrong filters depend on it). A reward that is not finite in fp32 counts as lost.
    device: where the rewards are put, which decides what backends can do. Everything else as in
    `group_advantage`, whose metrics are returned as numbers.
    """
    attempts = [attempt for group in groups for attempt in group.attempts]
    rewards = torch.tensor([a.reward for a in attempts], dtype=torch.float32, device=device)
    if reward_map == "signed":
        rewards = 2 * rewards - 1
    rewards = torch.where(rewards.isfinite(), rewards, torch.nan)
    ids = [i for i, group in enumerate(groups) for _ in group.attempts]
    result = group_advantage(
        rewards,
        torch.tensor(ids, dtype=torch.int64, device=device),
        method=method,
        filter=filter if filter is None or isinstance(filter, str) else tuple(filter),
        filter_mode=filter_mode,
        unbiased=unbiased,
        eps=eps,
        backend=backend,
    )
    pairs = zip(attempts, result.advantages.tolist(), result.keep.tolist(), strict=True)
    for attempt, advantage, keep in pairs:
        attempt.advantage, attempt.keep = advantage, keep
    return {name: float(value) for name, value in result.metrics.items()}
