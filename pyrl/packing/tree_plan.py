"""Which tokens of a packed row attend which: a forest of segments in depth-first preorder.

    i attends j  <=>  j <= i < last[j],    last[j] = the end of the subtree of j's segment

A token sees its own segment causally and every token of every ancestor segment; a shared prefix is
a segment with children. One number a column describes the mask (column-wise as in FlashMask,
arXiv 2410.01359), because in preorder the tokens below a segment are contiguous.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrl.packing.attention import VarlenPlan


class Run(NamedTuple):
    """Tokens start:stop with one `last`: they attend each other causally, stop:end see them all.

    A segment, or a chain of only children: both are the same attention problem.
    """

    start: int
    stop: int
    end: int
    """First token after the subtree (`last` of every token of the run)."""
    parent: int
    """Index of the run above, -1 for none; its tokens precede this run's on the path."""
    offset: int
    """Tokens of all runs above, so the path position of token `start`."""


def _integers(name: str, values: Any) -> list[int]:
    """A sequence, array or tensor as Python ints; ValueError with the position of what is none."""
    try:
        listed = list(values.tolist() if hasattr(values, "tolist") else values)
    except TypeError:
        raise ValueError(f"{name}={values!r}: expected a sequence of integers") from None
    for at, value in enumerate(listed):
        try:
            listed[at] = operator.index(value)
        except TypeError:
            raise ValueError(f"{name}[{at}]={value!r}: expected an integer") from None
    return listed


def _subtree_ends(starts: list[int], parents: list[int]) -> list[int]:
    """[G] from starts [G+1], parents [G]; ValueError unless that is a forest in preorder."""
    if not starts or starts[0] != 0:
        raise ValueError(f"starts[0]={starts[0] if starts else None}: expected 0")
    if len(parents) != len(starts) - 1:
        raise ValueError(f"{len(parents)} parents and {len(starts)} starts: expected G and G+1")
    for g, (a, b) in enumerate(itertools.pairwise(starts)):
        if b < a:
            raise ValueError(f"starts[{g + 1}]={b} is below {a}")
    ends = [starts[-1]] * len(parents)
    path: list[int] = []
    for g, parent in enumerate(parents):
        if not -1 <= parent < g:
            raise ValueError(f"parents[{g}]={parent}: expected -1 or an earlier segment")
        while path and path[-1] != parent:
            ends[path.pop()] = starts[g]
        if parent >= 0 and not path:
            raise ValueError(
                f"parents[{g}]={parent}: the subtree of segment {parent} ended before token "
                f"{starts[g]}; segments must be in depth-first preorder"
            )
        path.append(g)
    return ends


def _runs(starts: list[int], ends: list[int]) -> tuple[Run, ...]:
    """Maximal runs of tokens with equal `last`; empty segments leave no trace."""
    runs: list[Run] = []
    path: list[int] = []
    for (start, stop), end in zip(itertools.pairwise(starts), ends, strict=True):
        if start == stop:
            continue
        if runs and runs[-1].stop == start and runs[-1].end == end:
            runs[-1] = runs[-1]._replace(stop=stop)
            continue
        while path and runs[path[-1]].end <= start:
            path.pop()
        parent = path[-1] if path else -1
        above = runs[parent] if path else Run(0, 0, 0, -1, 0)
        path.append(len(runs))
        runs.append(Run(start, stop, end, parent, above.offset + above.stop - above.start))
    return tuple(runs)


