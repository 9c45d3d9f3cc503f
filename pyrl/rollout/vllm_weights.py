"""Which weights vLLM must be given: every name of the model's, tied ones too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .protocol import RolloutError


def weight_names(model_path: str) -> tuple[set[str], dict[str, str]]:
    """The model's parameters, and {name that shares: name it shares with} such as
    lm_head.weight: model.embed_tokens.weight.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path))
    return {name for name, _ in model.named_parameters()}, dict(model.all_tied_weights_keys)


def complete(
    weights: Iterable[tuple[str, Tensor]], names: set[str], tied: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """`weights`, and every tied name that they leave out, as `named_parameters()` does.

    vLLM's CPU head keeps a packed copy of its weight: a reload that does not name the head leaves
    it stale, tied or not. Raises RolloutError at the end when any other name did not come.
    """
    missing, absent = dict(tied), set(names)
    shared: dict[str, Tensor] = {}
    for name, tensor in weights:
        missing.pop(name, None)
        absent.discard(name)
        if name in tied.values():
            shared[name] = tensor.detach()
        yield name, tensor.detach()
    for name, source in missing.items():
        if source in shared:
            absent.discard(name)
            yield name, shared[source]
    if absent:
        raise RolloutError(
            f"sync: {len(absent)} of {len(names)} weights did not come and would be stale, "
            f"the first is {min(absent)!r}"
        )
