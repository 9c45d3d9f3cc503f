"""The policy objective in torch: the one Python definition of every loss.

The float64 oracle and the torch backend both run it and take its gradient from autograd; the
closed-form gradients of Triton (kernels/objective.py) and C++/CUDA (csrc/objective.h) are tested
against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrl.ops.spec import METRICS, LossSpec


def policy_term(logprob: Tensor, ratio: Tensor, advantage: Tensor, spec: LossSpec) -> Tensor:
    """Per-token policy loss [T]: -A logprob, or -min(r A, clamp(r, 1-lo, 1+hi) A), at most
    -dual_clip A where A < 0."""
    if spec.objective == "reinforce":
        return -advantage * logprob
    clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    term = -torch.minimum(ratio * advantage, clipped * advantage)
    if spec.dual_clip is not None:
        bounded = torch.minimum(term, -spec.dual_clip * advantage)
        term = torch.where(advantage < 0, bounded, term)
    return term


def kl_term(logprob: Tensor, ref: Tensor, kind: str) -> Tensor:
    """Per-token KL estimate [T] with d = ref - logprob: k1 -d, k2 d^2/2, k3 exp(d) - d - 1."""
    d = ref - logprob
    return {"k1": lambda: -d, "k2": lambda: d.square() / 2, "k3": lambda: d.exp() - d - 1}[kind]()


def policy_objective_terms(
    logprob: Tensor,
    entropy: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    keep: Tensor,
    spec: LossSpec,
) -> tuple[Tensor, Tensor]:
    """sum over kept t of weight_t (policy_t + kl_coef KL_t - entropy_coef H_t), and the metrics.

    All vectors [T] of one floating dtype, `keep` bool [T]. `old` None or NaN at t: the ratio is 1
    with gradient. `ref` NaN at t: no KL there. Returns loss (0-d) and float64 [len(METRICS)].
    Unkept tokens are replaced by neutral values before any arithmetic, so what they hold does not
    matter; the shapes stay static, so nothing waits for the device.
    """
    zero = torch.zeros_like(logprob)
    logp = torch.where(keep, logprob, zero)
    adv = torch.where(keep, advantage, zero)
    w = torch.where(keep, weight, zero)
    h = zero if entropy is None else torch.where(keep, entropy, zero)

    old = logp.detach() if old is None else old.to(logp.dtype)
    nan_old = old.isnan() & keep
    old = torch.where(keep & ~nan_old, old, logp.detach())
    ratio = (logp - old).exp()
    policy = policy_term(logp, ratio, adv, spec)

    has_ref = torch.zeros_like(keep) if ref is None else ~ref.isnan() & keep
    anchor = (
        logp.detach() if ref is None else torch.where(has_ref, ref.to(logp.dtype), logp.detach())
    )
    kl = torch.where(has_ref, kl_term(logp, anchor, spec.kl), zero)

    # An option that is off adds nothing to the graph: 0 * inf must not reach the loss.
    loss = (w * policy).sum()
    if spec.kl_coef:
        loss = loss + spec.kl_coef * (w * kl).sum()
    if spec.entropy_coef:
        loss = loss - spec.entropy_coef * (w * h).sum()
    sums = _sums(logp, old, anchor, adv, ratio, keep, has_ref, spec)
    sums["policy_loss"] = (w.double() * policy.detach().double()).sum()
    sums["kl_loss"] = spec.kl_coef * (w.double() * kl.detach().double()).sum()
    sums["entropy_loss"] = -spec.entropy_coef * (w.double() * h.detach().double()).sum()
    sums["entropy_sum"] = h.detach().double().sum()
    sums["nan_old"] = nan_old.sum()
    sums["nan_ref"] = (keep & ~has_ref).sum() if ref is not None else zero.sum()
    return loss, torch.stack([sums[name].double() for name in METRICS])


@torch.no_grad()
def _sums(
    logp: Tensor,
    old: Tensor,
    ref: Tensor,
    adv: Tensor,
    ratio: Tensor,
    keep: Tensor,
    has_ref: Tensor,
    spec: LossSpec,
) -> dict[str, Tensor]:
    """Metrics that are sums, counts and extremes over the kept tokens."""

    def total(values: Tensor, where: Tensor = keep) -> Tensor:
        return torch.where(where, values.double(), 0.0).sum()

    def k3(d: Tensor) -> Tensor:
        return d.exp() - d - 1

    # Extremes of nothing are +inf and -inf, so that they merge across micro-batches.
    edge = ratio.new_full((1,), torch.inf)
    clip = keep & (spec.objective == "clip")
    dual = torch.zeros_like(keep)
    if spec.dual_clip is not None:
        dual = clip & (adv < 0) & (-ratio * adv > -spec.dual_clip * adv)
    d_ref, d_old = (ref - logp).double(), (old - logp).double()
    return {
        "tokens": keep.sum(),
        "logprob_sum": total(logp),
        "kl_k1_sum": total(-d_ref, has_ref),
        "kl_k3_sum": total(k3(d_ref), has_ref),
        "old_kl_sum": total(k3(d_old)),
        "ratio_sum": total(ratio),
        "ratio_sq_sum": total(ratio.double().square()),
        "ratio_min": torch.cat([torch.where(keep, ratio, torch.inf), edge]).min(),
        "ratio_max": torch.cat([torch.where(keep, ratio, -torch.inf), -edge]).max(),
        "clip_low": (clip & (adv < 0) & (ratio < 1 - spec.clip_low)).sum(),
        "clip_high": (clip & (adv > 0) & (ratio > 1 + spec.clip_high)).sum(),
        "dual_clip": dual.sum(),
        "zero_advantage": (keep & (adv == 0)).sum(),
    }
