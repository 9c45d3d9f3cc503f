"""`linear_policy_loss`: both waists in one pass over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrl.ops.backend import load, select
from pyrl.ops.linear_logprob import (
    HeadGradients,
    check_head,
    check_targets,
    chunk_rows,
    fake_gradients,
    inv_temperature,
    kept_rows,
    linear_logprob,
    raw_logits,
)
from pyrl.ops.policy_objective import (
    FORMULA_BACKENDS,
    Fields,
    PolicyLoss,
    collect,
    named_metrics,
    policy_objective,
)
from pyrl.ops.shapes import layout
from pyrl.ops.spec import METRICS, LossSpec
from pyrl.ops.support import Support, SupportRows, check_support, support_fields


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantages: Tensor,
    spec: LossSpec,
    *,
    bias: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
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
    and `linear_logprob`; temperature, softcap and logit_scale come from `spec`. Instead of
    `ref_logprob`, `ref_hidden` and `ref_weight` (default: `weight`) may be given; with a `support`,
    the reference's softmax runs over it too.
    Returns loss, metrics, and the detached logprob and entropy shaped like target.

    ValueError and NotImplementedError as in the two functions it composes.
    """
    if not isinstance(spec, LossSpec):
        raise ValueError(f"spec: expected a LossSpec, got {type(spec).__name__}")
    where = layout(target, mask, cu_seqlens)
    check_head(hidden, weight, target, bias)
    name = select(backend, hidden.device)
    head: dict[str, Any] = {
        "temperature": spec.temperature,
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
            ref_logprob = linear_logprob(ref_hidden, frozen, target, bias=bias, **head).logprob
    inputs: dict[str, Any] = {
        "old_logprob": old_logprob,
        "ref_logprob": ref_logprob,
        "rollout_logprob": rollout_logprob,
        "weights": weights,
        "denominator": denominator,
    }
    if name in FORMULA_BACKENDS or spec.couples_tokens:
        out = linear_logprob(hidden, weight, target, bias=bias, **head)
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
    needs = torch.is_grad_enabled()
    loss, logprob, entropy, metrics, *_ = _linear_policy_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        inv_temperature(spec.temperature, target),
        *support_fields(support, target),
        *fields,
        spec.to_json(),
        name,
        needs and hidden.requires_grad,
        needs and weight.requires_grad,
        needs and bias is not None and bias.requires_grad,
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
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logprob [T], entropy [T], metrics, dloss/dhidden, dloss/dweight, dloss/dbias."""
    check_targets(target, keep, weight.shape[0])
    check_support(indptr, ids, target, keep, weight.shape[0])
    loss_spec, kernels = LossSpec.from_json(spec), load(backend)
    params, scale, cap = loss_spec.params(), loss_spec.logit_scale, loss_spec.softcap or 0.0
    x, index = kept_rows(hidden, keep)
    step = chunk_rows(x, weight.shape[0])
    needs = (needs_hidden, needs_weight, needs_bias)
    grads = HeadGradients(hidden, weight, bias, needs, chunks=-(-len(x) // step))
    y, inv = target[index], inv_temperature[index]
    support = SupportRows(indptr, ids, index)
    fields = Fields(old, ref, rollout, advantage, token_weight, keep, bounds)
    fields_x = fields.rows(index)
    w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    logprob, entropy = (torch.zeros(target.shape, device=x.device) for _ in range(2))
    for i in range(0, len(x), step):
        rows = slice(i, i + step)
        where = rows if isinstance(index, slice) else index[rows]
        z = raw_logits(x[rows], w, b)
        of_rows = support(rows)
        stats = kernels.logits_stats(z, y[rows], inv[rows], scale, cap, **of_rows)
        logprob[where], entropy[where] = stats[0], stats[1]
        if any(grads.needs):
            part = fields_x.rows(rows)
            _, c, h, _ = kernels.objective_terms(stats[0], stats[1], *part, params)
            kernels.logits_grad_(
                z, y[rows], inv[rows], scale, cap, stats[2], stats[1], c, h, None, **of_rows
            )
            grads.add(z, x[rows], w, where)
    # The loss and its metrics in one reduction over all tokens, whatever the chunks were.
    loss, _, _, metrics = kernels.objective_terms(logprob, entropy, *fields, params)
    return loss, logprob, entropy, metrics, *grads.result()


@_linear_policy_loss.register_fake
def _(
    hidden,
    weight,
    bias,
    target,
    inv_temperature,
    indptr,
    ids,
    old,
    ref,
    rollout,
    advantage,
    token_weight,
    keep,
    bounds,
    spec,
    backend,
    needs_hidden,
    needs_weight,
    needs_bias,
):
    vector = hidden.new_empty(target.shape, dtype=torch.float32)
    metrics = hidden.new_empty(len(METRICS), dtype=torch.float64)
    gradients = fake_gradients(hidden, weight, bias, needs_hidden, needs_weight, needs_bias)
    return vector.new_empty(()), vector, torch.empty_like(vector), metrics, *gradients


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    # Detached, or the graph would hold itself; not save_for_backward, whose reference would make
    # autograd copy dweight instead of taking it over.
    ctx.gradients = [v.detach() for v in output[4:]]


def _backward(ctx, g, *_):
    if ctx.gradients is None:
        raise RuntimeError(
            "linear_policy_loss: backward ran a second time; its gradients were formed in the "
            "forward and handed over in the first"
        )
    if torch.compiler.is_compiling():
        dx, dw, db = (v * g for v in ctx.gradients)
    else:
        dx, dw, db = (v.mul_(g) for v in ctx.gradients)  # a second dweight would double the peak
        ctx.gradients = None
    used = ctx.needs_input_grad
    gradients = (dx if used[0] else None, dw if used[1] else None, db if used[2] else None)
    return *gradients, *([None] * 16)


_linear_policy_loss.register_autograd(_backward, setup_context=_setup)
