"""A frozen linear layer in 8 bits: y = x @ (s q).T + bias, q int8 and one scale a row."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _FrozenLinear(torch.autograd.Function):
    """F.linear(x, weight, bias) and dx = (dy s) @ q for a weight of torchao's, which is kept as it
    is: under autograd torchao's own linear saves q cast to x's dtype, more than was gained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        scale, q = ctx.weight.scale.flatten(), ctx.weight.qdata
        return (dy * scale.to(dy.dtype)) @ q.to(dy.dtype), None, None


class Int8Linear(nn.Linear):
    """An `nn.Linear` whose frozen weight is torchao's Int8Tensor; the input gets its gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        return _FrozenLinear.apply(x, self.weight, self.bias)


def quantize_frozen(model: Any) -> None:
    """Every frozen `nn.Linear` of `model` but its head becomes an `Int8Linear`, in place.

    Symmetric, round to nearest, a scale for each output row. Embeddings, norms and what is no
    `nn.Linear` (the experts of a mixture) stay as they are. ValueError where torchao is absent or
    there is no such layer.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(
            "model.quantize = 'int8' needs torchao, which is not installed: "
            "pip install 'pyrl[lora]'"
        )
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    }
    if not found:
        raise ValueError(
            f"model.quantize = 'int8': {type(model).__name__} has no frozen nn.Linear beside its "
            "head"
        )
    for name, module in found.items():
        quantize_(module, Int8WeightOnlyConfig())
        model.set_submodule(name, Int8Linear(module))


def dequantized(weight: Any, dtype: torch.dtype | None = None) -> Tensor:
    """s q in `dtype` (default: what it computes in); any other tensor is returned as it is."""
    return weight.dequantize(dtype) if hasattr(weight, "qdata") else weight
