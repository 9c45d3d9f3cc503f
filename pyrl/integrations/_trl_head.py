"""The language-model head of a TRL model in pyrl: log-probs or a whole loss, never logits."""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from pyrl.ops.linear_logprob import linear_logprob
from pyrl.ops.sharded import full_weight


def add_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    backend: str | None = None,
) -> None:
    """TRL's add_fused_lm_head, with the head in pyrl.

    `model(..., labels=labels, fused_lm_head=True)` returns log_probs and entropy [B, L - 1] of
    labels[:, 1:], 0 where the label is -100; with `policy_loss=f` it returns instead what
    f(hidden [B, L - 1, D], weight, bias, {temperature, softcap, logit_scale}) says. Without
    `fused_lm_head` the forward is the model's own.
    """
    others = set(outputs) - {"log_probs", "entropy"}
    if others:
        raise NotImplementedError(f"patch_grpo: fused head outputs {sorted(others)}")
    plain, config = model.forward, model.config.get_text_config()
    head: dict[str, Any] = {
        "temperature": temperature,
        "softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": _logit_scale(config),
    }

    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, policy_loss: Any = None, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            return plain(*args, **kwargs)
        if kwargs.pop("shift_labels", None) is not None:
            raise NotImplementedError("patch_grpo: shift_labels (context parallelism)")
        labels = kwargs.pop("labels")[:, 1:]
        kwargs["use_cache"] = False
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        states = self.base_model(*args, **kwargs)
        output = self.get_output_embeddings()
        hidden = states.last_hidden_state[:, :-1].to(output.weight.device)
        device = hidden.device.type
        if cast_lm_head_to_fp32:
            hidden = hidden.float()
        elif torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        aux = None
        if kwargs.get("output_router_logits"):
            aux = _router_loss(config, states.router_logits, kwargs.get("attention_mask"))
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(device, enabled=False))
            weight = stack.enter_context(full_weight(output.weight))
            bias = getattr(output, "bias", None)
            if bias is not None:
                bias = stack.enter_context(full_weight(bias))
            if policy_loss is not None:
                out = policy_loss(hidden, weight, bias, head)
                return FusedCausalLMOutput(
                    loss=out.loss, log_probs=out.logprob, entropy=out.entropy, aux_loss=aux
                )
            labels = labels.to(hidden.device)
            known = labels != -100
            target = labels.clamp(min=0)
            out = linear_logprob(
                hidden, weight, target, bias=bias, mask=known, backend=backend, **head
            )
        return FusedCausalLMOutput(
            log_probs=out.logprob, entropy=out.entropy, label_mask=known, aux_loss=aux
        )

    model.forward = types.MethodType(forward, model)


def _logit_scale(config: Any) -> float:
    """The factor of the logits before softcap, under the names that architectures give it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    value = getattr(config, "logits_scaling", None)
    if value is None:
        return 1.0
    return float(value) if config.model_type == "hyperclovax" else 1.0 / value


def _router_loss(config: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss of a mixture of experts, which its families share."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = load_balancing_loss_func(
        router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
    )
    assert isinstance(loss, Tensor)  # 0 stands for no router logits
    return loss
