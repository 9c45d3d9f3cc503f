"""`logits_policy_loss`: logits z[N, V] to the loss of peers.py and d loss / d z.

The limit is a copy of z: NV elements read and NV written are what a forward with an in-place
gradient cannot do without. Implementations that put the gradient in the memory of z are given it;
z is restored, untimed, before every call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from library_peers import kept_target
from peers import CLIP, Rows, clip_loss, draw_labels
from torch import Tensor

#: Rows of z handled at once where a float64 or fp32 copy is made.
ROWS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsCase(Rows):
    """N rows of V logits and the share of them with loss."""

    @property
    def shape(self) -> list[int]:
        return [self.tokens, self.vocab]

    @property
    def bytes(self) -> int:
        """The kept rows read once, and the gradient written once, zeros included."""
        size = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        return (self.tokens + self.kept_tokens) * self.vocab * size


@dataclasses.dataclass
class LogitsInputs:
    """z[N, V] is a leaf, `original` its values; target int64, advantage and old fp32, keep bool."""

    z: Tensor
    original: Tensor
    target: Tensor
    advantage: Tensor
    old: Tensor
    keep: Tensor
    case: LogitsCase

    def clear(self) -> None:
        self.z.grad = None
        with torch.no_grad():
            self.z.copy_(self.original)

    def overwritable(self) -> Tensor:
        """z as the output of an op, whose memory a backward may take."""
        return _Passed.apply(self.z)


class _Passed(torch.autograd.Function):
    """The same tensor, with a gradient that passes through."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@dataclasses.dataclass(frozen=True)
class LogitsOutput:
    loss: Tensor
    grad: Tensor | None


def draw(case: LogitsCase, seed: int) -> LogitsInputs:
    """New inputs: standard normal logits; no ratio is clipped."""
    rng = torch.Generator(device=case.device).manual_seed(seed)
    n, device = case.tokens, case.device
    z = torch.randn(n, case.vocab, generator=rng, device=device).to(case.torch_dtype)
    target, advantage, keep = draw_labels(case, rng)
    logprob = [
        -F.cross_entropy(part.float(), y, reduction="none")
        for part, y in zip(z.split(ROWS), target.split(ROWS), strict=True)
    ]
    noise = torch.randn(n, generator=rng, device=device).clamp(-3, 3)
    old = torch.cat(logprob) + 0.02 * noise
    return LogitsInputs(z.requires_grad_(), z.detach().clone(), target, advantage, old, keep, case)


def reference(inputs: LogitsInputs) -> LogitsOutput:
    """In float64 by autograd, ROWS at a time; the gradient rounded to z's dtype, as it must be."""
    total = torch.zeros((), dtype=torch.float64, device=inputs.z.device)
    grads = []
    for start in range(0, inputs.case.tokens, ROWS):
        part = slice(start, start + ROWS)
        z = inputs.original[part].double().requires_grad_()
        loss = clip_loss(-F.cross_entropy(z, inputs.target[part], reduction="none"), inputs, part)
        loss.backward()
        total += loss.detach()
        grads.append(z.grad.to(inputs.z.dtype))
    return LogitsOutput(total, torch.cat(grads))


def make_copy(case: LogitsCase) -> Callable[[LogitsInputs], LogitsOutput]:
    n, dtype = case.kept_tokens, getattr(torch, case.dtype)
    room = torch.empty(case.tokens, case.vocab, dtype=dtype, device=case.device)

    @torch.no_grad()
    def call(inputs: LogitsInputs) -> LogitsOutput:
        room[:n].copy_(inputs.z[:n])
        room[n:].zero_()
        return LogitsOutput(room[0, 0], None)

    return call


def maker(
    prepare: Callable[[], Callable[[LogitsInputs], Tensor]],
) -> Callable[[LogitsCase], Callable[[LogitsInputs], LogitsOutput]]:
    """make(case) from what gives the log-probs [N] of the inputs."""

    def make(case: LogitsCase) -> Callable[[LogitsInputs], LogitsOutput]:
        logprob = prepare()

        def call(inputs: LogitsInputs) -> LogitsOutput:
            loss = clip_loss(logprob(inputs).float(), inputs)
            loss.backward()
            return LogitsOutput(loss.detach(), inputs.z.grad)

        return call

    return make


def _naive(z: Tensor, inputs: LogitsInputs) -> Tensor:
    return clip_loss(-F.cross_entropy(z.float(), inputs.target, reduction="none"), inputs)


def make_naive(case: LogitsCase) -> Callable[[LogitsInputs], LogitsOutput]:
    return _whole(_naive)


def make_compiled(case: LogitsCase) -> Callable[[LogitsInputs], LogitsOutput]:
    return _whole(torch.compile(_naive, fullgraph=True, dynamic=False))


def _whole(function: Callable[[Tensor, LogitsInputs], Tensor]) -> Callable[..., LogitsOutput]:
    def call(inputs: LogitsInputs) -> LogitsOutput:
        loss = function(inputs.z, inputs)
        loss.backward()
        return LogitsOutput(loss.detach(), inputs.z.grad)

    return call


def prepare_trl() -> Callable[[LogitsInputs], Tensor]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return lambda i: selective_log_softmax_and_entropy(
        i.z, i.target, entropy_requires_grad=False, row_mask=i.keep
    )[0]


def prepare_quack() -> Callable[[LogitsInputs], Tensor]:
    from quack.cross_entropy import cross_entropy

    return lambda i: (
        -cross_entropy(i.overwritable(), kept_target(i), reduction="none", inplace_backward=True)
    )


def pyrl_maker(
    op: str, backend: str, inplace: bool = False
) -> Callable[[LogitsCase], Callable[[LogitsInputs], LogitsOutput]]:
    def make(case: LogitsCase) -> Callable[[LogitsInputs], LogitsOutput]:
        import pyrl

        spec = pyrl.LossSpec(
            objective="clip", clip_low=CLIP, clip_high=CLIP, aggregation="token_mean"
        )

        def call(inputs: LogitsInputs) -> LogitsOutput:
            out = pyrl.logits_policy_loss(
                inputs.overwritable() if inplace else inputs.z, inputs.target, inputs.advantage,
                spec, old_logprob=inputs.old, mask=inputs.keep, inplace_backward=inplace,
                backend=backend,
            )  # fmt: skip
            out.loss.backward()
            return LogitsOutput(out.loss.detach(), inputs.z.grad)

        return call

    return make
