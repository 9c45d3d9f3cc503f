"""The sampling support: the tokens that truncated sampling (top-k, top-p, min-p) left at each step.

A policy sampled with truncation is softmax over those tokens only. Replaying them in the loss makes
the ratio of an unchanged policy exactly 1; with the whole vocabulary it is the probability that the
truncation kept, below 1 at nearly every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyrl.ops import deterministic

#: Logits or mask entries that the constructors handle at a time.
CHUNK = 1 << 22


class Support(NamedTuple):
    """Token t was drawn from the tokens ids[indptr[t]:indptr[t + 1]].

    indptr [T + 1] and ids [nnz], each int32 or int64 · T counts the elements of `target`, row by
    row for a padded [B, L] · the ids of one token in any order, none twice. Tokens outside the loss
    mask may hold anything, an empty support included.
    """

    indptr: Tensor
    ids: Tensor

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> Support:
        """The tokens left of softmax(logits / temperature) by top-k, then top-p, then min-p.

        logits [..., V], one token of the result for each row. The order is that of the warpers of
        Hugging Face's `generate`, and so are the rules, each on what the one before left,
        renormalised: top_k (0: off) keeps the k largest and what ties with the k-th; top_p (1: off)
        the smallest set of the most likely whose probabilities sum to at least top_p; min_p
        (0: off) what is at least min_p times as likely as the most likely. fp32, as there.

        An engine that has its truncated scores at hand should rather use
        `from_masks(scores > -inf)`: no rounding can then change a set.
        """
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature!r}: expected a finite number > 0")
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
            raise ValueError(f"top_k={top_k!r}: expected an integer >= 0")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p!r}: expected 0 < top_p <= 1")
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p={min_p!r}: expected 0 <= min_p <= 1")
        rows = logits.detach().reshape(-1, logits.shape[-1])
        step = max(1, CHUNK // max(rows.shape[1], 1))
        return cls.cat(
            [
                cls.from_masks(_truncate(part.float() / temperature, top_k, top_p, min_p))
                for part in rows.split(step)
            ]
        )

    @classmethod
    def from_masks(cls, masks: Tensor) -> Support:
        """The true entries of masks [..., V] bool, one token of the result for each row."""
        if masks.dtype != torch.bool or masks.dim() < 1:
            raise ValueError(
                f"masks: expected bool [..., V], got {masks.dtype} {list(masks.shape)}"
            )
        rows = masks.reshape(-1, masks.shape[-1])
        return cls(_offsets(rows.sum(dim=1)), rows.nonzero()[:, 1].to(torch.int32))

    @classmethod
    def cat(cls, parts: Sequence[Support]) -> Support:
        """The tokens of all parts, one part after another."""
        if not parts:
            raise ValueError("parts: expected at least one Support")
        lengths = torch.cat([p.indptr.diff() for p in parts])
        return cls(_offsets(lengths), torch.cat([p.ids for p in parts]))

    @classmethod
    def stack(cls, steps: Sequence[Support]) -> Support:
        """Decoding steps of the same B rows each, to the B * L tokens of a padded [B, L]."""
        rows = [s.indptr.numel() - 1 for s in steps]
        if len(set(rows)) != 1:
            raise ValueError(f"steps: expected supports of equally many tokens, got {rows}")
        by_step = cls.cat(steps)
        order = torch.arange(len(steps) * rows[0], device=by_step.indptr.device)
        return by_step.take(order.view(len(steps), rows[0]).T.reshape(-1))

    def take(self, index: Tensor) -> Support:
        """The supports of the tokens `index` [n] (int64, or a bool mask [T]), in that order."""
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        lengths = self.indptr.diff()[index]
        _, position = span_entries(self.indptr[index], lengths)
        return Support(_offsets(lengths), self.ids[position])

    def to(self, device: torch.device | str) -> Support:
        """On another device."""
        return Support(self.indptr.to(device), self.ids.to(device))


def _truncate(x: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """bool [n, V]: what of fp32 scores x [n, V] is left."""
    if 0 < top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        # From the least likely up: out, as long as no more than 1 - top_p is out.
        rising, order = x.sort()
        out = rising.softmax(-1).cumsum(-1) <= 1 - top_p
        out[:, -1:] = False
        x = x.masked_fill(out.scatter(-1, order, out), -torch.inf)
    if min_p > 0:
        p = x.softmax(-1)
        x = x.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return x > -torch.inf


def _offsets(lengths: Tensor) -> Tensor:
    """int64 [n + 1]: 0 and the running sums of lengths [n]."""
    return torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0))


def span_entries(begin: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Of spans begin[i] ... begin[i] + length[i] - 1, one after another: i, and the elements."""
    row = torch.repeat_interleave(torch.arange(len(length), device=length.device), length)
    first = begin - (length.cumsum(0) - length)
    return row, torch.arange(row.numel(), device=row.device) + first[row]


