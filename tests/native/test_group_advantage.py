"""csrc/advantage.h through its CPU kernel, against the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch

from pyrl import _native
from pyrl.ops import reference
from pyrl.ops.group_advantage import METHODS

if _native.native_reason() is not None:
    pytest.skip(_native.native_reason(), allow_module_level=True)

terms = torch.ops.pyrl_native.group_advantage_terms
PLAIN = (True, 1e-6, 0, False, 0.0, 1.0)  # unbiased, eps, filters, drop, offset, scale


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
    rewards = torch.randn(n, generator=g, dtype=torch.float64)
    rewards[groups % 5 == 0] = 0.1  # not representable: its mean rounds
    rewards[torch.rand(n, generator=g) < 0.1] = math.nan
    return rewards, groups


@pytest.mark.parametrize("unbiased", (True, False))
@pytest.mark.parametrize("method", range(len(METHODS)), ids=METHODS)
# 7200 samples in 1200 groups: more than one block of 1024.
@pytest.mark.parametrize("n", (1, 2, 17, 7200))
def test_against_float64(n, method, unbiased):
    rewards, groups = random_groups(n)
    for filters, drop in ((0, False), (4, False), (5, True)):
        rest = (unbiased, 1e-6, filters, drop, -1.0, 2.0)
        actual = terms(rewards, *csr(groups), method, *rest)
        expected = reference.group_advantage(rewards, groups, METHODS[method], *rest)
        # Statistics are double here too: what remains is the rounding of the fp32 outputs.
        torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-7, atol=1e-9)
        assert torch.equal(actual[1], expected[1])
        torch.testing.assert_close(actual[2], expected[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", (0, 1, 2, 5, 6, 7), ids=lambda m: METHODS[m])
def test_equal_rewards_have_no_advantage(method):
    rewards = torch.full((7,), 0.1, dtype=torch.float64)
    actual = terms(rewards, *csr(torch.zeros(7, dtype=torch.int64)), method, *PLAIN)
    assert (actual[0] == 0).all()


def test_a_group_of_one_and_a_group_left_with_one():
    rewards = torch.tensor([2.0, 3.0, math.nan], dtype=torch.float64)
    layout = csr(torch.tensor([0, 1, 1]))
    values = [terms(rewards, *layout, m, *PLAIN)[0].tolist() for m in range(5)]
    assert values[0] == pytest.approx([2 / (1 + 1e-6), 3 / (1 + 1e-6), 0])
    assert values[1:] == [[2, 3, 0], [0, 0, 0], [1, 1, 0], [2, 3, 0]]


def test_no_samples():
    none = torch.empty(0, dtype=torch.float64)
    for offsets in (torch.zeros(1, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)):
        actual = terms(none, None, offsets, 6, *PLAIN)
        assert [t.shape for t in actual] == [(0,), (0,), (8,)] and not actual[2].any()


def test_many_samples_in_one_group_keep_their_precision():
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(200_000, generator=g, dtype=torch.float64) * 1e-3 + 1e6
    offsets = torch.tensor([0, len(rewards)])
    # Exact to the last bit: Python's sum of fractions, rounded once.
    mean = math.fsum(rewards.tolist()) / len(rewards)
    expected = rewards - mean
    # 1e-10 is the spacing of doubles at 1e6, the deviations are 1e-3.
    torch.testing.assert_close(
        terms(rewards, None, offsets, 1, *PLAIN)[0].double(), expected, rtol=2e-7, atol=4e-10
    )
    whitened = terms(rewards, None, offsets, 6, True, 0.0, 0, False, 0.0, 1.0)[0].double()
    torch.testing.assert_close(whitened, expected / rewards.std(), rtol=1e-6, atol=1e-6)


def test_bad_arguments_are_named():
    rewards = torch.zeros(3, dtype=torch.float64)
    order, offsets = csr(torch.zeros(3, dtype=torch.int64))

    def refuses(match, *arguments, rest=PLAIN):
        with pytest.raises(RuntimeError, match=match):
            terms(*arguments, *rest)

    refuses("method 10 is not one of", rewards, order, offsets, 10)
    refuses("filters 8 is not", rewards, order, offsets, 0, rest=(True, 0.0, 8, False, 0.0, 1.0))
    refuses("rewards must be float64", rewards.float(), order, offsets, 0)
    refuses(
        r"order\[2\]=3: expected a sample index in \[0, 3\)",
        rewards, torch.tensor([0, 1, 3]), offsets, 0,
    )  # fmt: skip
    refuses(r"offsets\[2\]=1 is less", rewards, order, torch.tensor([0, 2, 1, 3]), 0)
    refuses("offsets must run from 0 to 3", rewards, order, torch.tensor([0, 2, 2, 2]), 0)
    refuses("offsets is empty", rewards, order, offsets[:0], 0)
    refuses(r"order must have shape \[3\]", rewards, order[:2], offsets, 0)


def test_opcheck():
    _, groups = random_groups(9)
    rewards = torch.arange(9.0, dtype=torch.float64)  # NaN equals nothing in opcheck
    torch.library.opcheck(terms, (rewards, *csr(groups), 6, *PLAIN))
    torch.library.opcheck(terms, (rewards, None, torch.tensor([0, 4, 9]), 0, *PLAIN))
