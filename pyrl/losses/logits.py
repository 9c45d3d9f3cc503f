"""`logits_policy_loss`: the policy loss of logits that are at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrl.losses.one_read import one_read_loss
from pyrl.ops.backend import select
from pyrl.ops.linear_logprob import inv_temperature, token_ids
from pyrl.ops.logits_logprob import check_logits, logits_logprob
from pyrl.ops.policy_objective import PolicyLoss, collect, named_metrics, policy_objective
from pyrl.ops.shapes import layout
from pyrl.ops.spec import LossSpec
from pyrl.ops.support import Support


def logits_policy_loss(
    logits: Tensor,
    target: Tensor,
    advantages: Tensor,
    spec: LossSpec,
    *,
    inplace_backward: bool = False,
    gradient_in_forward: bool = False,
    temperature: float | Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    support: Support | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """policy_objective(logits_logprob(logits, target), advantages, spec), for any spec.

    logits [T, V] or [B, L, V] (f32, bf16, f16), any distance from row to row · everything else as
    in `linear_policy_loss`; softcap, logit_scale and temperature come from `spec`, `temperature`
    (scalar, or shaped like target) overrides the last.

    The forward reads the logits once and makes nothing of their size. The backward makes one
    tensor of their size, or none with `inplace_backward=True`: the gradient then takes the memory
    of the logits, whose values are gone. They must not be read after that, must not be a leaf, and
    backward runs once; what of this can be detected raises (see `logits_logprob`). For
    logits[:, :-1] torch's own backward of the slice makes a full-size tensor again: pass all the
    logits and a mask instead.

    With `gradient_in_forward=True` a row's loss and gradient are formed while the row is at hand,
    in the forward: one read and one write of the logits (4 N V bytes in bf16 instead of 6). The
    backward only multiplies by its incoming gradient, which costs nothing where that is 1, as in
    loss.backward(). The gradient lives from the forward on, in a new tensor or with
    `inplace_backward=True` in the memory of the logits, which must then not be read after this
    call; backward runs once. The backends that do it are cpu and cuda, the default on a GPU then
    (by a thread-block cluster on Hopper and later; on other GPUs, and for rows that a cluster
    cannot hold, by kernels that read twice, in the forward all the same). Where no gradient is
    wanted, nothing is formed or overwritten.

    Returns loss, metrics, and the detached logprob and entropy shaped like target.
    ValueError and NotImplementedError as in the two functions it composes; NotImplementedError for
    `gradient_in_forward` with another backend, a `support`, or a spec that couples tokens.
    """
    if not isinstance(spec, LossSpec):
        raise ValueError(f"spec: expected a LossSpec, got {type(spec).__name__}")
    name = select(backend, logits.device, one_read=gradient_in_forward)
    if gradient_in_forward and (spec.couples_tokens or support is not None):
        why = "a support" if support is not None else f"a spec that couples tokens ({spec})"
        raise NotImplementedError(f"gradient_in_forward=True cannot be had with {why}")
    temperature = spec.temperature if temperature is None else temperature
    if gradient_in_forward and torch.is_grad_enabled() and logits.requires_grad:
        where = layout(target, mask, cu_seqlens)
        check_logits(logits, target, name, inplace=inplace_backward)
        fields = collect(
            where,
            spec,
            advantages,
            old_logprob=old_logprob,
            ref_logprob=ref_logprob,
            rollout_logprob=rollout_logprob,
            weights=weights,
            denominator=denominator,
        )
        loss, logprob, entropy, metrics = one_read_loss(
            logits,
            token_ids(target),
            inv_temperature(temperature, target),
            fields,
            spec,
            name,
            inplace=inplace_backward,
        )
        return PolicyLoss(
            loss,
            named_metrics(metrics.detach(), where),
            logprob.detach().reshape(target.shape),
            entropy.detach().reshape(target.shape),
        )
    out = logits_logprob(
        logits,
        target,
        temperature=temperature,
        softcap=spec.softcap,
        logit_scale=spec.logit_scale,
        mask=mask,
        support=support,
        inplace_backward=inplace_backward,
        backend=name,
    )
    composed = policy_objective(
        out.logprob,
        advantages,
        spec,
        entropy=out.entropy,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        rollout_logprob=rollout_logprob,
        mask=mask,
        cu_seqlens=cu_seqlens,
        weights=weights,
        denominator=denominator,
        backend=name,
    )
    return composed._replace(logprob=out.logprob.detach(), entropy=out.entropy.detach())
