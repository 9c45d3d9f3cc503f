"""A low-rank head without merging, and the head of a peft model read as plain tensors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyrl.ops.shapes import check_shape
from pyrl.ops.sharded import check_whole


@dataclasses.dataclass(frozen=True, eq=False)
class LoRA:
    """weight + scale * b @ a, never formed: z = hidden @ weight.T + scale * (hidden @ a.T) @ b.T.

    The products run in hidden's dtype; a and b may be kept in another one (fp32 adapters over a
    bf16 model) and get their gradients in it, from fp32 accumulation. Source: arXiv 2106.09685.
    """

    a: Tensor
    """[r, D]."""
    b: Tensor
    """[V, r]."""
    scale: float = 1.0
    """alpha / r, or alpha / sqrt(r)."""

    def check(self, weight: Tensor) -> None:
        """ValueError unless a [r, D] and b [V, r] fit weight [V, D]."""
        for name, value in (("lora.a", self.a), ("lora.b", self.b)):
            check_whole(name, value)
            if value.dim() != 2 or not value.is_floating_point():
                raise ValueError(
                    f"{name}: expected a matrix of floats, got {value.dtype} {tuple(value.shape)}"
                )
        if not math.isfinite(self.scale):
            raise ValueError(f"lora.scale={self.scale}: expected a finite number")
        rank = self.a.shape[0]
        check_shape("lora.a", self.a, (rank, weight.shape[1]), weight.device)
        check_shape("lora.b", self.b, (weight.shape[0], rank), weight.device)

    def merged(self, weight: Tensor) -> Tensor:
        """float64 weight + scale * b @ a [V, D], for the oracle."""
        return weight.double() + self.scale * self.b.double() @ self.a.double()


class LinearHead(NamedTuple):
    """The tensors of an output head, as `linear_logprob` and `linear_policy_loss` take them."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]."""
    lora: LoRA | None


def linear_head(module: nn.Module) -> LinearHead:
    """weight, bias and active adapters of an `nn.Linear`-like head, wrapped by peft or not.

    A peft LoRA layer gives its base weight and a `LoRA` of the active adapters, several of them
    joined along the rank; disabled or merged adapters give none. A module that peft trains whole
    (`modules_to_save`) gives its active copy. peft need not be installed.

    NotImplementedError for what is not of the form weight + scale * b @ a: a LoRA variant (DoRA,
    aLoRA), an adapter bias, active dropout (the sampler has none, so no ratio would be 1), a
    quantised base layer.
    """
    layer: Any = module  # peft's attributes are not of nn.Module
    copies = getattr(layer, "modules_to_save", None)
    if copies is not None:
        used = [] if layer.disable_adapters else [n for n in _adapters(layer) if n in copies]
        layer = copies[used[0]] if used else layer.original_module
    base = getattr(layer, "base_layer", layer)
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise NotImplementedError(
            f"linear_head: {type(base).__name__} has no floating weight; keep the head unquantised"
        )
    if base is layer or layer.disable_adapters or layer.merged:
        return LinearHead(weight, bias, None)
    names = [name for name in _adapters(layer) if name in layer.lora_A]
    loras = [_adapter(layer, name) for name in names]
    if len(loras) < 2:
        return LinearHead(weight, bias, loras[0] if loras else None)
    a = torch.cat([lora.scale * lora.a for lora in loras])
    return LinearHead(weight, bias, LoRA(a, torch.cat([lora.b for lora in loras], dim=1)))


def _adapters(module: Any) -> list[str]:
    active = module.active_adapter  # a name or a list of them, by peft's version
    return [active] if isinstance(active, str) else list(active)


def _adapter(module: Any, name: str) -> LoRA:
    variants = {**getattr(module, "use_dora", {}), **getattr(module, "lora_variant", {})}
    if variants.get(name):
        raise NotImplementedError(f"linear_head: adapter {name!r} is a LoRA variant (DoRA, aLoRA)")
    if getattr(module.lora_B[name], "bias", None) is not None:
        raise NotImplementedError(f"linear_head: adapter {name!r} has a bias (lora_bias)")
    dropout = module.lora_dropout[name]
    if getattr(dropout, "p", 0.0) and dropout.training:
        raise NotImplementedError(
            f"linear_head: adapter {name!r} has lora_dropout={dropout.p} in training mode: the "
            "sampler has no dropout, so no ratio would be 1; set it to 0 for the head"
        )
    return LoRA(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
