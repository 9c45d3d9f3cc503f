"""`linear_policy_loss` with the rows of the head's weight spread over a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyrl.ops.lora import LoRA
from pyrl.ops.parallel import vocab_parallel_logprob
from pyrl.ops.policy_objective import PolicyLoss, policy_objective
from pyrl.ops.spec import LossSpec


def vocab_parallel_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantages: Tensor,
    spec: LossSpec,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
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
    partial_hidden: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    """policy_objective(vocab_parallel_logprob(hidden, weight, target), advantages, spec).

    The loss and metrics of `linear_policy_loss` on the whole head, the same on every rank of
    `group`: they are one loss, not parts of a sum. Every argument is as in `linear_policy_loss`;
    weight, bias, lora.b, ref_weight and ref_bias are this rank's rows, which begin at
    `vocab_start` of the whole head, and everything else is the same on every rank. `group` and
    `partial_hidden` as in `vocab_parallel_logprob`. 8 N D V / ranks flops: the backward forms the
    logits again.

    ValueError and NotImplementedError as in the two functions it composes.
    """
    if not isinstance(spec, LossSpec):
        raise ValueError(f"spec: expected a LossSpec, got {type(spec).__name__}")
    head: dict[str, Any] = {
        "vocab_start": vocab_start,
        "group": group,
        "vocab_size": vocab_size,
        "temperature": spec.temperature if temperature is None else temperature,
        "softcap": spec.softcap,
        "logit_scale": spec.logit_scale,
        "mask": mask,
        "backend": backend,
    }
    if ref_hidden is not None:
        if ref_logprob is not None:
            raise ValueError("ref_hidden and ref_logprob are two sources of one thing: give one")
        with torch.no_grad():
            ref_logprob = vocab_parallel_logprob(
                ref_hidden,
                weight if ref_weight is None else ref_weight,
                target,
                bias=bias if ref_bias is None else ref_bias,
                **head,
            ).logprob
    elif ref_weight is not None or ref_bias is not None:
        raise ValueError("ref_weight and ref_bias need ref_hidden")
    out = vocab_parallel_logprob(
        hidden, weight, target, bias=bias, lora=lora, partial_hidden=partial_hidden, **head
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
        backend=backend,
    )
    return composed._replace(logprob=out.logprob.detach(), entropy=out.entropy.detach())
