"""Low-rank adapters over a frozen model: y = W x + (alpha / rank) B A x, through peft.

peft's layers are put into the Hugging Face model itself, so `model` keeps its class, its
`base_model` and its `generate`; only A and B require gradients. Source: arXiv 2106.09685.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pyrl.models.int8 import dequantized, quantize_frozen

ALL_LINEAR = "all-linear"
_NAME = "default"  # peft's name of the only adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """W + (alpha / rank) B A in place of every targeted W, B = 0 at the start; no dropout.

    A and B are in the model's dtype: fp32 ones over a half-precision model would keep an fp32 copy
    of every layer's input for the backward. The optimizer's fp32 masters lose no update.
    """

    rank: int = 16
    """r of A [r, in] and B [out, r]."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Names of linear layers (`q_proj`, or a longer path's end; a string is one name), or all but
    the head."""
    quantize: Literal["none", "int8"] = "none"
    """How the frozen linear layers are stored."""
    seed: int = 0
    """Of A; the global random state is left alone."""

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        if not whole or self.rank < 1:
            raise ValueError(f"lora_rank = {self.rank!r}: expected a whole number >= 1")
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not (number and math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora_alpha = {self.alpha!r}: expected a number > 0")
        given: Any = self.targets
        names = (given,) if isinstance(given, str) else given
        listed = isinstance(names, (list, tuple)) and all(isinstance(t, str) and t for t in names)
        if not listed or not names or (ALL_LINEAR in names and len(names) > 1):
            shown = list(given) if isinstance(given, tuple) else given
            raise ValueError(
                f"lora_targets = {shown!r}: expected names of layers, or {ALL_LINEAR!r}"
            )
        object.__setattr__(self, "targets", tuple(names))  # frozen; a list or one name was given
        if self.quantize not in ("none", "int8"):
            raise ValueError(f"quantize = {self.quantize!r}: expected 'none' or 'int8'")


def attach(model: Any, adapters: Adapters) -> None:
    """Freezes `model`, puts adapters into its linear layers, quantizes the rest as asked.

    ValueError where peft or torchao is absent, a target names no linear layer, or the rank is above
    that of every targeted weight.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            "model.lora_rank > 0 needs peft, which is not installed: pip install 'pyrl[lora]'"
        )
    from peft import LoraConfig, inject_adapter_in_model

    _check_targets(model, adapters.targets, adapters.rank)
    everything = adapters.targets == (ALL_LINEAR,)
    config = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type, unused-ignore]  # peft only divides it
        target_modules=ALL_LINEAR if everything else list(adapters.targets),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),  # GPT-2
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    dtype = model.get_input_embeddings().weight.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(adapters.seed)
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
        if _is_adapter(name):
            parameter.data = parameter.data.to(dtype)
    if adapters.quantize == "int8":
        quantize_frozen(model)


def _check_targets(model: Any, targets: tuple[str, ...], rank: int) -> None:
    head = model.get_output_embeddings()
    linear = {  # name -> greatest rank of its weight, [out, in] or Conv1D's [in, out]
        name: min(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    targeted: dict[str, int] = {}
    for target in targets:
        named = {
            name: least
            for name, least in linear.items()
            if target == ALL_LINEAR or f".{name}".endswith(f".{target}")
        }
        targeted |= named
        if target != ALL_LINEAR and not named:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"model.lora_targets: {target!r} names no linear layer of {type(model).__name__} "
                f"below its head, which stays frozen; it has {', '.join(known)}"
            )
    largest = max(targeted, key=targeted.__getitem__, default=None)
    if largest is not None and rank > targeted[largest]:
        raise ValueError(
            f"model.lora_rank = {rank}: expected at most {targeted[largest]}, the smaller side of "
            f"{largest}, which has the largest of the targeted layers"
        )


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> peft's layer, in the model's order; empty without adapters."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model is its frozen base while it lasts: for forwards without a backward."""
    layers = adapted_layers(model).values()
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every layer, by their names in the model."""
    return {name: p for name, p in model.named_parameters() if _is_adapter(name)}


@contextlib.contextmanager
def swapped_in(model: nn.Module, adapters: Mapping[str, Tensor]) -> Iterator[None]:
    """The adapters are these (`adapter_weights` by name) while it lasts: for forwards without a
    backward. The model's own are put aside, not written to: a graph made before keeps its values.
    """
    swapped: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for name, stand_in in adapters.items():
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            swapped.append((module, key, module._parameters[key]))
            module._parameters[key] = nn.Parameter(stand_in, requires_grad=False)
        yield
    finally:
        for module, key, param in swapped:
            module._parameters[key] = param


@torch.no_grad()
def merged(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """`named` (the model's parameters or state) as the model without adapters would name it:

        W + (alpha / rank) B A, summed in fp32 and rounded once to the wider of the two dtypes,

    int8 weights dequantized, A and B left out. Without adapters: `named` itself.
    """
    layers = adapted_layers(model)
    for name, tensor in named:
        if not layers:
            yield name, tensor
        elif not _is_adapter(name):
            owner, _, leaf = name.rpartition(".base_layer.")
            if owner in layers and leaf == "weight":
                yield f"{owner}.{leaf}", _sum(tensor, layers[owner])
            else:
                yield f"{owner}.{leaf}" if owner in layers else name, dequantized(tensor)


def _sum(weight: Tensor, layer: Any) -> Tensor:
    a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    delta = b.float() @ a.float()
    if layer.fan_in_fan_out:
        delta = delta.T
    total = dequantized(weight, torch.float32).float().add(delta, alpha=layer.scaling[_NAME])
    return total.to(torch.promote_types(weight.dtype, a.dtype))


def save_adapter(model: Any, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as `PeftModel.from_pretrained` reads."""
    folder.mkdir()
    tensors = {
        "base_model.model." + name.replace(f".{_NAME}.", "."): parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if _is_adapter(name)
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    model.peft_config[_NAME].save_pretrained(str(folder))


def _is_adapter(name: str) -> bool:
    return f".lora_A.{_NAME}." in name or f".lora_B.{_NAME}." in name
