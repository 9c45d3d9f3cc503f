"""Advantages of reward + bonus; filters see the task's reward alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.algorithms import Attempt, Group, GroupCredit, assign_advantages
from pyrl.algorithms.advantages import JUDGES
from pyrl.ops.group_advantage import FILTERS, METHODS, group_advantage


def batch(*groups):
    """Groups of (reward, bonus)."""
    return [
        Group(str(i), "", [1], [Attempt([2], [-1.0], "stop", "", r, bonus=b) for r, b in pairs])
        for i, pairs in enumerate(groups)
    ]


def flat(groups, name):
    return [getattr(a, name) for g in groups for a in g.attempts]


REWARDS = st.sampled_from([0.0, 0.25, 1.0, math.nan])
BONUSES = st.sampled_from([0.0, -0.5, 0.125])
BATCHES = st.lists(
    st.lists(st.tuples(REWARDS, BONUSES), min_size=1, max_size=4), min_size=1, max_size=4
)


def brute(pairs, method, filters, mode, signed):
    """Filters on rewards, then advantages of the sums, without what was dropped."""
    totals, out = [], []
    for group in pairs:
        rewards = [2 * r - 1 if signed else r for r, _ in group]
        scored = [r for r in rewards if not math.isnan(r)]
        hit = scored and (
            ("drop_all_correct" in filters and all(r > 0 for r in scored))
            or ("drop_all_wrong" in filters and all(r <= 0 for r in scored))
            or ("drop_zero_std" in filters and len(set(scored)) == 1)
        )
        for r, (_, bonus) in zip(rewards, group, strict=True):
            total = r if method in JUDGES else r + bonus
            out.append((bool(hit), not math.isnan(total)))
            totals.append(math.nan if hit and mode == "drop" else total)
    ids = torch.tensor([g for g, group in enumerate(pairs) for _ in group])
    a = group_advantage(torch.tensor(totals), ids, method=method).advantages.tolist()
    keep = [scored and not (hit and mode == "drop") for hit, scored in out]
    return [0.0 if hit else x for x, (hit, _) in zip(a, out, strict=True)], keep


@settings(deadline=None, max_examples=60)
@given(
    BATCHES,
    st.sampled_from(METHODS),
    st.sets(st.sampled_from(FILTERS)),
    st.sampled_from(["zero", "drop"]),
    st.booleans(),
)
def test_filters_judge_rewards_and_methods_read_sums(pairs, method, filters, mode, signed):
    groups = batch(*pairs)
    metrics = assign_advantages(
        groups,
        method=method,
        filter=sorted(filters),
        filter_mode=mode,
        reward_map="signed" if signed else "identity",
    )
    expected, keep = brute(pairs, method, filters, mode, signed)
    assert flat(groups, "advantage") == expected and flat(groups, "keep") == keep
    assert metrics["kept"] == sum(keep)
    assert metrics["nan_rewards"] == sum(math.isnan(r) for g in pairs for r, _ in g)
    scored = [2 * r - 1 if signed else r for g in pairs for r, _ in g if not math.isnan(r)]
    assert metrics["reward_sum"] == pytest.approx(sum(scored))


@pytest.mark.parametrize("method", JUDGES)
def test_who_is_accepted_depends_on_no_bonus(method):
    """A short wrong answer is not reinforced, a long right one is not rejected."""
    groups = batch([(0.0, 0.1), (0.0, 0.0), (1.0, -1.0), (1.0, 0.05)])
    assign_advantages(groups, method=method)
    assert flat(groups, "advantage") == [0, 0, 1, 1]


@pytest.mark.parametrize("mode", ["zero", "drop"])
def test_a_length_bonus_does_not_unsolve_a_group(mode):
    """All correct before and after the penalty, although every sum is negative or 0."""
    groups = batch([(1.0, -1.5), (1.0, -1.0)], [(0.0, 0.5), (1.0, 0.0)])
    metrics = assign_advantages(groups, filter="drop_all_correct", filter_mode=mode)
    assert flat(groups, "advantage")[:2] == [0, 0] and metrics["filtered"] == 2
    assert flat(groups, "keep") == [mode == "zero"] * 2 + [True] * 2
    root = 0.5**0.5
    assert flat(groups, "advantage")[2:] == pytest.approx([-root, root], rel=1e-5)


def test_a_bonus_separates_equal_rewards_unless_a_filter_drops_them():
    groups = batch([(1.0, 0.0), (1.0, -0.5)])
    assign_advantages(groups, method="mean")
    assert flat(groups, "advantage") == [0.25, -0.25]
    assign_advantages(groups, method="mean", filter="drop_zero_std")
    assert flat(groups, "advantage") == [0, 0]


def test_the_map_is_of_the_reward_and_the_bonus_comes_after():
    groups = batch([(0.0, 0.25), (1.0, -0.25)])
    assign_advantages(groups, method="raw", reward_map="signed")
    assert flat(groups, "advantage") == [-0.75, 0.75]


def test_a_dropped_group_leaves_the_batch_statistics():
    """Whitening over what remains: mean and deviation of the second group's sums alone."""
    groups = batch([(1.0, 5.0), (1.0, 9.0)], [(0.0, 0.0), (1.0, 0.5)])
    assign_advantages(groups, method="whiten", filter="drop_all_correct", filter_mode="drop", eps=0)
    x, y = 0.0, 1.5
    std = abs(x - y) / 2**0.5
    assert flat(groups, "advantage") == pytest.approx([0, 0, -0.75 / std, 0.75 / std])


@pytest.mark.parametrize("bonus", [math.inf, -math.inf, math.nan, 1e39])
def test_a_sum_beyond_fp32_is_lost(bonus):
    groups = batch([(0.0, 0.0), (1.0, 0.0), (1.0, bonus)])
    metrics = assign_advantages(groups)
    assert flat(groups, "keep") == [True, True, False] and metrics["nan_rewards"] == 1
    assert flat(groups, "advantage")[2] == 0 and metrics["kept"] == 2


def test_group_credit_is_assign_advantages_times_the_weight():
    pairs = [(0.0, 0.0), (1.0, 0.0), (1.0, -0.5)], [(1.0, 0.0), (0.0, 0.25)]
    plain, weighted = batch(*pairs), batch(*pairs)
    weighted[1].weight = 0.5
    options = {"method": "rloo", "filter": ("drop_zero_std",)}
    expected = assign_advantages(plain, **options)
    credit = GroupCredit(**options)
    assert credit.assign(weighted) == expected
    scale = [1.0] * 3 + [0.5] * 2
    values = zip(flat(plain, "advantage"), scale, strict=True)
    assert flat(weighted, "advantage") == [a * s for a, s in values]
    assert flat(weighted, "keep") == flat(plain, "keep")


def test_a_credit_that_does_nothing_leaves_everything_as_it_is():
    credit = GroupCredit()
    rows = []
    assert credit.begin([rows])[0] is rows
    assert credit.reweigh(rows, [], lambda row: row.target) is rows
    credit.learn(rows)
    assert credit.metrics() == {} and credit.state_dict() == {}
    credit.load_state_dict({})
    assert not (credit.needs_old or credit.needs_ref or credit.whole_groups or credit.dense)
