"""The row primitives that a backend supplies, over raw logits z[n, V], against the memory's speed.

`logits_stats` reads z once (nV elements) for log-prob, entropy and lse; `logits_grad_` reads and
writes it once in place. The limit of both is a device copy that moves as many bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPS = ("logits_stats", "logits_grad")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowCase:
    """n rows of V logits."""

    op: str
    tokens: int
    vocab: int
    dtype: str = "bfloat16"
    device: str = "cuda"
    kept_share: float = 1.0

    @property
    def shape(self) -> list[int]:
        return [self.tokens, self.vocab]

    @property
    def bytes(self) -> int:
        """Moved at least: nV elements read, and for the gradient written as well."""
        size = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        return self.tokens * self.vocab * size * (2 if self.op == "logits_grad" else 1)


@dataclasses.dataclass
class RowInputs:
    """z[n, V] and the untouched `original`; target int64 [n]; inv (1 / temperature), c, h, lse,
    entropy fp32 [n]."""

    z: Tensor
    original: Tensor
    target: Tensor
    inv: Tensor
    c: Tensor
    h: Tensor
    lse: Tensor
    entropy: Tensor
    case: RowCase

    def clear(self) -> None:
        """The in-place gradient has overwritten z."""
        if self.case.op == "logits_grad":
            self.z.copy_(self.original)


@dataclasses.dataclass(frozen=True)
class RowOutput:
    logprob: Tensor | None = None
    entropy: Tensor | None = None
    grad: Tensor | None = None


def draw(case: RowCase, seed: int) -> RowInputs:
    rng = torch.Generator(device=case.device).manual_seed(seed)
    n = case.tokens

    def normal() -> Tensor:
        return torch.randn(n, generator=rng, device=case.device)

    z = torch.randn(n, case.vocab, generator=rng, device=case.device).to(getattr(torch, case.dtype))
    target = torch.randint(case.vocab, (n,), generator=rng, device=case.device)
    lse, entropy = torch.empty(n, device=case.device), torch.empty(n, device=case.device)
    for rows in torch.arange(n, device=case.device).split(512):
        logp = z[rows].float().log_softmax(-1)
        lse[rows] = z[rows].float().logsumexp(-1)
        entropy[rows] = -(logp.exp() * logp).sum(-1)
    kept = z.clone() if case.op == "logits_grad" else z
    return RowInputs(
        z, kept, target, torch.ones_like(lse), normal(), 0.1 * normal(), lse, entropy, case
    )


def reference(inputs: RowInputs, rows: int = 512) -> RowOutput:
    """The formulas in float64, `rows` at a time; the gradient rounded to z's dtype."""
    i, logprob, entropy, grads = inputs, [], [], []
    for part in torch.arange(i.case.tokens, device=i.z.device).split(rows):
        logp = i.z[part].double().log_softmax(-1)
        p, y = logp.exp(), i.target[part, None]
        h_row = -(p * logp).sum(-1, keepdim=True)
        if i.case.op == "logits_stats":
            logprob.append(logp.gather(1, y)[:, 0])
            entropy.append(h_row[:, 0])
            continue
        grad = -i.c[part, None].double() * p - i.h[part, None].double() * p * (logp + h_row)
        grads.append(grad.scatter_add(1, y, i.c[part, None].double()).to(i.z.dtype))
    if i.case.op == "logits_stats":
        return RowOutput(torch.cat(logprob), torch.cat(entropy))
    return RowOutput(grad=torch.cat(grads).double())


def make_copy(case: RowCase) -> Callable[[RowInputs], RowOutput]:
    """A copy that moves the op's bytes: half of z for the statistics, all for the gradient."""
    rows = case.tokens if case.op == "logits_grad" else case.tokens // 2
    room = torch.empty(rows, case.vocab, dtype=getattr(torch, case.dtype), device=case.device)

    def call(inputs: RowInputs) -> RowOutput:
        room.copy_(inputs.z[:rows])
        return RowOutput()

    return call


def pyrl_maker(op: str, backend: str) -> Callable[[RowCase], Any]:
    def make(case: RowCase) -> Callable[[RowInputs], RowOutput]:
        from pyrl.ops.backend import load, select

        kernels = load(select(backend, torch.device(case.device)))

        def stats(i: RowInputs) -> RowOutput:
            logprob, entropy, _ = kernels.logits_stats(i.z, i.target, i.inv, 1.0, 0.0)
            return RowOutput(logprob, entropy)

        def grad(i: RowInputs) -> RowOutput:
            kernels.logits_grad_(i.z, i.target, i.inv, 1.0, 0.0, i.lse, i.entropy, i.c, i.h, None)
            return RowOutput(grad=i.z)

        return stats if op == "logits_stats" else grad

    return make
