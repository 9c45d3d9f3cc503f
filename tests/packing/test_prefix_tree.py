"""Every layout of the tree planner against what a layout is, and its cost against all others."""

import dataclasses
import importlib.util
import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.packing.fill_python import few_bins_python
from pyrl.packing.prefix_tree import TreeLayout, plan_tree
from pyrl.packing.prefix_tree_python import plan_tree_python

NATIVE = pytest.mark.skipif(
    importlib.util.find_spec("pyrl._host") is None, reason="pyrl._host not built"
)


def flat(sequences):
    """tokens, offsets of a list of lists."""
    tokens = np.array([t for s in sequences for t in s], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    return tokens, offsets


def plan(sequences, shareable=None, capacity=None, **costs) -> TreeLayout:
    """Checked, and the same from both planners."""
    shareable = [len(s) for s in sequences] if shareable is None else shareable
    capacity = max(map(len, sequences), default=1) if capacity is None else capacity
    arrays = (*flat(sequences), np.array(shareable, dtype=np.int64))
    layout = plan_tree(*arrays, capacity, **costs)
    both = plan_tree_python(
        *arrays, capacity, costs.get("segment_cost", 0.0), costs.get("area_cost", 0.0)
    )
    for field, found in zip(dataclasses.fields(TreeLayout), both, strict=True):
        np.testing.assert_array_equal(getattr(layout, field.name), found, field.name)
        assert getattr(layout, field.name).dtype == found.dtype == np.int64
    check(layout, sequences, shareable, capacity)
    return layout


def path(layout, i):
    """Segments of sequence i, root first."""
    found = []
    at = int(layout.leaf[i])
    while at >= 0:
        found.append(at)
        at = int(layout.parent[at])
    return found[::-1]


def check(layout, sequences, shareable, capacity):
    columns = {f.name: getattr(layout, f.name).tolist() for f in dataclasses.fields(TreeLayout)}
    row, parent, begin, end = (columns[k] for k in ("row", "parent", "begin", "end"))
    segments = len(row)
    assert sorted(set(row)) == list(range(layout.num_rows)) and row == sorted(row)
    assert layout.num_tokens == sum(end) - sum(begin)
    held = [set() for _ in row]  # sequences through each segment
    for i, sequence in enumerate(sequences):
        segs = path(layout, i)
        assert len({row[g] for g in segs}) == 1
        whole = []
        for g in segs:
            held[g].add(i)
            whole += sequences[columns["sequence"][g]][begin[g] : end[g]]
        assert whole == list(sequence)
    for g in range(segments):
        assert begin[g] < end[g] and -1 <= parent[g] < g
        assert begin[g] == (end[parent[g]] if parent[g] >= 0 else 0)
        assert columns["sequence"][g] == min(held[g])
        if len(held[g]) > 1:
            assert all(end[g] <= shareable[i] for i in held[g])
        inside = [h for h in range(segments) if g in path_up(parent, h)]
        assert inside == list(range(g, columns["subtree"][g]))
    for siblings in itertools.groupby(
        sorted(range(segments), key=lambda g: (row[g], parent[g], g)),
        key=lambda g: (row[g], parent[g]),
    ):
        smallest = [min(held[g]) for g in siblings[1]]
        assert smallest == sorted(smallest)
    filled = np.bincount(row, weights=np.subtract(end, begin)) if row else np.zeros(0)
    assert (filled <= capacity).all()


def path_up(parent, g):
    while g >= 0:
        yield g
        g = parent[g]


def trie(sequences, shareable):
    """Distinct shareable prefixes, and the number of private tokens."""
    prefixes = {tuple(s[:k]) for s, n in zip(sequences, shareable, strict=True)
                for k in range(1, n + 1)}  # fmt: skip
    return prefixes, sum(len(s) - n for s, n in zip(sequences, shareable, strict=True))


@st.composite
def cases(draw, max_sequences=12, max_tokens=7):
    """Sequences that share much, and how much of each may be shared."""
    token = st.integers(0, 1)
    sequences = draw(
        st.lists(st.lists(token, min_size=1, max_size=max_tokens), max_size=max_sequences)
    )
    if draw(st.booleans()):
        shareable = [draw(st.integers(0, len(s))) for s in sequences]
    else:
        shareable = [len(s) for s in sequences]
    return sequences, shareable


COSTS = st.sampled_from([0.0, 0.01, 0.3, 1.0, 1.7, 5.0])


@settings(deadline=None, max_examples=300)
@given(cases(), st.integers(0, 30), COSTS, COSTS)
def test_layouts_hold_every_sequence(case, spare, segment_cost, area_cost):
    sequences, shareable = case
    capacity = max(map(len, sequences), default=1) + spare
    plan(sequences, shareable, capacity, segment_cost=segment_cost, area_cost=area_cost)


@settings(deadline=None)
@given(cases())
def test_one_row_computes_each_distinct_prefix_once(case):
    sequences, shareable = case
    prefixes, private = trie(sequences, shareable)
    layout = plan(sequences, shareable, 200)
    assert layout.num_tokens == len(prefixes) + private
    assert layout.num_rows == min(1, len(sequences))


@settings(deadline=None)
@given(cases(), st.integers(0, 10))
def test_nothing_shareable_is_bin_packing(case, spare):
    sequences, _ = case
    capacity = max(map(len, sequences), default=1) + spare
    layout = plan(sequences, [0] * len(sequences), capacity)
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    np.testing.assert_array_equal(layout.row[layout.leaf], few_bins_python(lengths, capacity))
    assert layout.num_tokens == lengths.sum()


def prefix_cost(x, area):
    return x + area * x * (x + 1) / 2


def cheapest(sequences, shareable, segment, area):
    """Least cost over every set of branching prefixes that may have segments of their own."""
    inner, _ = trie(sequences, shareable)
    # A path's end: private where something follows the shareable part.
    ends = {
        (tuple(s), i if n < len(s) else -1, n if n < len(s) else len(s))
        for i, (s, n) in enumerate(zip(sequences, shareable, strict=True))
    }
    inner = sorted(
        p for p in inner
        if len({(e[: len(p) + 1] if n > len(p) else (e, i)) for e, i, n in ends
                if e[: len(p)] == p and n >= len(p)}) > 1
    )  # fmt: skip
    best = np.inf
    for chosen in itertools.product((False, True), repeat=len(inner)):
        kept = {p for p, yes in zip(inner, chosen, strict=True) if yes}
        total = 0.0
        for p, i, n in [*((p, None, len(p)) for p in kept), *ends]:
            if i == -1 and p in kept:
                continue  # it ends at a segment that is there
            above = max(
                (k for k in range(len(p)) if p[:k] in kept and k <= n),
                default=0,
            )
            total += segment + prefix_cost(len(p), area) - prefix_cost(above, area)
        best = min(best, total)
    return best if sequences else 0.0


@settings(deadline=None, max_examples=200)
@given(cases(8, 5), COSTS, COSTS)
def test_sharing_costs_least(case, segment_cost, area_cost):
    sequences, shareable = case
    layout = plan(sequences, shareable, 10_000, segment_cost=segment_cost, area_cost=area_cost)
    found = sum(
        segment_cost + prefix_cost(int(e), area_cost) - prefix_cost(int(b), area_cost)
        for b, e in zip(layout.begin, layout.end, strict=True)
    )
    least = cheapest(sequences, shareable, segment_cost, area_cost)
    assert found == pytest.approx(least, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("shareable", "tokens", "rows"),
    [(1219, 54_926, [15, 15, 15, 5]), (1220, 54_880, [15, 15, 15, 5]), (0, 111_000, [7] * 7 + [1])],
)
def test_fifty_samples_of_a_prompt(shareable, tokens, rows):
    random = np.random.default_rng(0)
    prompt = random.integers(0, 1000, 1220).tolist()
    own = [[i, *random.integers(0, 1000, 999).tolist()] for i in range(50)]
    layout = plan([prompt + o for o in own], [shareable] * 50, 16_384)
    assert layout.num_tokens == tokens
    assert np.bincount(layout.row[layout.leaf]).tolist() == rows


def test_identical_sequences_share_a_leaf():
    layout = plan([[7, 7, 8]] * 5)
    assert layout.leaf.tolist() == [0] * 5 and layout.num_tokens == 3
    layout = plan([[7, 7, 8]] * 5, [2] * 5, 9)
    assert (layout.num_tokens, layout.num_rows) == (7, 1)
    assert layout.parent.tolist() == [-1, 0, 0, 0, 0, 0]


def test_a_sequence_may_end_inside_the_tree():
    layout = plan([[1, 2, 3], [1], [1, 2], [1, 2, 4]], capacity=9)
    assert layout.leaf.tolist() == [2, 0, 1, 3]
    assert layout.num_tokens == 4
    # [1, 2] may not be shared to its end: its last token is its own.
    layout = plan([[1, 2, 3], [1], [1, 2]], [3, 1, 1], 9)
    assert layout.num_tokens == 4


def test_one_token_sequences():
    layout = plan([[3], [4], [3], [5]], [1, 1, 1, 0], 2)
    assert layout.leaf.tolist() == [0, 1, 0, 2]
    assert layout.row.tolist() == [0, 0, 1]
    assert plan([[3]] * 4, [0] * 4, 2).num_rows == 2


def test_a_segment_must_pay_for_itself():
    pair = [[1] * 4 + [2], [1] * 4 + [3]]
    assert plan(pair, [4, 4], 99, segment_cost=3.9).num_tokens == 6
    assert plan(pair, [4, 4], 99, segment_cost=4.0).num_tokens == 10
    # 4 tokens and 10 pairs saved.
    assert plan(pair, [4, 4], 99, segment_cost=4.9, area_cost=0.1).num_tokens == 6
    # Neither of the nested prefixes pays for its segment, but both in one do.
    nested = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 7]]
    assert plan(nested, capacity=99, segment_cost=3.5).num_tokens == 8


