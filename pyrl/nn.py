"""The losses as modules: a spec and a backend fixed once, the tensors of a step in the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyrl.losses import LossSpec, PolicyLoss, linear_policy_loss, policy_objective
from pyrl.ops.backend import NAMES

__all__ = ["LinearPolicyLoss", "LogitsPolicyLoss", "PolicyObjective"]


class _Loss(nn.Module):
    """A loss without parameters of its own."""

    def __init__(self, spec: LossSpec, *, backend: str | None = None) -> None:
        super().__init__()
        if not isinstance(spec, LossSpec):
            raise ValueError(f"spec: expected a LossSpec, got {type(spec).__name__}")
        if backend is not None and backend not in NAMES:
            raise ValueError(f"backend={backend!r}: expected one of {list(NAMES)}")
        self.spec = spec
        self.backend = backend

    def extra_repr(self) -> str:
        """The spec's fields that differ from the defaults."""
        default = LossSpec().to_dict()
        set_here = {k: v for k, v in self.spec.to_dict().items() if v != default.get(k)}
        parts = [f"{k}={v!r}" for k, v in set_here.items()]
        return ", ".join(parts if self.backend is None else [*parts, f"backend={self.backend!r}"])


class LinearPolicyLoss(_Loss):
    """linear_policy_loss(hidden, weight, target, advantages, spec, ...), spec fixed.

    The head stays the model's: `loss(hidden, model.lm_head.weight, target, advantages)`.
    """

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, advantages: Tensor, **inputs: Any
    ) -> PolicyLoss:
        """hidden [T, D] or [B, L, D], weight [V, D], target and advantages as in
        `linear_policy_loss`, whose keyword arguments `inputs` may hold."""
        return linear_policy_loss(
            hidden, weight, target, advantages, self.spec, backend=self.backend, **inputs
        )


class LogitsPolicyLoss(_Loss):
    """logits_policy_loss(logits, target, advantages, spec, ...), spec fixed."""

    def forward(
        self, logits: Tensor, target: Tensor, advantages: Tensor, **inputs: Any
    ) -> PolicyLoss:
        """logits [T, V] or [B, L, V], target and advantages as in `logits_policy_loss`, whose
        keyword arguments `inputs` may hold."""
        from pyrl import logits_policy_loss

        return logits_policy_loss(
            logits, target, advantages, self.spec, backend=self.backend, **inputs
        )


class PolicyObjective(_Loss):
    """policy_objective(logprob, advantages, spec, ...), spec fixed."""

    def forward(self, logprob: Tensor, advantages: Tensor, **inputs: Any) -> PolicyLoss:
        """logprob [T] or [B, L] and advantages as in `policy_objective`, whose keyword arguments
        `inputs` may hold."""
        return policy_objective(logprob, advantages, self.spec, backend=self.backend, **inputs)
