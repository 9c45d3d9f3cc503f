"""group_advantage on every backend against the oracle and closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrl
from pyrl.ops.group_advantage import METHODS, _group_advantage
from pyrl.parity import DEVICE, serving

NAN = float("nan")


def both(backend, rewards, ids, **options):
    rewards, ids = rewards.to(DEVICE), ids.to(DEVICE)
    return (
        pyrl.group_advantage(rewards, ids, backend=backend, **options),
        pyrl.group_advantage(rewards, ids, backend="reference", **options),
    )


@pytest.mark.parametrize("backend", serving())
@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(
        st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.3, 0.1, NAN]), min_size=1, max_size=9),
        max_size=7,
    ),
    method=st.sampled_from(METHODS),
    unbiased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_property_parity(backend, groups, method, unbiased, seed):
    rewards = torch.tensor([r for g in groups for r in g])
    ids = torch.tensor([37 * i - 5 for i, g in enumerate(groups) for _ in g], dtype=torch.int64)
    shuffle = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    ours, exact = both(backend, rewards[shuffle], ids[shuffle], method=method, unbiased=unbiased)
    # fp32 against float64: the closest distinct rewards differ by 0.2, so the std is no smaller.
    torch.testing.assert_close(ours.advantages, exact.advantages, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.keep, exact.keep)
    for name, value in exact.metrics.items():
        assert ours.metrics[name] == value, name


@pytest.mark.parametrize("backend", serving())
def test_closed_forms(backend):
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 7.0, NAN, 2.0])
    ids = torch.tensor([0, 0, 0, 0, 4, 4, 2])
    out, _ = both(backend, rewards, ids)
    a = 0.5 / ((1 / 3) ** 0.5 + 1e-6)
    # A group of one has mean 0 and std 1, whether born so or left so by a NaN.
    expected = torch.tensor([a, -a, -a, a, 7.0 / (1 + 1e-6), 0.0, 2.0 / (1 + 1e-6)])
    torch.testing.assert_close(out.advantages.cpu(), expected)
    assert out.keep.tolist() == [True] * 5 + [False, True]
    assert out.metrics["nan_rewards"] == 1 and out.metrics["groups"] == 3


@pytest.mark.parametrize("backend", serving())
def test_equal_rewards_give_exactly_zero(backend):
    # The mean of seven times 0.1 is not 0.1 in fp32: divided by eps that would be an advantage.
    for value in (0.1, 0.7, 1e6 + 0.1):
        for method in ("grpo", "mean", "rloo"):
            out, _ = both(
                backend, torch.full((7,), value), torch.zeros(7, dtype=int), method=method
            )
            assert not out.advantages.any(), (value, method)


@pytest.mark.parametrize("backend", serving())
def test_filters(backend):
    rewards = torch.tensor([1.0, 1, 0, 0, 1, 0, 0.5, 0.5])
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    cases = {
        "drop_all_correct": [0, 1, 6, 7],
        "drop_all_wrong": [2, 3],
        "drop_zero_std": [0, 1, 2, 3, 6, 7],
        ("drop_all_correct", "drop_all_wrong"): [0, 1, 2, 3, 6, 7],
    }
    for filters, gone in cases.items():
        expected = torch.ones(8, dtype=torch.bool)
        expected[gone] = False
        drop, _ = both(backend, rewards, ids, method="raw", filter=filters, filter_mode="drop")
        assert drop.keep.cpu().equal(expected)
        zero, _ = both(backend, rewards, ids, method="raw", filter=filters)
        assert zero.keep.all() and not zero.advantages.cpu()[gone].any()
        assert zero.metrics["filtered"] == len(gone)


@pytest.mark.parametrize("backend", serving())
def test_empty(backend):
    out, _ = both(backend, torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert out.advantages.shape == (0,) and out.metrics["groups"] == 0


@pytest.mark.parametrize("backend", serving())
def test_opcheck(backend):
    rewards = torch.rand(5, device=DEVICE)
    order = torch.arange(5, device=DEVICE)
    offsets = torch.tensor([0, 2, 5, 5, 5, 5], device=DEVICE)
    torch.library.opcheck(_group_advantage, (rewards, order, offsets, 0, True, 1e-6, backend))


def test_bad_input_names_itself():
    r, ids = torch.rand(4, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="method='std'"):
        pyrl.group_advantage(r, ids, method="std")
    with pytest.raises(ValueError, match="filter='all'"):
        pyrl.group_advantage(r, ids, filter="all")
    with pytest.raises(ValueError, match="group_ids: expected integers"):
        pyrl.group_advantage(r, ids[:2])
    if DEVICE.type == "cpu":
        r[2] = torch.inf
        with pytest.raises(ValueError, match=r"rewards\[2\] = inf"):
            pyrl.group_advantage(r, ids)
