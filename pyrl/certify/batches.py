"""Seeded batches of every awkward shape, as the arguments of the losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

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
    """[B, L] with a mask instead of [T] with cu_seqlens."""
    banned: float = 0.0
    """Share of the vocabulary whose logit is -inf (through the bias)."""
    missing: float = 0.0
    """Share of NaN in old, ref and rollout log-probs."""


#: The default and every case that LOSSES lists as a pitfall.
SHAPES = (
    Shape(name="ragged"),
    Shape(name="padded", padded=True),
    Shape(name="all masked", kept=0.0),
    Shape(name="no token", lengths=(0, 0)),
    Shape(name="one token", lengths=(1,), kept=1.0),
    Shape(name="missing log-probs", missing=0.3),
    Shape(name="-inf logits", banned=0.3),
    Shape(name="V = 32001", vocabulary=32001, lengths=(3, 0, 4)),
    Shape(name="V = 151936", vocabulary=151936, lengths=(2, 3), width=8),
    Shape(name="L = 65536", lengths=(65536, 3), vocabulary=11, width=4),
)


def numbers(shape: Shape, seed: int = 0, device: torch.device = DEVICE) -> dict[str, Any]:
    """Arguments of `policy_objective`, its tensors fp32; log-prob and entropy are leaves."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(shape.lengths, dtype=torch.int64)
    if shape.padded:
        size: tuple[int, ...] = (len(lengths), int(lengths.max()))
        inside = torch.arange(size[1]) < lengths[:, None]
    else:
        size = (int(lengths.sum()),)
        inside = torch.ones(size, dtype=torch.bool)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def around(centre: Tensor, spread: float) -> Tensor:
        value = centre + spread * normal(*size)
        return torch.where(torch.rand(size, generator=g) < shape.missing, torch.nan, value)

    logprob = -normal(*size).abs() - 0.5
    old = around(logprob, 0.4)
    fields = {
        "logprob": logprob,
        "entropy": normal(*size).abs(),
        "advantages": normal(len(lengths)),
        "old_logprob": old,
        "ref_logprob": around(logprob, 0.4),
        "rollout_logprob": around(torch.where(old.isnan(), logprob, old), 0.3),
        "weights": normal(*size).abs(),
        "mask": (torch.rand(size, generator=g) < shape.kept) & inside,
    }
    if not shape.padded:
        fields["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return {name: value.to(device) for name, value in fields.items()}


def head(
    shape: Shape, dtype: torch.dtype, seed: int = 0, device: torch.device = DEVICE
) -> dict[str, Tensor]:
    """hidden, weight, bias of `dtype` and target for the token axis of `numbers(shape)`."""
    g = torch.Generator().manual_seed(1000 + seed)
    tokens = len(shape.lengths) * max(shape.lengths) if shape.padded else sum(shape.lengths)
    size = (len(shape.lengths), max(shape.lengths)) if shape.padded else (tokens,)
    hidden = torch.randn(*size, shape.width, generator=g) / shape.width**0.25
    weight = torch.randn(shape.vocabulary, shape.width, generator=g) / shape.width**0.25
    bias = torch.randn(shape.vocabulary, generator=g) / 2
    target = torch.randint(0, shape.vocabulary, size, generator=g)
    banned = torch.rand(shape.vocabulary, generator=g) < shape.banned
    banned[target.flatten()] = False
    bias[banned] = -torch.inf
    return {
        "hidden": hidden.to(dtype).to(device),
        "weight": weight.to(dtype).to(device),
        "bias": bias.to(dtype).to(device),
        "target": target.to(device),
    }
