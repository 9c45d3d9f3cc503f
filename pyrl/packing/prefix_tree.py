"""Rows of sequences that share prefixes: what is computed once, and where.

Three steps. A radix tree over the shareable prefixes. Its nodes that are worth a segment of their
own, by a cost model. Rows: trees that fit in one stay whole, larger ones repeat their prefix in as
few parts as best-fit decreasing finds; then best-fit decreasing of trees and parts into rows.
The compiled planner (csrc/host) and the Python one give the same layout.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import numpy as np
from numpy.typing import NDArray

from pyrl.packing.prefix_tree_python import plan_tree_python

Int64 = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class TreeLayout:
    """Which tokens are computed, and where; int64 [G] for segments, [S] for sequences.

    Segments stand row after row, each row in depth-first preorder. A sequence is the segments from
    a root to its leaf, end to end. Siblings, and the trees of a row, stand by the smallest sequence
    that they hold there.
    """

    row: Int64
    """[G] row of each segment, rising 0..R-1"""
    parent: Int64
    """[G] index of the parent segment (same row, smaller index), -1 for a root"""
    subtree: Int64
    """[G] one past the index of the segment's last descendant"""
    sequence: Int64
    """[G] a sequence that holds the segment's tokens (the smallest in the row) ..."""
    begin: Int64
    """[G] ... from this position (the parent's end, 0 for a root) ..."""
    end: Int64
    """[G] ... to this one"""
    leaf: Int64
    """[S] the segment that each sequence ends with"""

    @property
    def num_rows(self) -> int:
        """R."""
        return int(self.row[-1]) + 1 if self.row.size else 0

    @property
    def num_tokens(self) -> int:
        """Tokens computed: those that a row shares count once there."""
        return int((self.end - self.begin).sum())


def plan_tree(
    tokens: Int64,
    offsets: Int64,
    shareable: Int64,
    capacity: int,
    *,
    segment_cost: float = 0.0,
    area_cost: float = 0.0,
) -> TreeLayout:
    """Segments of sequences i = tokens[offsets[i]:offsets[i+1]], in rows of <= capacity tokens.

    tokens int64 [N], offsets int64 [S+1] from 0 to N, shareable int64 [S]. Only the first
    shareable[i] tokens of a sequence may be computed together with equal prefixes of others; the
    tokens after them are always its own. Where shareable[i] is the length, a sequence may end
    inside the tree, at a segment that others continue or share. A sequence lies in one row.

    Costs are in computed tokens: segment_cost for a segment besides its tokens, area_cost for an
    attended (query, key) pair. A prefix is shared exactly where that lowers the total cost of all
    sequences, before they are split into rows; at no cost, everywhere. Fewest tokens come before
    fewest rows. Deterministic; the compiled planner takes O(N + S log S) and releases the GIL.

    Raises ValueError naming the argument, the position and the value.
    """
    capacity = _check(tokens, offsets, shareable, capacity, segment_cost, area_cost)
    tokens, offsets, shareable = map(np.ascontiguousarray, (tokens, offsets, shareable))
    arguments = (tokens, offsets, shareable, capacity, float(segment_cost), float(area_cost))
    if importlib.util.find_spec("pyrl._host") is None:
        return TreeLayout(*plan_tree_python(*arguments))
    from pyrl._host import plan_tree as native

    return TreeLayout(*native(*arguments))


def _check(
    tokens: Int64,
    offsets: Int64,
    shareable: Int64,
    capacity: int,
    segment_cost: float,
    area_cost: float,
) -> int:
    """The capacity, if all arguments are what `plan_tree` says."""
    named = {"tokens": tokens, "offsets": offsets, "shareable": shareable}
    for name, array in named.items():
        if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.ndim != 1:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else array
            raise ValueError(f"{name}: expected int64 in one dimension, got {found}")
    if offsets.size != shareable.size + 1:
        raise ValueError(
            f"offsets has {offsets.size} entries: expected {shareable.size + 1}, one more than "
            "shareable"
        )
    if capacity < 1 or capacity != int(capacity):
        raise ValueError(f"capacity={capacity}: expected an integer >= 1")
    for name, cost in (("segment_cost", segment_cost), ("area_cost", area_cost)):
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"{name}={cost}: expected a finite number >= 0")
    for i, expected in ((0, 0), (offsets.size - 1, tokens.size)):
        if offsets[i] != expected:
            raise ValueError(f"offsets[{i}]={offsets[i]}: expected {expected}")
    lengths = np.diff(offsets)
    outside = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if outside.size:
        i = int(outside[0])
        raise ValueError(
            f"offsets[{i}:{i + 2}]=[{offsets[i]}, {offsets[i + 1]}]: expected sequence {i} to have "
            f"a length in [1, capacity={capacity}], got {lengths[i]}"
        )
    outside = np.flatnonzero((shareable < 0) | (shareable > lengths))
    if outside.size:
        i = int(outside[0])
        raise ValueError(
            f"shareable[{i}]={shareable[i]}: expected 0 to the sequence's length {lengths[i]}"
        )
    return int(capacity)
