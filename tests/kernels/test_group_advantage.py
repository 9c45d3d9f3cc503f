"""group_advantage_terms against a loop over the groups in Python floats."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.kernels import group_advantage
from pyrl.kernels.tuning import GROUPS

METHODS = group_advantage.METHODS


def reference(rewards: list[float], method: str, unbiased: bool, eps: float) -> list[float]:
    """Advantages of one group's rewards."""
    scored = [r for r in rewards if not math.isnan(r)]
    if not scored:
        return [0.0] * len(rewards)
    alone, equal = len(scored) == 1, len(scored) > 1 and min(scored) == max(scored)
    mean = 0.0 if alone else statistics.fmean(scored)
    spread = statistics.stdev if unbiased else statistics.pstdev
    std = 1.0 if alone else spread(scored)

    def one(r: float) -> float:
        if math.isnan(r) or (equal and method in ("grpo", "mean", "rloo")):
            return 0.0
        if method == "rloo":
            return 0.0 if alone else r - (math.fsum(scored) - r) / (len(scored) - 1)
        return {
            "grpo": (r - mean) / (std + eps) if method == "grpo" else 0.0,
            "mean": r - mean,
            "positive": float(r == max(scored)),
            "raw": r,
        }[method]

    return [one(r) for r in rewards]


def check(
    groups: list[list[float]], method: str, unbiased: bool, eps: float, device: torch.device
) -> None:
    """The samples of all groups, shuffled; trailing groups stay empty."""
    n = sum(map(len, groups))
    position = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    offsets = torch.full((n + 1,), n)
    offsets[: len(groups) + 1] = torch.tensor([0, *map(len, groups)]).cumsum(0)
    rewards = torch.empty(n)
    rewards[position] = torch.tensor([r for group in groups for r in group])
    got = group_advantage.group_advantage_terms(
        rewards.to(device),
        position.to(device),
        offsets.to(device),
        METHODS.index(method),
        unbiased,
        eps,
    )
    advantages, low, high = (value.cpu()[position] for value in got)
    start = 0
    for group in groups:
        group = torch.tensor(group).tolist()  # as fp32 holds them
        members = slice(start, start + len(group))
        start += len(group)
        # Statistics are float64: one rounding to fp32 of the exact value, and of its inputs none.
        expected = torch.tensor(reference(group, method, unbiased, eps), dtype=torch.float64)
        torch.testing.assert_close(advantages[members].double(), expected, rtol=1e-7, atol=1e-12)
        scored = [r for r in group if not math.isnan(r)]
        for values, extreme in ((low, min), (high, max)):
            edges = [math.nan if math.isnan(r) else extreme(scored) for r in group]
            torch.testing.assert_close(
                values[members], torch.tensor(edges), rtol=0, atol=0, equal_nan=True
            )


rewards = st.sampled_from([0.0, 1.0, -1.0, 0.1, 0.7, 100.25, math.nan])


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.lists(rewards, min_size=1, max_size=9), min_size=1, max_size=12),
    method=st.sampled_from(METHODS),
    unbiased=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-4, 0.0]),
)
def test_matches_a_loop(
    groups: list, method: str, unbiased: bool, eps: float, device: torch.device
) -> None:
    check(groups, method, unbiased, eps, device)


@pytest.mark.parametrize("method", METHODS)
def test_groups_longer_than_a_tile(method: str, device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = [2 * GROUPS.lanes + 5, 1, GROUPS.lanes, GROUPS.lanes + 1, 3]
    groups = [torch.randn(size, generator=draw).tolist() for size in sizes]
    groups[0][7] = math.nan
    check(groups, method, True, 1e-6, device)


@pytest.mark.parametrize("method", ["grpo", "mean", "rloo"])
def test_equal_rewards_have_no_advantage(method: str, device: torch.device) -> None:
    # A mean rounded in fp32 would be off by an ulp, and eps would blow it up.
    check([[0.1] * 7, [1e6 + 0.1] * 3], method, True, 0.0, device)


def test_group_of_one(device: torch.device) -> None:
    for method, expected in zip(METHODS, (3.0 / 1.5, 3.0, 0.0, 1.0, 3.0), strict=True):
        got = group_advantage.group_advantage_terms(
            torch.tensor([3.0], device=device),
            torch.tensor([0], device=device),
            torch.tensor([0, 1], device=device),
            METHODS.index(method),
            True,
            0.5,
        )
        assert [value.item() for value in got] == [expected, 3.0, 3.0]


def test_no_samples(device: torch.device) -> None:
    empty = torch.empty(0, device=device)
    index = torch.empty(0, dtype=torch.int64, device=device)
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    got = group_advantage.group_advantage_terms(empty, index, offsets, 0, True, 1e-6)
    assert [tuple(value.shape) for value in got] == [(0,)] * 3


def test_refuses_what_it_would_misread(device: torch.device) -> None:
    r, order, offsets = torch.zeros(2), torch.arange(2), torch.tensor([0, 2, 2])
    with pytest.raises(ValueError, match="method=7: expected an index"):
        group_advantage.group_advantage_terms(r, order, offsets, 7, True, 1e-6)
    with pytest.raises(ValueError, match="offsets: expected"):
        group_advantage.group_advantage_terms(r, order, offsets[:2], 0, True, 1e-6)
    with pytest.raises(ValueError, match="order: expected"):
        group_advantage.group_advantage_terms(r, order.int(), offsets, 0, True, 1e-6)
