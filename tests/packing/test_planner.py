import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.packing.planner import best_fit, best_fit_python


def naive(lengths, capacity):
    """Best-fit decreasing as the definition reads."""
    rooms: list[int] = []
    bins = np.empty(len(lengths), dtype=np.int64)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [(room, b) for b, room in enumerate(rooms) if room >= lengths[i]]
        if fits:
            b = min(fits)[1]
        else:
            b = len(rooms)
            rooms.append(capacity)
        rooms[b] -= lengths[i]
        bins[i] = b
    return bins


@settings(deadline=None)
@given(st.data(), st.integers(0, 40))
def test_follows_the_definition(data, capacity):
    lengths = np.array(data.draw(st.lists(st.integers(0, capacity), max_size=60)), dtype=np.int64)
    expected = naive(lengths.tolist(), capacity)
    np.testing.assert_array_equal(best_fit_python(lengths, capacity), expected)
    np.testing.assert_array_equal(best_fit(lengths, capacity), expected)


@pytest.mark.parametrize(("low", "high", "capacity"), [(1, 2048, 2048), (20, 200, 2048)])
def test_close_to_the_lower_bound(low, high, capacity):
    lengths = np.random.default_rng(0).integers(low, high, 50_000)
    rows = best_fit(lengths, capacity).max() + 1
    assert rows <= 1.01 * np.ceil(lengths.sum() / capacity)
    assert np.bincount(best_fit(lengths, capacity), lengths).max() <= capacity


@pytest.mark.parametrize("bad", [-1, 11])
def test_names_the_length(bad):
    with pytest.raises(ValueError, match=rf"lengths\[2\]={bad}.*capacity=10"):
        best_fit(np.array([3, 10, bad]), 10)
