"""`logits_policy_loss`: the policy loss of logits that are at hand."""

from __future__ import annotations

from torch import Tensor

from pyrl.ops.backend import select
from pyrl.ops.logits_logprob import logits_logprob
from pyrl.ops.policy_objective import PolicyLoss, policy_objective
from pyrl.ops.spec import LossSpec
from pyrl.ops.support import Support


def logits_policy_loss(
    logits: Tensor,
    target: Tensor,
    advantages: Tensor,
    spec: LossSpec,
    *,
    inplace_backward: bool = False,
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

    Returns loss, metrics, and the detached logprob and entropy shaped like target.
    ValueError and NotImplementedError as in the two functions it composes.
    """
    if not isinstance(spec, LossSpec):
        raise ValueError(f"spec: expected a LossSpec, got {type(spec).__name__}")
    name = select(backend, logits.device)
    out = logits_logprob(
        logits,
        target,
        temperature=spec.temperature if temperature is None else temperature,
        softcap=spec.softcap,
        logit_scale=spec.logit_scale,
        mask=mask,
        support=support,
        inplace_backward=inplace_backward,
        backend=name,
    )
    loss = policy_objective(
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
    return loss._replace(logprob=out.logprob.detach(), entropy=out.entropy.detach())
