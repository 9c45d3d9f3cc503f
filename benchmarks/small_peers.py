"""The [T]-sized ops by every implementation they are compared with.

`policy_objective`: forward and backward of the clip loss on [T] vectors, given per-token log-probs.
`group_advantage`: (r - mean) / (std + 1e-6) inside each group, unbiased std.
The limit of both is one copy of their inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CLIP = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallCase:
    """T tokens (or n samples in groups of `group`), fp32."""

    op: str
    tokens: int
    kept_share: float = 1.0
    group: int = 8
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def groups(self) -> int:
        return -(-self.tokens // self.group)

    @property
    def shape(self) -> list[int]:
        return [self.tokens]

    @property
    def bytes(self) -> int:
        """Bytes of the inputs: three fp32 vectors and a mask, or rewards and int64 group ids."""
        return self.tokens * (13 if self.op == "policy_objective" else 12)


@dataclasses.dataclass
class SmallInputs:
    """policy_objective reads logprob (a leaf), old, advantage [T] fp32 and keep [T] bool;
    group_advantage reads advantage as rewards and group [T] int64 ids, in shuffled order."""

    logprob: Tensor
    old: Tensor
    advantage: Tensor
    keep: Tensor
    group: Tensor
    case: SmallCase

    def clear(self) -> None:
        self.logprob.grad = None


@dataclasses.dataclass(frozen=True)
class SmallOutput:
    """loss and d loss / d logprob, or the advantages alone."""

    loss: Tensor | None
    values: Tensor | None


def draw(case: SmallCase, seed: int) -> SmallInputs:
    """New inputs; about a third of the ratios fall outside the clip bounds."""
    rng = torch.Generator(device=case.device).manual_seed(seed)
    t, device = case.tokens, case.device

    def normal() -> Tensor:
        return torch.randn(t, generator=rng, device=device)

    old = -normal().abs()
    keep = torch.rand(t, generator=rng, device=device) < case.kept_share
    keep[0] = True
    order = torch.randperm(t, generator=rng, device=device)
    return SmallInputs(
        (old + 0.2 * normal()).requires_grad_(), old, normal(), keep, order // case.group, case
    )


def reference(inputs: SmallInputs) -> SmallOutput:
    """The naive form in float64."""
    if inputs.case.op == "group_advantage":
        return SmallOutput(
            None, _advantages(inputs.advantage.double(), inputs.group, inputs.case.groups)
        )
    logprob = inputs.logprob.detach().double().requires_grad_()
    loss = _objective(logprob, inputs.old.double(), inputs.advantage.double(), inputs.keep)
    loss.backward()
    return SmallOutput(loss.detach(), logprob.grad)


def _objective(logprob: Tensor, old: Tensor, advantage: Tensor, keep: Tensor) -> Tensor:
    ratio = (logprob - old).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return torch.where(keep, loss, 0.0).sum() / keep.sum()


def _advantages(rewards: Tensor, group: Tensor, groups: int) -> Tensor:
    zero = rewards.new_zeros(groups)
    size = zero.index_add(0, group, torch.ones_like(rewards))
    mean = zero.index_add(0, group, rewards) / size
    apart = rewards - mean[group]
    variance = zero.index_add(0, group, apart * apart) / (size - 1).clamp(min=1)
    std = torch.where(size > 1, variance.sqrt(), 1.0)
    return torch.where(size[group] > 1, apart, rewards) / (std[group] + 1e-6)


def make_copy(case: SmallCase) -> Callable[[SmallInputs], SmallOutput]:
    t, device = case.tokens, case.device
    room = [torch.empty(t, device=device) for _ in range(3)]
    mask = torch.empty(t, dtype=torch.bool, device=device)
    ids = torch.empty(t, dtype=torch.int64, device=device)

    @torch.no_grad()
    def call(inputs: SmallInputs) -> SmallOutput:
        room[0].copy_(inputs.advantage)
        if case.op == "policy_objective":
            room[1].copy_(inputs.logprob)
            room[2].copy_(inputs.old)
            mask.copy_(inputs.keep)
        else:
            ids.copy_(inputs.group)
        return SmallOutput(None, None)

    return call


def _make(op: str, wrap: Callable[[Any], Any]) -> Callable[[SmallCase], Any]:
    def make(case: SmallCase) -> Callable[[SmallInputs], SmallOutput]:
        if op == "group_advantage":
            advantages = wrap(_advantages)
            return lambda i: SmallOutput(None, advantages(i.advantage, i.group, case.groups))
        objective = wrap(_objective)

        def call(inputs: SmallInputs) -> SmallOutput:
            loss = objective(inputs.logprob, inputs.old, inputs.advantage, inputs.keep)
            loss.backward()
            return SmallOutput(loss.detach(), inputs.logprob.grad)

        return call

    return make


def make_naive(op: str) -> Callable[[SmallCase], Any]:
    return _make(op, lambda f: f)


def make_compiled(op: str) -> Callable[[SmallCase], Any]:
    return _make(op, lambda f: torch.compile(f, dynamic=False))


def pyrl_maker(op: str, backend: str) -> Callable[[SmallCase], Any]:
    def make(case: SmallCase) -> Callable[[SmallInputs], SmallOutput]:
        import pyrl

        if op == "group_advantage":

            def advantages(inputs: SmallInputs) -> SmallOutput:
                out = pyrl.group_advantage(inputs.advantage, inputs.group, backend=backend)
                return SmallOutput(None, out.advantages)

            return advantages

        spec = pyrl.LossSpec(
            objective="clip", clip_low=CLIP, clip_high=CLIP, aggregation="token_mean"
        )

        def objective(inputs: SmallInputs) -> SmallOutput:
            out = pyrl.policy_objective(
                inputs.logprob, inputs.advantage, spec,
                old_logprob=inputs.old, mask=inputs.keep, backend=backend,
            )  # fmt: skip
            out.loss.backward()
            return SmallOutput(out.loss.detach(), inputs.logprob.grad)

        return objective

    return make
