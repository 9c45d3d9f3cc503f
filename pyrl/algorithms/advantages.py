"""Advantages of a batch of groups, through the fused `group_advantage`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch

from pyrl.algorithms.experience import Group, RewardMap
from pyrl.ops.group_advantage import group_advantage

#: Methods whose advantage is 1 for accepted completions and 0 for the others.
JUDGES = ("positive", "correct")


def assign_advantages(
    groups: Sequence[Group],
    *,
    method: str = "grpo",
    filter: str | Sequence[str] | None = None,
    filter_mode: Literal["zero", "drop"] = "zero",
    unbiased: bool = True,
    eps: float = 1e-6,
    reward_map: RewardMap = "identity",
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> dict[str, float]:
    """Sets `advantage` and `keep` of every attempt:

        A = group_advantage(map(rewards) + bonuses, groups), filtered by map(rewards) alone.

    reward_map: identity r, signed 2r - 1 (rewards in {0, 1} become {-1, 1}; Reinforce and the
    correct/wrong filters depend on it). A bonus is added after the map, and no filter sees it: a
    length penalty does not turn a solved group into an unsolved one, nor make equal rewards differ.
    Nor do the methods that only say which completions are accepted (`JUDGES`) see it.
    A reward, or its sum with the bonus, that is not finite in fp32 counts as lost. device: where
    the rewards are put, which decides what backends can do. Everything else as in
    `group_advantage`, whose metrics are returned as numbers, of map(rewards) without the bonuses.
    """
    attempts = [attempt for group in groups for attempt in group.attempts]
    rewards = torch.tensor([a.reward for a in attempts], dtype=torch.float32, device=device)
    if reward_map == "signed":
        rewards = 2 * rewards - 1
    totals = None
    if method not in JUDGES and any(a.bonus != 0 for a in attempts):
        bonus = torch.tensor([a.bonus for a in attempts], dtype=torch.float32, device=device)
        totals = torch.where((rewards + bonus).isfinite(), rewards + bonus, torch.nan)
        rewards = torch.where(totals.isnan(), torch.nan, rewards)
    rewards = torch.where(rewards.isfinite(), rewards, torch.nan)
    numbers = [i for i, group in enumerate(groups) for _ in group.attempts]
    ids = torch.tensor(numbers, dtype=torch.int64, device=device)
    filters = filter if filter is None or isinstance(filter, str) else tuple(filter)
    advantage = functools.partial(
        group_advantage, method=method, unbiased=unbiased, eps=eps, backend=backend
    )
    if totals is None:
        result = advantage(rewards, ids, filter=filters, filter_mode=filter_mode)
        values, keep, metrics = result.advantages, result.keep, result.metrics
    else:
        judged = group_advantage(
            rewards, ids, method="raw", filter=filters, filter_mode="drop", backend=backend
        )
        filtered = ~judged.keep & ~rewards.isnan()
        if filter_mode == "drop":  # out of the batch's statistics too
            totals = torch.where(filtered, torch.nan, totals)
        result = advantage(totals, ids)
        values, keep = torch.where(filtered, 0.0, result.advantages), result.keep
        metrics = {**judged.metrics, "kept": result.metrics["kept"]}
    for attempt, value, kept in zip(attempts, values.tolist(), keep.tolist(), strict=True):
        attempt.advantage, attempt.keep = value, kept
    return {name: float(value) for name, value in metrics.items()}