def support_fields(
    support: Support | None, target: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """indptr int64 and ids of an optional support; checks types, shapes and devices."""
    if support is None:
        return None, None
    if not isinstance(support, Support):
        raise ValueError(f"support: expected Support(indptr, ids), got {type(support).__name__}")
    for name, value, shape in (
        ("indptr", support.indptr, (target.numel() + 1,)),
        ("ids", support.ids, (support.ids.numel(),)),
    ):
        if value.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"support.{name}: expected int32 or int64, got {value.dtype}")
        if tuple(value.shape) != shape:
            raise ValueError(f"support.{name}: expected shape {shape}, got {tuple(value.shape)}")
        if value.device != target.device:
            raise ValueError(
                f"support.{name}: expected a tensor on {target.device}, got {value.device}"
            )
    return support.indptr.long().contiguous(), support.ids.contiguous()


def check_support(
    indptr: Tensor | None, ids: Tensor | None, target: Tensor, keep: Tensor, vocabulary: int
) -> None:
    """ValueError naming the first place where a support is malformed or misses its kept target.

    indptr int64 [T + 1]; target [T] within the vocabulary where keep [T]. The supports of unkept
    tokens are not looked at.
    """
    if indptr is None or ids is None:
        return
    lengths = indptr.diff()
    ends = torch.stack([indptr[0] != 0, indptr[-1] != ids.numel(), (lengths < 0).any()])
    if ends.any():
        _refuse_indptr(indptr, ids.numel())
    tokens = keep.nonzero()[:, 0]
    support = Support(indptr, ids).take(tokens)
    row, ids = torch.repeat_interleave(tokens, support.indptr.diff()), support.ids.long()
    outside = (ids < 0) | (ids >= vocabulary)
    found = torch.zeros_like(keep).index_fill_(0, row[ids == target[row]], True)
    missing = keep & ~found
    # Rows in rising order, as the constructors write them, need no sort to show that none repeats.
    unsorted = (row[1:] == row[:-1]) & (ids[1:] <= ids[:-1])
    wrong = torch.stack([outside.any(), missing.any(), unsorted.any()]).tolist()
    if wrong[0]:
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"support of token {int(row[i])}: id {int(ids[i])} is outside the vocabulary "
            f"[0, {vocabulary})"
        )
    if wrong[1]:
        i = int(missing.nonzero()[0])
        raise ValueError(
            f"target[{i}] = {int(target[i])} is outside its support of {int(lengths[i])} tokens"
        )
    if wrong[2]:
        key = (row * vocabulary + ids).sort().values
        again = (key[1:] == key[:-1]).nonzero()
        if again.numel():
            repeated = int(key[int(again[0])])
            raise ValueError(
                f"support of token {repeated // vocabulary}: id {repeated % vocabulary} is in it "
                "more than once"
            )


def _refuse_indptr(indptr: Tensor, entries: int) -> None:
    if int(indptr[0]) != 0:
        raise ValueError(f"support.indptr[0] = {int(indptr[0])}: expected 0")
    falls = (indptr.diff() < 0).nonzero()
    if falls.numel():
        i = int(falls[0])
        raise ValueError(
            f"support.indptr falls at {i + 1}: {int(indptr[i])} → {int(indptr[i + 1])}"
        )
    raise ValueError(
        f"support.indptr[{indptr.numel() - 1}] = {int(indptr[-1])}: expected {entries}, the "
        "number of ids"
    )


def support_hashes(indptr: Tensor | None, ids: Tensor | None) -> Tensor | None:
    """int64 [T]: a hash of each token's support, for deterministic mode; None without a support."""
    if indptr is None or ids is None or not deterministic.enabled():
        return None
    running = deterministic.hashes(ids).cumsum(0)
    running = torch.cat([running.new_zeros(1), running])
    return running[indptr[1:]] - running[indptr[:-1]]


class SupportRows:
    """The support arguments of row kernels (see `Backend`) for the tokens `index`, by chunks."""

    def __init__(
        self, indptr: Tensor | None, ids: Tensor | None, index: Tensor | slice = slice(None)
    ) -> None:
        self._ids = ids
        self._spans = None
        if indptr is not None:
            self._spans = torch.stack([indptr[:-1], indptr[1:]], dim=1)[index]

    @property
    def given(self) -> bool:
        """Whether there is a support."""
        return self._spans is not None

    def __call__(self, rows: slice) -> dict[str, Tensor]:
        """Keyword arguments for the chunk `rows`; none without a support."""
        if self._spans is None or self._ids is None:
            return {}
        return {"spans": self._spans[rows], "ids": self._ids}
