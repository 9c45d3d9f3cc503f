"""`PackedBatch`: sequences laid end to end, with all that a policy loss needs per token."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatch:
    """S sequences (prompt + completion) in rows of at most `capacity` tokens, flat over the rows.

    T tokens in all, none of them padding. The hidden state at t predicts `target[t]`, so the value
    of completion token j of a sequence with a prompt of P tokens lies at that sequence's position
    P - 1 + j; every per-completion-token field is placed there.
    """

    tokens: Tensor
    """int64 [T]."""
    positions: Tensor
    """int64 [T], 0, 1, ... within each sequence."""
    group_ids: Tensor
    """int64 [T], the sample of each token (plain packing: tokens attend within their group)."""
    parent_ids: Tensor
    """int64 [T], equal to `group_ids` without shared prefixes."""
    target: Tensor
    """int64 [T], the next token of the same sequence; 0 at a sequence's last token."""
    loss_mask: Tensor
    """bool [T], true where the target is a completion token that its sample's mask keeps."""
    old_logprob: Tensor | None
    """float32 [T], NaN where missing; None when no sample has any."""
    ref_logprob: Tensor | None
    """float32 [T], as `old_logprob`."""
    rollout_logprob: Tensor | None
    """float32 [T], as `old_logprob`."""
    advantages: Tensor
    """float32 [T], 0 outside the completions."""
    weights: Tensor
    """float32 [T], the sample's weight."""
    cu_seqlens: Tensor
    """int32 [S+1], sequence s is tokens cu_seqlens[s] : cu_seqlens[s+1]."""
    sequence_ids: Tensor
    """int64 [S] on the host: the sample of each sequence, rising within a row."""
    prompt_lengths: Tensor
    """int64 [S] on the host."""
    completion_lengths: Tensor
    """int64 [S] on the host; zeros are allowed."""
    rows: tuple[tuple[int, int], ...]
    """Row i holds sequences rows[i][0] : rows[i][1]."""
    capacity: int

    @property
    def num_tokens(self) -> int:
        """Computed tokens T."""
        return self.tokens.shape[0]

    @property
    def num_sequences(self) -> int:
        """Sequences S, one per sample."""
        return self.sequence_ids.shape[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PackedBatch]:
        return (self.row(i) for i in range(len(self)))

    @functools.cached_property
    def _bounds(self) -> Tensor:
        """int64 [S+1] on the host, so that rows are cut without a device sync."""
        ends = (self.prompt_lengths + self.completion_lengths).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends])

    def row(self, i: int) -> PackedBatch:
        """Row i as a batch of its own (views; `sequence_ids` still name the samples)."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of a batch of {len(self)} rows")
        first, last = self.rows[i]
        start, end = self._bounds[first].item(), self._bounds[last].item()
        cut: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _PER_TOKEN:
                cut[field.name] = None if value is None else value[start:end]
            elif field.name in _PER_SEQUENCE:
                cut[field.name] = value[first:last]
        cu_seqlens = self.cu_seqlens[first : last + 1] - int(start)
        return dataclasses.replace(self, **cut, cu_seqlens=cu_seqlens, rows=((0, last - first),))

    def to(self, device: torch.device | str) -> PackedBatch:
        """A copy with the per-token tensors and `cu_seqlens` on `device`."""
        moved = {
            name: value.to(device)
            for name in (*_PER_TOKEN, "cu_seqlens")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **moved)

    @functools.cached_property
    def _completion_index(self) -> Tensor:
        """int64 [sum of completion lengths] on the host: where completion tokens are predicted."""
        starts = self._bounds[:-1] + self.prompt_lengths - 1
        counts = self.completion_lengths
        offsets = counts.cumsum(0) - counts
        within = torch.arange(int(counts.sum())) - offsets.repeat_interleave(counts)
        return starts.repeat_interleave(counts) + within

    def unpack(self, values: Tensor, fill: float | None = math.nan) -> list[Tensor]:
        """values [T] -> one 1-D tensor per sample, values[P-1 : P-1+C] of each sequence, C >= 0.

        The list is in rising order of `sequence_ids`: sample order for a whole batch, and the
        order of `sequence_ids` itself for a single row. `fill` replaces tokens outside
        `loss_mask`, whose values a loss never computes; None keeps whatever is there.

        Raises ValueError for another shape, or for a NaN fill of an integer tensor.
        """
        if values.shape != self.tokens.shape:
            raise ValueError(f"values of shape {list(values.shape)}: expected [{self.num_tokens}]")
        index = self._completion_index.to(values.device)
        flat = values.index_select(0, index)
        if fill is not None:
            if math.isnan(fill) and not values.dtype.is_floating_point:
                raise ValueError(f"fill=nan for {values.dtype} values: pass fill=None or a number")
            keep = self.loss_mask.to(values.device).index_select(0, index)
            flat = flat.masked_fill(~keep, fill)
        pieces = flat.split(self.completion_lengths.tolist()) if self.num_sequences else ()
        return [pieces[s] for s in self.sequence_ids.argsort().tolist()]


_PER_TOKEN = (
    "tokens",
    "positions",
    "group_ids",
    "parent_ids",
    "target",
    "loss_mask",
    "old_logprob",
    "ref_logprob",
    "rollout_logprob",
    "advantages",
    "weights",
)
_PER_SEQUENCE = ("sequence_ids", "prompt_lengths", "completion_lengths")
