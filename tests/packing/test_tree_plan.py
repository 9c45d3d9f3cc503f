"""TreePlan against the definition: token i attends the tokens on its path."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.packing.tree_attention import TreePlan, tree_mask


def plan_of(*segments):
    """(length, parent) each -> TreePlan."""
    starts = [0, *itertools.accumulate(length for length, _ in segments)]
    return TreePlan.build(starts, [parent for _, parent in segments])


FORESTS = {
    "two levels, two trees": [(5, -1), (3, 0), (1, 0), (1, -1), (4, 3), (9, -1)],
    "three levels": [(4, -1), (3, 0), (2, 1), (5, 1), (6, 0), (1, 4), (2, 4), (3, -1), (2, 7)],
    "deep chain": [(3, -1), (2, 0), (4, 1), (1, 2), (5, 3)],
    "deep comb": [(2, -1), (1, 0), (3, 0), (1, 2), (2, 2), (1, 4), (4, 4)],
    "empty segments": [(0, -1), (3, 0), (2, 0), (0, 0), (4, -1), (0, 4), (2, 5), (3, 5), (0, -1)],
    "flat": [(5, -1), (1, -1), (9, -1)],
    "one token": [(1, -1)],
    "no token": [(0, -1), (0, 0)],
    "no segment": [],
}


@st.composite
def forests(draw, segments=8, length=5):
    """Up to `segments` (length, parent) pairs in preorder, empty ones included."""
    built, path = [], [-1]
    for g in range(draw(st.integers(0, segments))):
        path = path[: draw(st.integers(1, len(path)))]
        built.append((draw(st.integers(0, length)), path[-1]))
        path.append(g)
    return built


def segments_of(plan):
    """[T]: the segment of each token."""
    return [g for g, a in enumerate(plan.starts[:-1]) for _ in range(a, plan.starts[g + 1])]


def paths(plan):
    """[T]: the tokens that each token attends, in path order, straight from the parents."""
    seen = []
    for t, g in enumerate(segments_of(plan)):
        path = list(range(plan.starts[g], t + 1))
        while (g := plan.parents[g]) >= 0:
            path = list(range(plan.starts[g], plan.starts[g + 1])) + path
        seen.append(path)
    return seen


def check(plan):
    expected = paths(plan)
    mask = tree_mask(plan)
    assert [row.nonzero().flatten().tolist() for row in mask] == [sorted(p) for p in expected]
    assert plan.positions.tolist() == [len(p) - 1 for p in expected]
    assert plan.max_length == max(map(len, expected), default=0)
    assert plan.area == int(mask.sum())
    for window in (1, 2, 5):
        rows = [row.nonzero().flatten().tolist() for row in tree_mask(plan, window)]
        assert rows == [sorted(p[-window:]) for p in expected]
    # The runs partition the tokens, and cut nothing that one attention problem could hold.
    assert [t for r in plan.runs for t in range(r.start, r.stop)] == list(range(plan.num_tokens))
    assert all(plan.last[r.start : r.stop].eq(r.end).all() for r in plan.runs)
    assert all(a.end != b.end or a.stop != b.start for a, b in itertools.pairwise(plan.runs))
    for at, run in enumerate(plan.runs):
        above = [t for p in plan.path(at) for t in range(plan.runs[p].start, plan.runs[p].stop)]
        assert above == expected[run.start][:-1] and len(above) == run.offset
    assert plan.is_flat == all(r.stop == r.end for r in plan.runs)


@pytest.mark.parametrize("name", FORESTS)
def test_shapes(name):
    check(plan_of(*FORESTS[name]))


@given(forests())
@settings(max_examples=100, deadline=None)
def test_random_forests(forest):
    check(plan_of(*forest))


def test_what_counts_as_flat():
    flat = {name for name in FORESTS if plan_of(*FORESTS[name]).is_flat}
    assert flat == {"deep chain", "flat", "one token", "no token", "no segment"}
    assert plan_of(*FORESTS["deep chain"]).varlen.lengths == (15,)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_integers_of_any_kind(make):
    plan = TreePlan.build(make([0, 2, 3, 6]), make([-1, 0, 0]))
    assert (plan.starts, plan.parents, plan.ends) == ((0, 2, 3, 6), (-1, 0, 0), (6, 3, 6))
    assert plan.last.tolist() == [6, 6, 3, 6, 6, 6] and plan.last.dtype == torch.int32


@pytest.mark.parametrize(
    ("starts", "parents", "message"),
    [
        ([], [], r"starts\[0\]=None: expected 0"),
        ([1, 4], [-1], r"starts\[0\]=1: expected 0"),
        ([0, 3, 2], [-1, -1], r"starts\[2\]=2 is below 3"),
        ([0, 3], [], "0 parents and 2 starts"),
        ([0, 3, 4], [-1, 1], r"parents\[1\]=1: expected -1 or an earlier"),
        ([0, 3], [-2], r"parents\[0\]=-2"),
        ([0, 3, 4, 5, 6], [-1, 0, 0, 1], r"parents\[3\]=1: the subtree of segment 1 ended"),
        ([0, 1.5], [-1], r"starts\[1\]=1.5: expected an integer"),
    ],
)
def test_bad_forests(starts, parents, message):
    with pytest.raises(ValueError, match=message):
        TreePlan.build(starts, parents)


@given(forests())
@settings(max_examples=50, deadline=None)
def test_ids(forest):
    """Ids of segments with tokens; a parent without any is left out of the path."""
    plan = plan_of(*forest)
    segments = segments_of(plan)
    sizes = np.diff(plan.starts)

    def above(g):
        while (g := plan.parents[g]) >= 0 and sizes[g] == 0:
            pass
        return g

    groups = torch.tensor(segments, dtype=torch.int64) * 10 + 7
    for root in (-1, None):  # either way to write a root
        parents = [above(g) * 10 + 7 if above(g) >= 0 else root or g * 10 + 7 for g in segments]
        again = TreePlan.from_ids(groups, torch.tensor(parents, dtype=torch.int64))
        assert again.last.equal(plan.last) and again.runs == plan.runs
        assert again.last.device == groups.device


@pytest.mark.parametrize(
    ("groups", "parents", "message"),
    [
        ([0, 1, 0], [0, 0, 0], r"group_ids\[2\]=0 restarts"),
        ([0, 1], [0, 5], r"parent_ids\[1\]=5: no such group before token 1"),
        ([0, 1, 1], [0, 0, 1], r"parent_ids\[2\]=1: the segment of group 1 began with 0"),
        ([0, 1, 2, 3], [0, 0, 0, 1], r"parents\[3\]=1: the subtree of segment 1 ended"),
        ([0, 1], [0], "2 group_ids and 1 parent_ids"),
    ],
)
def test_bad_ids(groups, parents, message):
    with pytest.raises(ValueError, match=message):
        TreePlan.from_ids(torch.tensor(groups), torch.tensor(parents))


@pytest.mark.parametrize(
    ("starts", "parents", "message"),
    [
        (None, [-1], "starts=None: expected a sequence of integers"),
        ([0, 3], 5, "parents=5: expected a sequence of integers"),
        (torch.tensor(3), [-1], r"starts=tensor\(3\): expected a sequence of integers"),
    ],
)
def test_what_is_no_sequence_is_refused(starts, parents, message):
    with pytest.raises(ValueError, match=message):
        TreePlan.build(starts, parents)
