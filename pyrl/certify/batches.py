"""Seeded batches of every awkward shape, as the arguments of the losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pyrl.ops.support import Support
from pyrl.parity import DEVICE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A batch's geometry; its name goes into the certificate."""

    name: str
    lengths: tuple[int, ...] = (7, 0, 1, 12, 5)
    """Completions: an empty one and a single token are the awkward ones."""
    kept: float = 0.7
    """Share of tokens that carry loss; 0: all masked."""
    vocabulary: int = 211
    """Odd, so that no tile divides it."""
    width: int = 16
    padded: bool = False
    """[B, L] with a mask and NaN behind it instead of [T] with cu_seqlens; the truth is packed."""
    banned: float = 0.0
    """Share of the vocabulary whose logit is -inf (through the bias)."""
    missing: float = 0.0
    """Share of NaN in old, ref and rollout log-probs."""
    support: int = 0
    """Largest sampling support of a token, the smallest is 1; 0: no support."""
    compiled: bool = False
    """Too many rows for an interpreter."""

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)


RAGGED = Shape(name="ragged, one completion empty")
#: Everything that the objective's fields can hold.
MISSING = Shape(name="30% missing log-probs", missing=0.3)
PADDED = Shape(name="padded = packed", padded=True)

#: The default and every case that the losses' pitfalls name.
SHAPES = (
    RAGGED,
    PADDED,
    MISSING,
    Shape(name="all masked", kept=0.0),
    Shape(name="all masked, padded", kept=0.0, padded=True),
    Shape(name="no token", lengths=(0, 0)),
    Shape(name="one token", lengths=(1,), kept=1.0),
    Shape(name="-inf logits", banned=0.3),
    Shape(name="V = 32001", vocabulary=32001, lengths=(3, 0, 4)),
    Shape(name="V = 151936", vocabulary=151936, lengths=(2, 3), width=8),
    Shape(name="L = 65536", lengths=(65536, 3), vocabulary=11, width=4, compiled=True),
    Shape(name="L = 65536, 0.2% kept", lengths=(65536, 3), vocabulary=11, width=4, kept=0.002),
)
SUPPORTS = (
    Shape(name="1 to 40 of 211", support=40),
    Shape(name="1 to 40 of 211, padded = packed", support=40, padded=True),
    Shape(name="1 or 2 of 211", support=2),
    Shape(name="the whole vocabulary", support=211),
    Shape(name="1 to 900 of 32001", support=900, vocabulary=32001, lengths=(3, 0, 4)),
)


def numbers(shape: Shape, seed: int = 0, device: torch.device = DEVICE) -> dict[str, Tensor]:
    """Arguments of `policy_objective`, packed, floats fp32; advantages are per sequence."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(shape.lengths, dtype=torch.int64)
    size = shape.tokens

    def normal(size: int = size) -> Tensor:
        return torch.randn(size, generator=g)

    def around(centre: Tensor, spread: float) -> Tensor:
        value = centre + spread * normal()
        return torch.where(torch.rand(size, generator=g) < shape.missing, torch.nan, value)

    logprob = -normal().abs() - 0.5
    old = around(logprob, 0.4)
    fields = {
        "logprob": logprob,
        "entropy": normal().abs(),
        "advantages": normal(len(lengths)),
        "old_logprob": old,
        "ref_logprob": around(logprob, 0.4),
        "rollout_logprob": around(torch.where(old.isnan(), logprob, old), 0.3),
        "weights": normal().abs(),
        "mask": torch.rand(size, generator=g) < shape.kept,
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
    }
    return {name: value.to(device) for name, value in fields.items()}


def head(
    shape: Shape, dtype: torch.dtype, seed: int = 0, device: torch.device = DEVICE
) -> dict[str, Tensor]:
    """hidden, weight, bias of `dtype` and target for the token axis of `numbers(shape)`."""
    g = torch.Generator().manual_seed(1000 + seed)
    hidden = torch.randn(shape.tokens, shape.width, generator=g) / shape.width**0.25
    weight = torch.randn(shape.vocabulary, shape.width, generator=g) / shape.width**0.25
    bias = torch.randn(shape.vocabulary, generator=g) / 2
    target = torch.randint(0, shape.vocabulary, (shape.tokens,), generator=g)
    banned = torch.rand(shape.vocabulary, generator=g) < shape.banned
    banned[target] = False
    bias[banned] = -torch.inf
    return {
        "hidden": hidden.to(dtype).to(device),
        "weight": weight.to(dtype).to(device),
        "bias": bias.to(dtype).to(device),
        "target": target.to(device),
    }


def support_masks(shape: Shape, target: Tensor) -> Tensor | None:
    """bool [T, V]: the sampling support of each token, its target within; None without one."""
    if not shape.support:
        return None
    g = torch.Generator().manual_seed(7)
    scores = torch.rand(shape.tokens, shape.vocabulary, generator=g)
    scores[torch.arange(shape.tokens), target.cpu()] = 2.0
    size = torch.randint(1, shape.support + 1, (shape.tokens, 1), generator=g)
    if shape.support == shape.vocabulary:
        size[:] = shape.vocabulary
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank < size).to(target.device)


def support_of(shape: Shape, masks: Tensor) -> Support:
    """The support in the layout of the shape; padding has an empty one."""
    return Support.from_masks(pad(masks, shape, False) if shape.padded else masks)


def pad(value: Tensor, shape: Shape, fill: float) -> Tensor:
    """[T, ...] → [B, L, ...] with `fill` behind each sequence; differentiable in value."""
    b, length = len(shape.lengths), max(shape.lengths)
    out = value.new_full((b, length, *value.shape[1:]), fill)
    inside = torch.arange(length) < torch.tensor(shape.lengths)[:, None]
    return out.index_put((inside.to(value.device),), value)


def laid_out(values: dict[str, Tensor], shape: Shape) -> dict[str, Any]:
    """Packed arguments in the layout of the shape: padding holds NaN, and -100 as the target."""
    if not shape.padded:
        return dict(values)
    per_sequence = ("advantages", "cu_seqlens", "weight", "bias")
    out = {}
    for name, value in values.items():
        if name not in per_sequence:
            fill = torch.nan if value.is_floating_point() else -100.0 if name == "target" else 0.0
            value = pad(value, shape, fill)
        if name != "cu_seqlens":
            out[name] = value
    return out
