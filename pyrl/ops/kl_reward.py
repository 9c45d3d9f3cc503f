"""KL against a reference policy as a penalty in the reward: detached estimates, no gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrl.ops.objective import Segments, kl_term
from pyrl.ops.shapes import Layout, check_shape, flat_float, layout
from pyrl.ops.spec import KL, KLS


def kl_penalty(
    logprob: Tensor,
    ref_logprob: Tensor,
    *,
    kind: KL = "k3",
    clamp: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Per-token KL estimate with d = ref - logprob: k1 -d, k2 d^2 / 2, k3 exp(d) - d - 1, abs |d|.

    logprob, ref_logprob [T] or [B, L] → fp32 of that shape, detached. `clamp` bounds the estimate
    to [-clamp, clamp] · 0 where mask is false and where ref is NaN. k3_st is k3 here: they differ
    in their gradient only. In expectation over the policy's own samples k1 and k3 are the reverse
    KL; k2 and abs are not. Source: Schulman, "Approximating KL divergence" (2020).
    """
    return _estimate(logprob, ref_logprob, kind, clamp, layout(logprob, mask, None)).reshape(
        logprob.shape
    )


def rewards_with_kl(
    rewards: Tensor,
    logprob: Tensor,
    ref_logprob: Tensor,
    *,
    coef: float,
    kind: KL = "k1",
    clamp: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """rewards_s - coef sum over the kept tokens of sequence s of the KL estimate of `kl_penalty`.

    rewards [B] · logprob, ref_logprob [T] with `cu_seqlens` [B + 1], or [B, L] → fp32 [B],
    detached. kind k1 by default: in the reward its score-function gradient is the reverse KL's,
    which k3's is not. A NaN reward stays NaN. ValueError names a wrong shape, device or option.
    Sources: RLHF's penalised reward arXiv 2203.02155, estimators in and out of the reward
    2510.01555.
    """
    if not math.isfinite(coef):
        raise ValueError(f"coef={coef!r}: expected a finite number")
    where = layout(logprob, mask, cu_seqlens)
    if where.cu_seqlens is None or where.sequences is None:
        raise ValueError("rewards_with_kl on packed [T] needs cu_seqlens")
    check_shape("rewards", rewards, (where.sequences,), logprob.device)
    if not rewards.is_floating_point():
        raise ValueError(f"rewards: expected a floating dtype, got {rewards.dtype}")
    kl = _estimate(logprob, ref_logprob, kind, clamp, where).double()
    ids = Segments(where.cu_seqlens, where.keep).ids
    total = kl.new_zeros(where.sequences).index_add(0, ids, kl)
    return (rewards.detach().double() - coef * total).float()


def _estimate(
    logprob: Tensor, ref_logprob: Tensor, kind: str, clamp: float | None, where: Layout
) -> Tensor:
    """fp32 [T] of `kl_penalty`."""
    if kind not in KLS:
        raise ValueError(f"kind={kind!r}: expected one of {list(KLS)}")
    if clamp is not None and not 0 < clamp < math.inf:
        raise ValueError(f"clamp={clamp!r}: expected a finite number > 0")
    logp = flat_float("logprob", logprob, where)
    ref = flat_float("ref_logprob", ref_logprob, where)
    assert logp is not None and ref is not None
    known = where.keep & ~ref.isnan()
    # Selected before exp: an unkept token may hold anything.
    kl = kl_term(torch.where(known, logp, 0.0), torch.where(known, ref, 0.0), kind)
    return kl if clamp is None else kl.clamp(-clamp, clamp)
