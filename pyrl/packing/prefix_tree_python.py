"""The planner of prefix_tree.py where pyrl._host was not built: the same layouts, slower.

csrc/host has the same steps under the same names, and says why they are right.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pyrl.packing.fill_python import few_bins_python
from pyrl.packing.planner import best_fit_python

Int64 = NDArray[np.int64]


@dataclasses.dataclass
class _Tree:
    """Nodes in depth-first preorder, node 0 an empty root. v holds tokens end[parent[v]]:end[v]."""

    parent: list[int]
    end: list[int]
    ends: list[bool]  # [node]: some sequence ends there
    last: list[int]  # [sequence]: the node it ends at


ROOT, ABSENT = -1, -2


def plan_tree_python(
    tokens: Int64,
    offsets: Int64,
    shareable: Int64,
    capacity: int,
    segment_cost: float,
    area_cost: float,
) -> tuple[Int64, ...]:
    """The columns of `TreeLayout` in their order; arguments already checked."""
    tree = _share(_radix_tree(tokens, offsets, shareable), segment_cost, area_cost)
    parent, node, last = _place(tree, capacity)
    return _lay_out(tree, parent, node, last)


def _preorder(parent: Sequence[int], key: Sequence[int]) -> list[int]:
    """Ids of a forest in depth-first preorder, siblings by rising key."""
    children: list[list[int]] = [[] for _ in range(len(parent) + 1)]  # the last: the roots
    for v in sorted(range(len(parent)), key=key.__getitem__):
        if parent[v] != ABSENT:
            children[parent[v]].append(v)
    order: list[int] = []
    stack = children[ROOT][::-1]
    while stack:
        v = stack.pop()
        order.append(v)
        stack.extend(reversed(children[v]))
    return order


def _radix_tree(tokens: Int64, offsets: Int64, shareable: Int64) -> _Tree:
    starts, limits = offsets.tolist(), shareable.tolist()
    # Of each node: its first sequence, parent, and tokens begin:end.
    first, parent, begin, end = [0], [ROOT], [0], [0]
    child_of: dict[tuple[int, int], int] = {}
    at = []

    def add(*node: int) -> int:
        for column, value in zip((first, parent, begin, end), node, strict=True):
            column.append(value)
        return len(first) - 1

    for i, limit in enumerate(limits):
        v, depth = 0, 0
        while depth < limit:
            token = int(tokens[starts[i] + depth])
            child = child_of.get((v, token))
            if child is None:
                child = child_of[v, token] = add(i, v, depth, limit)
                v = child
                break
            stop = min(end[child], limit)
            run = starts[first[child]]
            depth += 1  # the table compared the first token
            if depth < stop:
                own = starts[i]
                differ = tokens[run + depth : run + stop] != tokens[own + depth : own + stop]
                depth = depth + int(differ.argmax()) if differ.any() else stop
            if depth < end[child]:
                above = add(first[child], v, begin[child], depth)
                child_of[v, token] = above
                child_of[above, int(tokens[run + depth])] = child
                parent[child], begin[child] = above, depth
                child = above
            v = child
        at.append(v)
    last = []
    for i, limit in enumerate(limits):
        length = starts[i + 1] - starts[i]
        last.append(at[i] if limit == length else add(i, at[i], limit, length))

    order = _preorder(parent, first)
    place = [0] * len(order)
    for j, v in enumerate(order):
        place[v] = j
    last = [place[v] for v in last]
    ends = [False] * len(order)
    for v in last:
        ends[v] = True
    return _Tree(
        [ROOT, *(place[parent[v]] for v in order[1:])], [end[v] for v in order], ends, last
    )


class _Breaks:
    """Pairs (w, fall), popped at both ends, least first at the low one; ties by fall."""

    def __init__(self) -> None:
        self.low: list[tuple[float, int, int]] = []
        self.high: list[tuple[float, int, int]] = []
        self.alive: dict[int, tuple[float, int]] = {}

    def push(self, w: float, fall: int, number: int) -> None:
        """number: unique, to know in one heap what the other has popped."""
        heapq.heappush(self.low, (w, fall, number))
        heapq.heappush(self.high, (-w, -fall, number))
        self.alive[number] = (w, fall)

    def least(self) -> tuple[float, int, int] | None:
        while self.low and self.low[0][2] not in self.alive:
            heapq.heappop(self.low)
        return self.low[0] if self.low else None

    def greatest(self) -> tuple[float, int, int] | None:
        while self.high and self.high[0][2] not in self.alive:
            heapq.heappop(self.high)
        return (-self.high[0][0], -self.high[0][1], self.high[0][2]) if self.high else None


def _sharing_limits(tree: _Tree, prefix: Sequence[float], segment: float) -> list[float]:
    """limit[v]: v is worth a segment iff prefix(a) < limit[v], a the end of the segment above."""
    n = len(tree.parent)
    ways = [int(ends) for ends in tree.ends]
    for v in range(1, n):
        ways[tree.parent[v]] += 1
    limit = [-math.inf] * n
    if segment == 0:
        return [math.inf if way > 1 else -math.inf for way in ways]
    intercept, value, slope = [0.0] * n, [0.0] * n, [0] * n
    breaks: list[_Breaks | None] = [None] * n
    for v in range(n - 1, 0, -1):
        up = tree.parent[v]
        right, left = prefix[v], prefix[up]
        own = right + segment + value[v]
        line, at_end, steep = intercept[v], value[v], slope[v]
        if tree.ends[v]:
            line += right + segment
            at_end += segment
            steep += 1
        points = breaks[v] or _Breaks()
        if ways[v] > 1:
            fall = ways[v]
            crossing = (line - own) / (fall - 1)
            while (low := points.least()) and low[0] < crossing:
                line += low[1] * low[0]
                fall += low[1]
                del points.alive[low[2]]
                crossing = (line - own) / (fall - 1)
            limit[v] = crossing
            line = own
            if crossing < left:
                points.push(crossing, fall - 1, v)
            else:
                points = _Breaks()
                at_end, steep = own - right, 1
        w = right
        while (high := points.greatest()) and high[0] >= left:
            at_end += steep * (w - high[0])
            w = high[0]
            steep -= high[1]
            del points.alive[high[2]]
        at_end += steep * (w - left)
        intercept[up] += line
        value[up] += at_end
        slope[up] += steep
        other = breaks[up] or _Breaks()
        if len(points.alive) > len(other.alive):
            points, other = other, points
        for number, (w, fall) in points.alive.items():
            other.push(w, fall, number)
        breaks[up], breaks[v] = other, None
    return limit


def _share(tree: _Tree, segment: float, area: float) -> _Tree:
    """The tree of segments: nodes not worth one give their tokens to those below."""
    prefix = [float(x) + area * (float(x) * (float(x) + 1.0) / 2.0) for x in tree.end]
    limit = _sharing_limits(tree, prefix, segment)
    kept = _Tree([ROOT], [0], [False], [])
    kept_prefix = [0.0]
    above, place = [0] * len(tree.parent), [0] * len(tree.parent)
    for v in range(1, len(tree.parent)):
        up = above[v] = above[tree.parent[v]]
        keep = kept_prefix[up] < limit[v]
        if not keep and not tree.ends[v]:
            continue
        place[v] = len(kept.parent)
        if keep:
            above[v] = place[v]
        kept.parent.append(up)
        kept.end.append(tree.end[v])
        kept.ends.append(tree.ends[v])
        kept_prefix.append(prefix[v])
    kept.last = [place[v] for v in tree.last]
    return kept


def _place(tree: _Tree, capacity: int) -> tuple[list[int], list[int], list[int]]:
    """The segments as a forest with one root a row: parent and tree node of each id, and last.

    Ids from len(tree.parent) on are the parts of nodes too large for one row; those of node 0 are
    the rows.
    """
    n = len(tree.parent)
    size = [0] * n
    large = [True] + [False] * (n - 1)
    for v in range(n - 1, 0, -1):
        up = tree.parent[v]
        size[v] += tree.end[v] - tree.end[up]
        size[up] += size[v]
        large[v] = size[v] > capacity - tree.end[up]
    parent, node = list(tree.parent), list(range(n))
    pieces: dict[int, list[int]] = {}  # of a large node, falling
    first_part: dict[int, int] = {}
    for v in range(n - 1, -1, -1):
        up = tree.parent[v]
        if not large[v]:
            if large[up]:
                pieces.setdefault(up, []).append(v)
            continue
        rising = pieces.pop(v, [])[::-1]
        lengths = np.array([size[piece] for piece in rising], dtype=np.int64)
        pack = few_bins_python if v == 0 else best_fit_python
        bins = pack(lengths, capacity - tree.end[v]).tolist()
        first = first_part[v] = len(parent)
        filled = [0] * (max(bins, default=-1) + 1)
        for piece, number in zip(rising, bins, strict=True):
            parent[piece] = first + number
            filled[number] += size[piece]
        own = 0 if v == 0 else tree.end[v] - tree.end[up]
        parent += [ROOT] * len(filled)
        node += [v] * len(filled)
        size += [own + content for content in filled]
        if v > 0:
            pieces.setdefault(up, []).extend(range(len(parent) - 1, first - 1, -1))
        parent[v] = ABSENT
    return parent, node, [first_part.get(v, v) for v in tree.last]


def _lay_out(tree: _Tree, parent: list[int], node: list[int], last: list[int]) -> tuple[Int64, ...]:
    n, nodes = len(parent), len(tree.parent)
    smallest, ways = [len(last)] * n, [0] * n
    for i, v in enumerate(last):
        smallest[v] = min(smallest[v], i)
        ways[v] = 1
    upward = [*range(nodes - 1, -1, -1), *range(nodes, n)]
    for v in upward:
        if parent[v] >= 0:
            smallest[parent[v]] = min(smallest[parent[v]], smallest[v])
            ways[parent[v]] += 1
    rows = 0
    for v in range(nodes, n):
        if node[v] == 0:
            smallest[v] = rows
            rows += 1
    # A part with one way on is no branching: its tokens go to the segment below. Parents first.
    through: dict[int, int] = {}
    for v in reversed(upward):
        if parent[v] >= 0:
            parent[v] = through.get(parent[v], parent[v])
            if v >= nodes and ways[v] == 1:
                through[v] = parent[v]
                parent[v] = ABSENT

    index = [-1] * n
    columns: list[list[int]] = [[] for _ in range(6)]
    row = -1
    for v in _preorder(parent, smallest):
        up = parent[v]
        if up == ROOT:
            row += 1
            continue
        index[v] = len(columns[0])
        found = (row, index[up], index[v] + 1, smallest[v], tree.end[node[up]], tree.end[node[v]])
        for column, value in zip(columns, found, strict=True):
            column.append(value)
    parents, subtree = columns[1], columns[2]
    for j in range(len(parents) - 1, -1, -1):
        if parents[j] >= 0:
            subtree[parents[j]] = max(subtree[parents[j]], subtree[j])
    columns.append([index[v] for v in last])
    return tuple(np.array(column, dtype=np.int64) for column in columns)