def test_nested_prefixes_are_split_over_rows():
    tail = iter(range(100, 10_000))
    sequences = [
        [0] * 5 + [turn] * 4 + [branch] * 3 + [next(tail) for _ in range(9)]
        for turn in range(1, 4) for branch in range(50, 53) for _ in range(3)
    ]  # fmt: skip
    for capacity in (21, 30, 40, 41, 60, 90, 200, 400):
        layout = plan(sequences, [12] * len(sequences), capacity)
        assert layout.num_tokens <= layout.num_rows * capacity
        assert layout.num_rows >= -(-layout.num_tokens // capacity)


@pytest.mark.parametrize(
    ("planner", "depth"),
    [(plan_tree_python, 1100), pytest.param(None, 4000, marks=NATIVE)],  # recursion limit: 1000
    ids=["python", "native"],
)
def test_deep_chains_do_not_recurse(planner, depth):
    """Prefixes of one another, in a thread whose stack a call a level would overflow."""
    if planner is None:
        from pyrl._host import plan_tree as planner
    lengths = np.arange(1, depth + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    chain = (tokens, offsets, lengths, depth)
    # One token each beyond the chain: larger than a row at every level.
    comb = (tokens, offsets, lengths - 1, depth)
    found = []

    def work():
        for arguments in ((*chain, 0.0, 0.0), (*chain, 0.5, 1e-3), (*comb, 0.0, 0.0)):
            found.append(TreeLayout(*planner(*arguments)))

    before = threading.stack_size(128 << 10)
    try:
        thread = threading.Thread(target=work)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    for layout in found[:2]:
        assert layout.num_tokens == depth and layout.num_rows == 1
        assert layout.parent.tolist() == list(range(-1, depth - 1))
        assert (layout.subtree == depth).all()
    assert found[2].num_tokens >= 2 * depth - 1
    filled = np.bincount(found[2].row, weights=found[2].end - found[2].begin)
    assert filled.max() <= depth


@settings(deadline=None)
@given(cases(), st.integers(1, 3))
def test_any_strides(case, step):
    sequences, shareable = case
    tokens, offsets = flat(sequences)
    arrays = [tokens, offsets, np.array(shareable, dtype=np.int64)]
    spread = [np.repeat(a, step)[::step] for a in arrays]
    for a, b in zip(
        dataclasses.astuple(plan_tree(*arrays, 50)),
        dataclasses.astuple(plan_tree(*spread, 50)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def groups(prompts, samples, seed=0, shuffled=False):
    """tokens, offsets, shareable of prompts x samples: 16 to 160 tokens each, prompts shared."""
    random = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), samples)
    if shuffled:
        random.shuffle(prompt)
    shareable = random.integers(16, 161, prompts)[prompt]
    offsets = np.concatenate([[0], np.cumsum(shareable + random.integers(16, 161, prompt.size))])
    tokens = random.integers(0, 50_000, offsets[-1])
    texts = random.integers(0, 50_000, (prompts, 160))
    positions = np.arange(160)
    for at in range(0, prompt.size, 50_000):
        part = slice(at, at + 50_000)
        inside = positions < shareable[part, None]
        tokens[(offsets[:-1][part, None] + positions)[inside]] = texts[prompt[part]][inside]
    return tokens, offsets, shareable


@NATIVE
@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_million(shuffled):
    """(Its seconds are in benchmarks/packing.py.)"""
    case = groups(62_500, 16, shuffled=shuffled)
    layout = plan_tree(*case, 16_384)
    assert layout.num_rows <= 1.01 * np.ceil(layout.num_tokens / 16_384)


@pytest.mark.parametrize("costs", [{}, {"segment_cost": 20.0, "area_cost": 0.01}])
def test_order_of_samples_costs_nothing(costs):
    case = groups(300, 8, shuffled=False)
    tokens, offsets, shareable = case
    order = np.random.default_rng(1).permutation(shareable.size)
    texts = [tokens[offsets[i] : offsets[i + 1]] for i in order]
    shuffled = (
        np.concatenate(texts),
        np.cumsum([0, *map(len, texts)], dtype=np.int64),
        shareable[order],
    )
    plain, mixed = (plan_tree(*c, 100_000, **costs) for c in (case, shuffled))
    assert plain.num_tokens == mixed.num_tokens


GOOD = {
    "tokens": np.arange(6),
    "offsets": np.array([0, 2, 6]),
    "shareable": np.array([2, 3]),
    "capacity": 4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.arange(6.0)}, "tokens: expected int64.*float64"),
        ({"tokens": np.zeros((2, 3), np.int64)}, r"tokens: expected int64.*\(2, 3\)"),
        ({"shareable": [2, 3]}, r"shareable: expected int64.*\[2, 3\]"),
        ({"offsets": np.array([0, 6])}, "offsets has 2 entries: expected 3"),
        ({"offsets": np.array([1, 2, 6])}, r"offsets\[0\]=1: expected 0"),
        ({"offsets": np.array([0, 2, 5])}, r"offsets\[2\]=5: expected 6"),
        ({"offsets": np.array([0, 6, 6])}, r"offsets\[0:2\]=\[0, 6\].*capacity=4\], got 6"),
        ({"offsets": np.array([0, 0, 6])}, r"offsets\[0:2\]=\[0, 0\].*got 0"),
        ({"offsets": np.array([0, 7, 6])}, r"offsets\[0:2\]=\[0, 7\].*got 7"),
        ({"shareable": np.array([2, 5])}, r"shareable\[1\]=5: expected 0 to.*4"),
        ({"shareable": np.array([-1, 4])}, r"shareable\[0\]=-1"),
        ({"capacity": 0}, "capacity=0"),
        ({"capacity": 3}, r"offsets\[1:3\]=\[2, 6\].*capacity=3"),
        ({"capacity": 4.5}, "capacity=4.5"),
        ({"segment_cost": -1.0}, "segment_cost=-1.0"),
        ({"area_cost": float("nan")}, "area_cost=nan"),
        ({"area_cost": float("inf")}, "area_cost=inf"),
    ],
)
def test_names_what_is_wrong(change, message):
    plan_tree(**GOOD)
    with pytest.raises(ValueError, match=message):
        plan_tree(**{**GOOD, **change})


@NATIVE
@pytest.mark.parametrize(
    "change", [{"offsets": [0, 7, 6]}, {"offsets": [0, 2, 9]}, {"shareable": [2, 9]}]
)
def test_the_native_planner_reads_nothing_else(change):
    from pyrl import _host

    case = {**GOOD, **{k: np.array(v) for k, v in change.items()}}
    with pytest.raises(ValueError, match=r"offsets|sequence"):
        _host.plan_tree(**case, segment_cost=0.0, area_cost=0.0)
