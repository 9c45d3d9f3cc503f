"""Bin packing of sequence lengths: the compiled planner, or the same result in Python."""

from __future__ import annotations

import heapq
import importlib.util

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


def best_fit(lengths: Int64, capacity: int) -> Int64:
    """bin[i] of every length by best-fit decreasing, int64 [n] -> int64 [n].

    Lengths by falling size (ties by index) go to the bin with the least room that still holds
    them (ties by bin number), else to a new bin; deterministic. Uses `pyrl._host.best_fit` where
    it was built, else `best_fit_python`, which gives the same bins.

    Raises ValueError naming the first length outside [0, capacity].
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    outside = np.flatnonzero((lengths < 0) | (lengths > capacity))
    if outside.size:
        i = int(outside[0])
        raise ValueError(
            f"lengths[{i}]={lengths[i]}: expected a length in [0, capacity={capacity}]"
        )
    if importlib.util.find_spec("pyrl._host") is None:
        return best_fit_python(lengths, capacity)
    from pyrl._host import best_fit as native

    return native(lengths, capacity)


def best_fit_python(lengths: Int64, capacity: int) -> Int64:
    """`best_fit` without the compiled module; lengths already checked.

    Equal lengths are placed together: bins are visited by rising room, and a bin of room r takes
    r // length of them, since what is left of it stays the tightest fit. So the loop runs over the
    (distinct length, bin) pairs that meet, not over the items.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    bins_of_room: dict[int, list[int]] = {}  # room -> heap of bin numbers
    rooms = 0  # bit r is set when some bin has room r
    used = 0
    chosen: list[int] = []
    repeats: list[int] = []

    def put(bin_number: int, room: int) -> None:
        nonlocal rooms
        heapq.heappush(bins_of_room.setdefault(room, []), bin_number)
        rooms |= 1 << room

    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count > 0:
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                heap = bins_of_room[room]
                bin_number = heapq.heappop(heap)
                if not heap:
                    rooms ^= 1 << room
            else:
                room, bin_number = capacity, used
                used += 1
            taken = count if size == 0 else min(count, room // size)
            put(bin_number, room - taken * size)
            chosen.append(bin_number)
            repeats.append(taken)
            count -= taken

    bins = np.empty(lengths.shape, dtype=np.int64)
    bins[order] = np.repeat(np.array(chosen, dtype=np.int64), repeats)
    return bins
