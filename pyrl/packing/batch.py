"""`PackedBatch`: samples laid out as token trees, with all that a policy loss needs per token."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyrl.packing.tree_plan import TreePlan


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatch:
    """S samples (prompt + completion) in rows of at most `capacity` tokens, flat over the rows.

    T tokens are computed, none of them padding, in G segments: runs of tokens, each with a parent
    segment or none, in depth-first preorder. A token attends to its own segment up to itself and to
    the whole of every ancestor. Without shared prefixes every sample is one segment.

    The loss has R places with one target each. Aligned (`hidden_index` None), R = T: the hidden
    state at t predicts `target[t]`. Otherwise R is the number of completion tokens, sample after
    sample, and `at_targets(hidden)` [R, D] predicts `target` [R].
    """

    tokens: Tensor
    """int64 [T]."""
    positions: Tensor
    """int64 [T], within the token's sample: a segment goes on where its parent ends."""
    group_ids: Tensor
    """int64 [T], the segment of each token."""
    parent_ids: Tensor
    """int64 [T], the parent of that segment; of a root, the segment itself."""
    last: Tensor
    """int32 [T]: token j is attended by the tokens j <= i < last[j], counted in its row."""
    hidden_index: Tensor | None
    """int64 [R], the token that predicts each target, counted in its row; None: aligned."""
    target: Tensor
    """int64 [R], the next token of the same sample; aligned, 0 at a sample's last token."""
    loss_mask: Tensor
    """bool [R], true where the target is a completion token that its sample's mask keeps."""
    old_logprob: Tensor | None
    """float32 [R], NaN where missing; None when no sample has any."""
    ref_logprob: Tensor | None
    """float32 [R], as `old_logprob`."""
    rollout_logprob: Tensor | None
    """float32 [R], as `old_logprob`."""
    advantages: Tensor
    """float32 [R], 0 outside the completions."""
    weights: Tensor
    """float32 [R], the sample's weight."""
    cu_seqlens: Tensor
    """int32 [S+1]: sample s has the targets cu_seqlens[s] : cu_seqlens[s+1]. Aligned, they begin
    with those of the prompt tokens that no sample before it in the row has."""
    bounds: Tensor
    """`cu_seqlens` as int64 on the host."""
    sequence_ids: Tensor
    """int64 [S] on the host: the samples in packed order, row after row."""
    sequence_segments: Tensor
    """int64 [S] on the host, the segment that the sample ends with; its tokens are those of this
    segment and of all above it."""
    prompt_lengths: Tensor
    """int64 [S] on the host."""
    completion_lengths: Tensor
    """int64 [S] on the host; zeros are allowed."""
    segment_starts: Tensor
    """int64 [G+1] on the host: segment g is tokens segment_starts[g] : segment_starts[g+1]."""
    segment_parents: Tensor
    """int64 [G] on the host, -1 for a root."""
    rows: tuple[tuple[int, int], ...]
    """Row i holds samples rows[i][0] : rows[i][1] ..."""
    row_segments: tuple[tuple[int, int], ...]
    """... and segments row_segments[i][0] : row_segments[i][1]."""
    capacity: int

    @property
    def num_tokens(self) -> int:
        """Computed tokens T."""
        return self.tokens.shape[0]

    @property
    def num_sequences(self) -> int:
        """Samples S."""
        return self.sequence_ids.shape[0]

    @property
    def sample_tokens(self) -> int:
        """Prompt and completion tokens of all samples: what T is without shared prefixes."""
        return int(self.prompt_lengths.sum() + self.completion_lengths.sum())

    @functools.cached_property
    def plan(self) -> TreePlan:
        """Who attends to whom in a single row, for the attention `pyrl_tree`.

        Raises ValueError for a batch of several rows, whose `last` counts in each row: take
        `row(i)`.
        """
        from pyrl.packing.tree_plan import TreePlan  # its module imports transformers

        if len(self) > 1:
            raise ValueError(f"a plan of {len(self)} rows: take one of `row(i)`")
        plan = TreePlan.build(self.segment_starts, self.segment_parents)
        return dataclasses.replace(plan, last=self.last)

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of a transformers model with `attn_implementation="pyrl_tree"`.

        `model(**row.model_inputs(), use_cache=False)` computes one row, [1, T, ...].
        """
        from pyrl.packing.attention import no_mask

        return {
            "input_ids": self.tokens[None],
            "position_ids": self.positions[None],
            "attention_mask": no_mask(self.tokens.device),
            "tree_plan": self.plan,
        }

    def at_targets(self, hidden: Tensor) -> Tensor:
        """hidden [T, ...] of one row -> hidden[hidden_index] [R, ...]; aligned, hidden itself.

        Raises ValueError for another T, or for several rows that are not aligned: `hidden_index`
        counts in each row, so take `row(i)`.
        """
        if hidden.shape[:1] != self.tokens.shape:
            raise ValueError(f"hidden of shape {list(hidden.shape)}: expected [{self.num_tokens}]")
        if self.hidden_index is None:
            return hidden
        if len(self) > 1:
            raise ValueError(f"hidden states of {len(self)} rows: take one of `row(i)`")
        return hidden.index_select(0, self.hidden_index)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PackedBatch]:
        return (self.row(i) for i in range(len(self)))

    def row(self, i: int) -> PackedBatch:
        """Row i as a batch of its own (views; `sequence_ids` still name the samples)."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of a batch of {len(self)} rows")
        (first, last), (from_segment, to_segment) = self.rows[i], self.row_segments[i]
        starts = self.segment_starts[from_segment : to_segment + 1]
        bounds = self.bounds[first : last + 1]
        cuts = {
            _PER_TOKEN: slice(int(starts[0]), int(starts[-1])),
            _PER_TARGET: slice(int(bounds[0]), int(bounds[-1])),
            _PER_SAMPLE: slice(first, last),
        }
        cut: dict[str, Any] = {
            name: value[where]
            for names, where in cuts.items()
            for name in names
            if (value := getattr(self, name)) is not None
        }
        parents = self.segment_parents[from_segment:to_segment]
        return dataclasses.replace(
            self,
            **cut,
            cu_seqlens=self.cu_seqlens[first : last + 1] - int(bounds[0]),
            bounds=bounds - bounds[0],
            sequence_segments=self.sequence_segments[first:last] - from_segment,
            segment_starts=starts - starts[0],
            segment_parents=torch.where(parents < 0, parents, parents - from_segment),
            rows=((0, last - first),),
            row_segments=((0, to_segment - from_segment),),
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """With the tensors of tokens and targets on `device`: one copy of one buffer."""
        device = torch.device(device)
        names = [name for name in _ON_DEVICE if getattr(self, name) is not None]
        tensors = [getattr(self, name).contiguous() for name in names]
        if all(tensor.device == device for tensor in tensors):
            return self
        # 16 bytes: every view of the buffer is aligned for its dtype.
        sizes = [-(-tensor.nbytes // 16) * 16 for tensor in tensors]
        pinned = device.type == "cuda" and not self.tokens.is_cuda
        source = torch.empty(
            sum(sizes), dtype=torch.uint8, device=self.tokens.device, pin_memory=pinned
        )
        for tensor, place in zip(tensors, source.split(sizes), strict=True):
            place[: tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten())
        moved = {
            name: place[: tensor.nbytes].view(tensor.dtype)
            for name, tensor, place in zip(
                names, tensors, source.to(device, non_blocking=pinned).split(sizes), strict=True
            )
        }
        return dataclasses.replace(self, **moved)

    @functools.cached_property
    def _completion_index(self) -> Tensor:
        """int64 [sum of completion lengths] on the host: the places of completion tokens in R."""
        counts = self.completion_lengths
        # Aligned, a sample's last place is its last token's, which predicts nothing.
        starts = self.bounds[1:] - counts - int(self.hidden_index is None)
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(
            counts
        )
        return starts.repeat_interleave(counts) + within

    def unpack(self, values: Tensor, fill: float | None = math.nan) -> list[Tensor]:
        """values [R] -> one 1-D tensor per sample, of its C >= 0 completion tokens.

        The list is in rising order of `sequence_ids`: sample order for a whole batch, also for a
        single row. `fill` replaces the values outside `loss_mask`, which a loss never computes;
        None keeps whatever is there.

        Raises ValueError for another shape, or for a NaN fill of an integer tensor.
        """
        if values.shape != self.target.shape:
            raise ValueError(
                f"values of shape {list(values.shape)}: expected {list(self.target.shape)}"
            )
        index = self._completion_index.to(values.device)
        flat = values.index_select(0, index)
        if fill is not None:
            if math.isnan(fill) and not values.dtype.is_floating_point:
                raise ValueError(f"fill=nan for {values.dtype} values: pass fill=None or a number")
            keep = self.loss_mask.to(values.device).index_select(0, index)
            flat = flat.masked_fill(~keep, fill)
        pieces = flat.split(self.completion_lengths.tolist()) if self.num_sequences else ()
        return [pieces[s] for s in self.sequence_ids.argsort().tolist()]


_PER_TOKEN = ("tokens", "positions", "group_ids", "parent_ids", "last")
_PER_TARGET = (
    "hidden_index",
    "target",
    "loss_mask",
    "old_logprob",
    "ref_logprob",
    "rollout_logprob",
    "advantages",
    "weights",
)
_PER_SAMPLE = ("sequence_ids", "prompt_lengths", "completion_lengths")
_ON_DEVICE = (*_PER_TOKEN, *_PER_TARGET, "cu_seqlens")
