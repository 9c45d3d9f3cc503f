"""The second way of packing, for items of which some ten fill a bin."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.packing import best_fit, plan_tree
from pyrl.packing.fill_python import few_bins_python, fill_python


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(0, 60), st.integers(0, 20)
)
def test_filled_bins(lengths, spare, least):
    """Every item in one bin, none over capacity; compiled and Python planner agree."""
    lengths = np.array(lengths, dtype=np.int64) + least
    capacity = int(lengths.max()) + spare
    bins = fill_python(lengths, capacity)
    filled = np.bincount(bins, lengths)
    assert bins.shape == lengths.shape and filled.max() <= capacity and filled.min() > 0
    few = few_bins_python(lengths, capacity)
    assert few.max() == min(bins.max(), best_fit(lengths, capacity).max())
    offsets = np.concatenate([[0], lengths.cumsum()])
    layout = plan_tree(np.zeros(offsets[-1], np.int64), offsets, lengths * 0, capacity)
    np.testing.assert_array_equal(layout.row[layout.leaf], few)


def test_rows_of_some_ten_trees_are_full():
    """Where about eleven trees fill a row, best-fit decreasing alone wastes 2%."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, 161, 4000) + rng.integers(16, 161, (4000, 16)).sum(1)
    bound = np.ceil(lengths.sum() / 16_384)
    assert best_fit(lengths, 16_384).max() + 1 > 1.015 * bound
    assert few_bins_python(lengths, 16_384).max() + 1 <= 1.01 * bound
