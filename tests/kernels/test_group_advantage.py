"""group_advantage_terms of Triton against the float64 oracle: tiles, strides and programs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.kernels import group_advantage
from pyrl.kernels.tuning import GROUPS
from pyrl.ops import reference

METHODS = group_advantage.METHODS
NAN = float("nan")


def layout(
    groups: list[list[float]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards [n], order, offsets (three trailing groups empty) and ids of shuffled groups."""
    n = sum(map(len, groups))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    offsets = torch.full((len(groups) + 4,), n)
    offsets[: len(groups) + 1] = torch.tensor([0, *map(len, groups)]).cumsum(0)
    rewards = torch.empty(n, dtype=torch.float64)
    rewards[order] = torch.tensor([r for group in groups for r in group], dtype=torch.float64)
    ids = torch.empty(n, dtype=torch.int64)
    ids[order] = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    return rewards.to(device), order.to(device), offsets.to(device), ids.to(device)


def check(groups: list[list[float]], options: tuple, device: torch.device) -> None:
    rewards, order, offsets, ids = layout(groups, device)
    method, *rest = options
    expected = reference.group_advantage(rewards, ids, METHODS[method], *rest)
    got = group_advantage.group_advantage_terms(rewards, order, offsets, *options)
    # Statistics are float64: what remains is one rounding of the advantages to fp32.
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-7, atol=1e-9)
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[2], expected[2], rtol=1e-12, atol=1e-12)
    # In the order of the groups there is nothing to look up.
    lying = group_advantage.group_advantage_terms(rewards[order], None, offsets, *options)
    assert torch.equal(lying[0], got[0][order]) and torch.equal(lying[1], got[1][order])
    assert torch.equal(lying[2], got[2])


rewards = st.sampled_from([0.0, 1.0, -1.0, 0.1, 0.7, 100.25, NAN])


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.lists(rewards, max_size=9), max_size=12),
    options=st.tuples(
        st.integers(0, len(METHODS) - 1),
        st.booleans(),
        st.sampled_from([1e-6, 1e-4, 0.0]),
        st.integers(0, 7),
        st.booleans(),
        st.sampled_from([0.0, -1.0]),
        st.sampled_from([1.0, 2.0, -3.0]),
    ),
)
def test_matches_the_oracle(groups: list, options: tuple, device: torch.device) -> None:
    check(groups, options, device)


@pytest.mark.parametrize("method", range(len(METHODS)), ids=METHODS)
def test_groups_longer_than_a_tile(method: int, device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = [2 * GROUPS.lanes + 5, 1, GROUPS.lanes, GROUPS.lanes + 1, 3]
    groups = [torch.randn(size, generator=draw).tolist() for size in sizes]
    groups[0][7] = NAN
    check(groups, (method, True, 1e-6, 0, False, 0.0, 1.0), device)


@pytest.mark.parametrize("method", range(len(METHODS)), ids=METHODS)
def test_more_tiles_than_programs(
    method: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a program's tile keep running sums over its tiles: 3 programs, 11 tiles."""
    monkeypatch.setattr(group_advantage, "GROUP_PROGRAMS", 3)
    draw = torch.Generator().manual_seed(1)
    sizes = torch.randint(0, 4, (10 * GROUPS.groups + 1,), generator=draw).tolist()
    groups = [(torch.randn(size, generator=draw) + 1e4).tolist() for size in sizes]
    check(groups, (method, True, 1e-6, 4, True, 0.0, 1.0), device)


def test_refuses_what_it_would_misread(device: torch.device) -> None:
    r, order, offsets = torch.zeros(2).double(), torch.arange(2), torch.tensor([0, 2, 2])
    rest = (True, 1e-6, 0, False, 0.0, 1.0)
    terms = group_advantage.group_advantage_terms
    with pytest.raises(ValueError, match="method=10: expected an index"):
        terms(r, order, offsets, 10, *rest)
    with pytest.raises(ValueError, match="filters=8: expected a set"):
        terms(r, order, offsets, 0, True, 1e-6, 8, False, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"rewards: expected a contiguous torch\.float64"):
        terms(r.float(), order, offsets, 0, *rest)
    with pytest.raises(ValueError, match="offsets: expected"):
        terms(r, order, offsets.int(), 0, *rest)
    with pytest.raises(ValueError, match="order: expected"):
        terms(r, order[:1], offsets, 0, *rest)
