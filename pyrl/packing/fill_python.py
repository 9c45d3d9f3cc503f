"""`csrc/host/fill.h` without the compiled module: the same bins."""

from __future__ import annotations

import bisect
import math

import numpy as np
from numpy.typing import NDArray

from pyrl.packing.planner import best_fit_python

Int64 = NDArray[np.int64]
TRIES = 32


class _Waiting:
    """The lengths that wait, by size: how many of each, and the largest that still fits."""

    def __init__(self, lengths: Int64) -> None:
        n = lengths.size
        self.order = np.argsort(lengths, kind="stable").tolist()
        sizes, kind, counts = np.unique(lengths, return_inverse=True, return_counts=True)
        self.size = sizes.tolist()
        self.kind = np.sort(kind.ravel()).tolist()
        self.end = counts.cumsum().tolist()
        self.next = (counts.cumsum() - counts).tolist()
        self.below = list(range(len(self.size)))
        self.left, self.sum = n, int(lengths.sum())
        self.stride = n * 618 // 1000 + 1
        while math.gcd(self.stride, n) != 1:
            self.stride += 1
        self.place = self.drawn = 0

    def at_most_kind(self, kind: int) -> int:
        """The largest waiting kind <= `kind`, or -1."""
        found = kind
        while found >= 0 and self.below[found] != found:
            found = self.below[found]
        while kind >= 0 and self.below[kind] != kind:
            self.below[kind], kind = found, self.below[kind]
        return found

    def at_most(self, room: int, held: int = -1) -> int:
        """The largest waiting kind of size <= `room`, or -1; one of `held` counts as taken."""
        kind = self.at_most_kind(bisect.bisect_right(self.size, room) - 1)
        if kind >= 0 and kind == held and self.end[kind] - self.next[kind] == 1:
            kind = self.at_most_kind(kind - 1)
        return kind

    def draw(self, room: int) -> int:
        """A kind that is typical of the whole, of size <= `room`, or -1."""
        while self.drawn < len(self.order):
            kind = self.kind[self.place]
            waits = self.next[kind] < self.end[kind]
            if waits and self.size[kind] > room:
                break
            self.drawn += 1
            self.place = (self.place + self.stride) % len(self.order)
            if waits:
                return kind
        return self.at_most(room)

    def take(self, kind: int) -> int:
        """The item."""
        item: int = self.order[self.next[kind]]
        self.next[kind] += 1
        if self.next[kind] == self.end[kind]:
            self.below[kind] = kind - 1
        self.sum -= self.size[kind]
        self.left -= 1
        return item


def fill_python(lengths: Int64, capacity: int) -> Int64:
    """bin[i], one bin after the other: the largest that waits, then typical ones while there is
    room for more than two, then the two (or the one) that leave the least room."""
    bins = np.zeros(lengths.size, dtype=np.int64)
    waiting = _Waiting(lengths)
    number = 0
    while waiting.left:
        kinds = [waiting.at_most(capacity)]
        room = capacity
        while kinds:
            for kind in kinds:
                room -= waiting.size[kind]
                bins[waiting.take(kind)] = number
            kinds = _next_kinds(waiting, room) if waiting.left else []
        number += 1
    return bins


def _next_kinds(waiting: _Waiting, room: int) -> list[int]:
    if 2 * room * waiting.left >= 5 * waiting.sum:
        kind = waiting.draw(room)
        return [kind] if kind >= 0 else []
    first = waiting.at_most(room)
    if first < 0:
        return []
    best, least = [first], room - waiting.size[first]
    for t in range(TRIES):
        if least <= 0:
            break
        a = waiting.at_most_kind(t * (len(waiting.size) - 1) // (TRIES - 1))
        if a < 0 or waiting.size[a] > room:
            continue
        c = waiting.at_most(room - waiting.size[a], a)
        if c >= 0 and room - waiting.size[a] - waiting.size[c] < least:
            best, least = [a, c], room - waiting.size[a] - waiting.size[c]
    return best


def few_bins_python(lengths: Int64, capacity: int) -> Int64:
    """Best-fit decreasing or `fill_python`, whichever takes fewer bins."""
    bins = best_fit_python(lengths, capacity)
    if lengths.size == 0:
        return bins
    count = int(bins.max()) + 1
    if (count - 1) * 1000 <= int(lengths.sum()) // capacity * 1001:
        return bins
    other = fill_python(lengths, capacity)
    return other if int(other.max()) + 1 < count else bins