@dataclasses.dataclass(frozen=True, eq=False)
class TreePlan:
    """A packed row of T tokens in G segments; build it with `build` or `from_ids`."""

    starts: tuple[int, ...]
    """[G+1]: segment g is tokens starts[g]:starts[g+1]; it may be empty."""
    parents: tuple[int, ...]
    """[G]: the segment that segment g continues, -1 for a root."""
    ends: tuple[int, ...]
    """[G]: first token after the subtree of segment g."""
    last: Tensor
    """int32 [T], on the tokens' device: token j is attended by tokens j <= i < last[j]."""
    runs: tuple[Run, ...]
    """The attention problems of the row, in token order."""
    block_masks: dict[int | None, Any] = dataclasses.field(default_factory=dict, repr=False)
    """FlexAttention's block masks by sliding window, made once for all layers (`flex`)."""

    @classmethod
    def build(cls, starts: Any, parents: Any, *, device: torch.device | str = "cpu") -> TreePlan:
        """From starts [G+1] and parents [G]: sequences of ints, integer arrays or tensors.

        Raises ValueError unless starts rises from 0 (empty segments are allowed) and every parent
        is -1 or lies on the path to the preceding segment (depth-first preorder).
        """
        starts, parents = _integers("starts", starts), _integers("parents", parents)
        ends = _subtree_ends(starts, parents)
        lengths = torch.tensor([b - a for a, b in itertools.pairwise(starts)], dtype=torch.int64)
        last = torch.tensor(ends, dtype=torch.int32).repeat_interleave(lengths)
        return cls(tuple(starts), tuple(parents), tuple(ends), last.to(device), _runs(starts, ends))

    @classmethod
    def from_ids(cls, group_ids: Tensor, parent_ids: Tensor) -> TreePlan:
        """From integer [T] ids a token: a maximal run of one group id is a segment.

        Its parent is the segment whose group id is its parent id; parent == group or -1: a root.
        Raises ValueError for a group id that restarts, a parent id that changes inside a segment,
        is unknown so far, or whose subtree has ended.
        """
        groups, above = _integers("group_ids", group_ids), _integers("parent_ids", parent_ids)
        if len(groups) != len(above):
            raise ValueError(f"{len(groups)} group_ids and {len(above)} parent_ids")
        starts: list[int] = []
        parents: list[int] = []
        seen: dict[int, int] = {}
        for t, (group, parent) in enumerate(zip(groups, above, strict=True)):
            if t and group == groups[t - 1]:
                if parent != above[t - 1]:
                    raise ValueError(
                        f"parent_ids[{t}]={parent}: the segment of group {group} began with "
                        f"{above[t - 1]}"
                    )
                continue
            if group in seen:
                raise ValueError(f"group_ids[{t}]={group} restarts a group that had ended")
            if parent not in (group, -1) and parent not in seen:
                raise ValueError(f"parent_ids[{t}]={parent}: no such group before token {t}")
            parents.append(-1 if parent in (group, -1) else seen[parent])
            seen[group] = len(seen)
            starts.append(t)
        return cls.build(
            [*starts, len(groups)], parents, device=getattr(group_ids, "device", "cpu")
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.starts[-1]

    @functools.cached_property
    def max_length(self) -> int:
        """Tokens of the longest path from a root to a leaf; 0 without any."""
        return max((r.offset + r.stop - r.start for r in self.runs), default=0)

    @functools.cached_property
    def area(self) -> int:
        """Attended (query, key) pairs: what attention costs. sum_t (positions[t] + 1)."""
        lengths = ((r.stop - r.start, r.offset) for r in self.runs)
        return sum(n * offset + n * (n + 1) // 2 for n, offset in lengths)

    @property
    def is_flat(self) -> bool:
        """Nothing is shared: every tree is a path, so the row is plain packed sequences."""
        return all(run.stop == run.end for run in self.runs)

    @functools.cached_property
    def positions(self) -> Tensor:
        """int64 [T], on the device of `last`: tokens above each token on its path."""
        pieces = [torch.arange(r.offset, r.offset + r.stop - r.start) for r in self.runs]
        return torch.cat([torch.empty(0, dtype=torch.int64), *pieces]).to(self.last.device)

    @functools.cached_property
    def varlen(self) -> VarlenPlan:
        """The boundaries of the runs; the whole attention problem of a flat plan."""
        bounds = [0, *(run.stop for run in self.runs)]
        lengths = tuple(run.stop - run.start for run in self.runs)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32).to(self.last.device)
        return VarlenPlan(cu_seqlens, lengths)

    def path(self, run: int) -> Sequence[int]:
        """The runs above `run`, root first."""
        above: list[int] = []
        while (run := self.runs[run].parent) >= 0:
            above.append(run)
        return above[::-1]


def tree_mask(plan: TreePlan, sliding_window: int | None = None) -> Tensor:
    """bool [T, T]: (key <= query) & (query < last[key]), the oracle of everything here.

    With a window also positions[query] - positions[key] < sliding_window.
    """
    t = torch.arange(plan.num_tokens, device=plan.last.device)
    mask = (t <= t[:, None]) & (t[:, None] < plan.last)
    if sliding_window:
        mask &= plan.positions[:, None] - plan.positions < sliding_window
    return mask
