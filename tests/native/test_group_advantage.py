"""csrc/advantage.h through its CPU kernel, against the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch

from pyrl import _native
from pyrl.ops import reference

if _native.native_reason() is not None:
    pytest.skip(_native.native_reason(), allow_module_level=True)

terms = torch.ops.pyrl_native.group_advantage_terms
METHODS = ("grpo", "mean", "rloo", "positive", "raw")


def csr(groups):
    """order [n] and offsets [n + 1] (trailing groups empty) of any integer group ids."""
    n = len(groups)
    order = torch.sort(groups, stable=True).indices
    counts = torch.unique(groups, return_counts=True)[1]
    offsets = torch.full((n + 1,), n, dtype=torch.int64)
    offsets[0] = 0
    offsets[1 : len(counts) + 1] = counts.cumsum(0)
    return order, offsets


def random_groups(n, seed=0):
    """Shuffled groups of every size, some of one, some all equal, some with NaN."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.randint(max(n // 6, 1), (n,), generator=g)
    rewards = torch.randn(n, generator=g)
    rewards[groups % 5 == 0] = 0.1  # not representable: its mean rounds
    rewards[torch.rand(n, generator=g) < 0.1] = math.nan
    return rewards, groups


@pytest.mark.parametrize("unbiased", (True, False))
@pytest.mark.parametrize("method", range(5), ids=METHODS)
@pytest.mark.parametrize("n", (1, 2, 17, 3000))
def test_against_float64(n, method, unbiased):
    rewards, groups = random_groups(n)
    actual = terms(rewards, *csr(groups), method, unbiased, 1e-6)
    expected = reference.group_advantage(rewards, groups, METHODS[method], unbiased, 1e-6)
    # Statistics are double here too: what remains is the rounding of the fp32 outputs.
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-6, atol=1e-7)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        scored = ~rewards.isnan()
        assert torch.equal(a[scored].double(), e[scored])
        assert a[~scored].isnan().all()
    assert (actual[0][rewards.isnan()] == 0).all()


@pytest.mark.parametrize("method", (0, 1, 2), ids=METHODS[:3])
def test_equal_rewards_have_no_advantage(method):
    rewards = torch.full((7,), 0.1)
    actual = terms(rewards, *csr(torch.zeros(7, dtype=torch.int64)), method, True, 1e-6)
    assert (actual[0] == 0).all() and torch.equal(actual[1], rewards)


def test_a_group_of_one_and_a_group_left_with_one():
    rewards = torch.tensor([2.0, 3.0, math.nan])
    layout = csr(torch.tensor([0, 1, 1]))
    values = [terms(rewards, *layout, m, True, 1e-6)[0].tolist() for m in range(5)]
    assert values[0] == pytest.approx([2 / (1 + 1e-6), 3 / (1 + 1e-6), 0])
    assert values[1:] == [[2, 3, 0], [0, 0, 0], [1, 1, 0], [2, 3, 0]]


def test_no_samples():
    none = torch.empty(0)
    actual = terms(none, none.long(), torch.zeros(1, dtype=torch.int64), 0, True, 1e-6)
    assert [t.shape for t in actual] == [(0,)] * 3


def test_many_samples_in_one_group_keep_their_precision():
    rewards = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1000
    layout = csr(torch.zeros(len(rewards), dtype=torch.int64))
    expected = rewards.double() - rewards.double().mean()
    torch.testing.assert_close(
        terms(rewards, *layout, 1, True, 1e-6)[0].double(), expected, rtol=1e-6, atol=1e-9
    )


def test_bad_arguments_are_named():
    rewards, (order, offsets) = torch.zeros(3), csr(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="method 5 is not one of"):
        terms(rewards, order, offsets, 5, True, 1e-6)
    with pytest.raises(RuntimeError, match=r"order\[2\]=3: expected a sample index in \[0, 3\)"):
        terms(rewards, torch.tensor([0, 1, 3]), offsets, 0, True, 1e-6)
    with pytest.raises(RuntimeError, match=r"offsets\[2\]=1 is less"):
        terms(rewards, order, torch.tensor([0, 2, 1, 3]), 0, True, 1e-6)
    with pytest.raises(RuntimeError, match="offsets must run from 0 to 3"):
        terms(rewards, order, torch.tensor([0, 2, 2, 2]), 0, True, 1e-6)
    with pytest.raises(RuntimeError, match=r"offsets must have shape \[4\]"):
        terms(rewards, order, offsets[:3], 0, True, 1e-6)


def test_opcheck():
    _, groups = random_groups(9)
    rewards = torch.arange(9.0)  # opcheck compares outputs, and NaN equals nothing
    torch.library.opcheck(terms, (rewards, *csr(groups), 0, True, 1e-6))
