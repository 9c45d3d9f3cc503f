"""`linear_policy_loss`: both waists in one pass over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrl.ops.backend import once_differentiable, select
from pyrl.ops.head import Head, Needs, fake_gradients
from pyrl.ops.head_pass import HeadRows, Wanted, head_pass
from pyrl.ops.linear_logprob import (
    check_head,
    check_targets,
    chunk_bytes,
    chunk_rows,
    inv_temperature,
    kept_rows,
    linear_logprob,
    lora_parts,
    token_ids,
)
from pyrl.ops.lora import LoRA
from pyrl.ops.policy_objective import (
    FORMULA_BACKENDS,
    Fields,
    PolicyLoss,
    canonical_tokens,
    closed_form,
    collect,
    named_metrics,
    policy_objective,
)
from pyrl.ops.shapes import layout
from pyrl.ops.spec import METRICS, LossSpec
from pyrl.ops.support import (
    Support,
    SupportRows,
    check_support,
    support_fields,
    support_hashes,
)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantages: Tensor,
    spec: LossSpec,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    support: Support | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """policy_objective(linear_logprob(hidden, weight, target), advantages, spec), fused.

    A token's gradient needs only its own log-prob and entropy, so each chunk of rows runs GEMM →
    row statistics → objective → gradient in place → gradient GEMMs while its logits are at hand:
    6 N D V flops forward and backward, `[rows, V]` at most, and `backward` only scales. Where the
    spec couples the tokens of a sequence (`LossSpec.couples_tokens`), and on the backends that
    differentiate the formula itself (torch, reference), the two functions are composed instead, at
    8 N D V: the backward forms the logits again.

    hidden [T, D] or [B, L, D] · weight [V, D] · bias [V] · everything else as in `policy_objective`
    and `linear_logprob`; softcap, logit_scale and temperature come from `spec`, `temperature`
    (scalar, or shaped like target) overrides the last. Instead of `ref_logprob`, the reference's
    `ref_hidden` may be given, with `ref_weight` and `ref_bias` where its head is not `weight` and
    `bias`; the reference has no `lora`, and with a `support` its softmax runs over that too.
    Returns loss, metrics, and the detached logprob and entropy shaped like target.

    ValueError and NotImplementedError as in the two functions it composes.
    """
    if not isinstance(spec, LossSpec):
        raise ValueError(f"spec: expected a LossSpec, got {type(spec).__name__}")
    where = layout(target, mask, cu_seqlens)
    vocab = check_head(hidden, weight, target, bias, lora, vocab_size)
    temperature = spec.temperature if temperature is None else temperature
    name = select(backend, hidden.device)
    head: dict[str, Any] = {
        "vocab_size": vocab_size,
        "temperature": temperature,
        "softcap": spec.softcap,
        "logit_scale": spec.logit_scale,
        "mask": mask,
        "support": support,
        "backend": name,
    }
    if ref_hidden is not None:
        if ref_logprob is not None:
            raise ValueError("ref_hidden and ref_logprob are two sources of one thing: give one")
        with torch.no_grad():
            frozen = weight if ref_weight is None else ref_weight
            offset = bias if ref_bias is None else ref_bias
            ref_logprob = linear_logprob(ref_hidden, frozen, target, bias=offset, **head).logprob
    elif ref_weight is not None or ref_bias is not None:
        raise ValueError("ref_weight and ref_bias need ref_hidden")
    inputs: dict[str, Any] = {
        "old_logprob": old_logprob,
        "ref_logprob": ref_logprob,
        "rollout_logprob": rollout_logprob,
        "weights": weights,
        "denominator": denominator,
    }
    if name in FORMULA_BACKENDS or spec.couples_tokens:
        out = linear_logprob(hidden, weight, target, bias=bias, lora=lora, **head)
        composed = policy_objective(
            out.logprob,
            advantages,
            spec,
            entropy=out.entropy,
            mask=mask,
            cu_seqlens=cu_seqlens,
            backend=name,
            **inputs,
        )
        return composed._replace(logprob=out.logprob.detach(), entropy=out.entropy.detach())
    fields = collect(where, spec, advantages, **inputs)
    leaves = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, *lora_parts(lora)[:2])
    training = torch.is_grad_enabled()
    loss, logprob, entropy, metrics, *_ = _linear_policy_loss(
        *leaves,
        token_ids(target),
        inv_temperature(temperature, target),
        *support_fields(support, target),
        *fields,
        spec.to_json(),
        1.0 if lora is None else float(lora.scale),
        vocab,
        name,
        [training and v is not None and v.requires_grad for v in leaves],
    )
    return PolicyLoss(
        loss,
        named_metrics(metrics.detach(), where),
        logprob.detach().reshape(target.shape),
        entropy.detach().reshape(target.shape),
    )


@torch.library.custom_op("pyrl::linear_policy_loss", mutates_args=())
def _linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    inv_temperature: Tensor,
    indptr: Tensor | None,
    ids: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    advantage: Tensor,
    token_weight: Tensor,
    keep: Tensor,
    bounds: Tensor | None,
    spec: str,
    lora_scale: float,
    vocab: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logprob [T], entropy [T], metrics, s, and s times dloss/d(hidden, weight, bias, a, b).

    `needs` as in `HeadGradients`.
    """
    check_targets(target, keep, vocab)
    check_support(indptr, ids, target, keep, vocab)
    loss_spec = LossSpec.from_json(spec)
    kernels = closed_form(backend, loss_spec)
    params, scale, cap = loss_spec.params(), loss_spec.logit_scale, loss_spec.softcap or 0.0
    held = (target, inv_temperature, old, ref, rollout, advantage, token_weight)
    x, index = kept_rows(hidden, keep, *held, support_hashes(indptr, ids))
    head = Head.of(weight, bias, lora_a, lora_b, lora_scale, x.dtype, vocab)
    support = SupportRows(indptr, ids, index)
    head_rows = HeadRows(x, index, target[index], inv_temperature[index], scale, cap, support)
    wanted = Wanted((hidden, weight, bias, lora_a, lora_b), Needs(*needs))
    chunks = head_pass(
        kernels, head, head_rows, wanted, chunk_rows(x, vocab), chunk_bytes(x.device)
    )
    fields = Fields(old, ref, rollout, advantage, token_weight, keep, bounds)
    fields_x = fields.rows(index)
    scale_up = gradient_scale(token_weight, x.dtype)
    fields_x = fields_x._replace(weight=fields_x.weight * scale_up)
    logprob, entropy = (
        torch.zeros(target.shape, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    for rows in chunks.chunks():
        where = head_rows.at(rows)
        logp_x, ent_x, lse_x = chunks.stats(rows)
        logprob[where], entropy[where] = logp_x, ent_x
        if any(needs):
            part = fields_x.rows(rows)
            _, c, h, _ = kernels.objective_terms(logp_x, ent_x, *part, params)
            chunks.add(rows, lse_x, ent_x, c, h, None)
    # The loss and its metrics in one reduction over all tokens, whatever the chunks were.
    logp, ent, fields = canonical_tokens(logprob, entropy, fields)
    loss, _, _, metrics = kernels.objective_terms(logp, ent, *fields, params)
    return loss, logprob, entropy, metrics, scale_up, *chunks.result(lora_scale)


def gradient_scale(token_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 0-d: a power of two that brings the largest token weight near 1 for f16, else 1.

    The gradients are formed before the caller's loss scale is known: at a denominator of 1e6 tokens
    f16 would lose them to underflow. In exchange one beyond 65504 times the largest weight, as k3
    makes of a token 11 nats below its reference, is inf: a loss scaler leaves such a step out.
    """
    if dtype != torch.float16 or token_weight.numel() == 0:
        return token_weight.new_ones(())
    largest = token_weight.abs().amax().clamp(min=2.0**-100)
    return torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent)


@_linear_policy_loss.register_fake
def _(hidden, weight, bias, lora_a, lora_b, target, *rest):
    vector = hidden.new_empty(target.shape, dtype=torch.float32)
    metrics = hidden.new_empty(len(METRICS), dtype=torch.float64)
    gradients = fake_gradients(hidden, weight, bias, lora_a, lora_b, Needs(*rest[-1]))
    zero_dim = vector.new_empty(())
    scale = torch.empty_like(zero_dim)
    return zero_dim, vector, torch.empty_like(vector), metrics, scale, *gradients


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    # Detached, or the graph would hold itself; not save_for_backward, whose reference would make
    # autograd copy dweight instead of taking it over.
    ctx.gradients = [v.detach() for v in output[5:]]
    ctx.scale = output[4].detach()
    ctx.set_materialize_grads(False)  # else zeros for every output, as large as dweight


def _backward(ctx, g, *_):
    if g is None:  # downstream wants no gradient of the loss
        return (None,) * 21
    once_differentiable("linear_policy_loss")
    if ctx.gradients is None:
        raise RuntimeError(
            "linear_policy_loss: backward ran a second time; its gradients were formed in the "
            "forward and handed over in the first"
        )
    factor = g / ctx.scale
    if ctx.gradients[0].dtype == torch.float16:
        scaled = [(v.float() * factor).to(v.dtype) for v in ctx.gradients]
    elif torch.compiler.is_compiling():
        scaled = [v * factor for v in ctx.gradients]
    elif factor.is_cpu and bool(factor == 1):
        scaled = ctx.gradients  # looking is free here, a pass over dweight is not
    else:
        scaled = [v.mul_(factor) for v in ctx.gradients]  # a second dweight: twice the peak
    if not torch.compiler.is_compiling():
        ctx.gradients = None
    used = ctx.needs_input_grad[:5]
    gradients = (v if wanted else None for v, wanted in zip(scaled, used, strict=True))
    return *gradients, *([None] * 16)


_linear_policy_loss.register_autograd(_backward, setup_context=_setup)
