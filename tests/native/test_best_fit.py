"""pyrl._host.best_fit against its definition, spelt out in O(n^2)."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyrl import _native

if _native.host_reason() is not None:
    pytest.skip(_native.host_reason(), allow_module_level=True)

from pyrl._host import best_fit


def plain(lengths, capacity):
    rooms, bins = [], [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [(room, b) for b, room in enumerate(rooms) if room >= lengths[item]]
        if not fits:
            rooms.append(capacity)
            fits = [(capacity, len(rooms) - 1)]
        bins[item] = min(fits)[1]
        rooms[bins[item]] -= lengths[item]
    return bins


@given(st.lists(st.integers(0, 20), max_size=60), st.integers(20, 40))
def test_is_best_fit_decreasing(lengths, capacity):
    bins = best_fit(np.array(lengths, dtype=np.int64), capacity)
    assert bins.dtype == np.int64
    assert bins.tolist() == plain(lengths, capacity)


@pytest.mark.parametrize("lengths", ([], [0], [0, 0, 0], [5], [5, 5, 0]))
def test_edges(lengths):
    bins = best_fit(np.array(lengths, dtype=np.int64), 5)
    assert bins.tolist() == plain(lengths, 5)


def test_huge_capacities_and_rooms():
    lengths = np.array([2**62, 1, 2**62 - 1, 3], dtype=np.int64)
    assert best_fit(lengths, 2**62).tolist() == plain(lengths.tolist(), 2**62)


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    (
        ([1, 9, 10], 8, r"lengths\[1\]=9: expected a length in \[0, capacity=8\]"),
        ([1, 2, -3], 8, r"lengths\[2\]=-3"),
        ([0], -1, r"lengths\[0\]=0: expected a length in \[0, capacity=-1\]"),
    ),
)
def test_a_length_that_cannot_fit_is_named(lengths, capacity, message):
    with pytest.raises(ValueError, match=message):
        best_fit(np.array(lengths, dtype=np.int64), capacity)


def test_only_vectors_of_int64():
    with pytest.raises(ValueError, match="one-dimensional"):
        best_fit(np.zeros((2, 2), dtype=np.int64), 5)
    with pytest.raises(TypeError):
        best_fit(np.array([1.5]), 5)
    strided = np.arange(10, dtype=np.int64)[::3]
    assert best_fit(strided, 9).tolist() == plain(strided.tolist(), 9)


def test_a_million_items_within_a_second_and_a_percent():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.5, 1.0, 1_000_000).astype(np.int64) + 1, 8192)
    start = time.process_time()
    bins = best_fit(lengths, 8192)
    seconds = time.process_time() - start
    assert np.array_equal(bins, best_fit(lengths, 8192))
    fill = np.bincount(bins, weights=lengths)
    assert fill.max() <= 8192
    assert len(fill) <= 1.01 * np.ceil(lengths.sum() / 8192)
    assert seconds < 1
