"""Reference policies that can be reset: afterwards the KL to them is exactly 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pyrl.models.lora import adapter_weights
from pyrl.models.policy import Policy, Snapshot


class Reference(Protocol):
    """A policy that stands still until it is reset."""

    @property
    def policy(self) -> Policy:
        """What log-probs are computed with, the same object for good."""

    def reset(self, policy: Policy) -> None:
        """self.policy <- policy, bit for bit."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, small before the first reset; references, not copies."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bit-exact restoration, into a reference as it was made. ValueError names a tensor that
        is not the model's."""


class FrozenCopy:
    """A policy of its own, loaded like the trained one; takes it over and freezes it."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        policy.model.requires_grad_(False)
        self._moved = False

    def reset(self, policy: Policy) -> None:
        """Copies all parameters. ValueError for a policy of other names, shapes or dtypes."""
        self._copy(dict(policy.model.named_parameters()))

    def state_dict(self) -> dict[str, Any]:
        """{"weights": every parameter by name, or None before the first reset}."""
        named = self.policy.model.named_parameters()
        return {"weights": {name: p.detach() for name, p in named} if self._moved else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Reference`. ValueError too where there is no way back to the weights as loaded."""
        if state["weights"] is not None:
            self._copy(state["weights"])
        elif self._moved:
            raise ValueError("the reference has been reset: its initial weights are gone")

    @torch.no_grad()
    def _copy(self, weights: Mapping[str, Tensor]) -> None:
        own = dict(self.policy.model.named_parameters())
        _check(own, weights)
        for name, parameter in own.items():
            parameter.copy_(weights[name])
        self._moved = True


class AdapterSnapshot:
    """The adapters of a LoRA policy as they once were, over the policy's own frozen model.

    It starts with the adapters off: the initial weights. ValueError for a policy without adapters.
    """

    def __init__(self, policy: Policy) -> None:
        with policy.without_adapters():
            self.policy = Snapshot(policy.model, policy.tokenizer)

    def reset(self, policy: Policy) -> None:
        """Copies the adapters. ValueError for a policy over another model."""
        if policy.model is not self.policy.model:
            raise ValueError("reset: this is the reference of another model's adapters")
        self.policy.refresh()

    def state_dict(self) -> dict[str, Any]:
        """{"weights": every adapter weight by name, or None: the adapters are off}."""
        return {"weights": self.policy.adapters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Reference`."""
        weights = state["weights"]
        if weights is not None:
            own = adapter_weights(self.policy.model)
            _check(own, weights)
            # onto the device of the model; a copy, or the state's owner could change them
            weights = {name: weights[name].to(p.device, copy=True) for name, p in own.items()}
        self.policy.adapters = weights


def _check(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """ValueError unless both have the same names, shapes and dtypes."""
    for name in sorted(own.keys() ^ given.keys()):
        owner = "the reference" if name in own else "what it is set to"
        raise ValueError(f"only {owner} has the parameter {name!r}")
    for name, mine in own.items():
        other = given[name]
        if other.shape != mine.shape or other.dtype != mine.dtype:
            raise ValueError(
                f"{name}: {other.dtype} {list(other.shape)} for the reference's {mine.dtype} "
                f"{list(mine.shape)}"
            )
