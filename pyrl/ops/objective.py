"""The policy objective in torch: the one Python definition of every loss.

The float64 oracle and the torch backend both run it and take its gradient from autograd; the
closed-form gradients of Triton (kernels/objective.py) and C++/CUDA (csrc/objective.h) are tested
against it. A new objective is one function here and a line in `POLICY_TERMS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyrl.ops.spec import METRICS, LossSpec

#: Bounds of vespo's log-weights.
LOG_TINY, LOG_HUGE = math.log(1e-8), 20.0
#: Largest argument of `capped_exp`.
EXP_CAP = {torch.float64: 700.0, torch.float32: 80.0}


def capped_exp(x: Tensor) -> Tensor:
    """exp(min(x, 700)), differentiated as exp: huge but finite, so that 0 times it is 0."""
    return (x - (x - EXP_CAP[x.dtype]).clamp(min=0).detach()).exp()


class Segments:
    """Sums over the kept tokens of each sequence, spread back to its tokens.

    bounds int64 [B + 1] from 0 to T.
    """

    def __init__(self, bounds: Tensor, keep: Tensor) -> None:
        self.keep = keep
        self.count = bounds.numel() - 1
        # The sequence of token t: how many bounds lie at or below it. Empty sequences hold none.
        positions = torch.arange(keep.numel(), device=keep.device)
        self.ids = torch.searchsorted(bounds[1:].contiguous(), positions, right=True)

    def sum(self, values: Tensor) -> Tensor:
        """[T] → [T]: the sum over the sequence of each token."""
        kept = torch.where(self.keep, values, 0.0)
        return kept.new_zeros(self.count).index_add(0, self.ids, kept)[self.ids]

    def mean(self, values: Tensor) -> Tensor:
        """[T] → [T]: the mean over the kept tokens of the sequence of each token."""
        return self.sum(values) / self.sum(torch.ones_like(values)).clamp(min=1)


class Policy(NamedTuple):
    """A policy term [T], the ratio it used, and where its bounds acted (bool [T])."""

    loss: Tensor
    ratio: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    dual: Tensor | None = None


class Tokens(NamedTuple):
    """What a policy term reads: [T] vectors, neutral where not kept; old is detached."""

    logprob: Tensor
    old: Tensor
    advantage: Tensor
    ratio: Tensor  # of spec.ratio_level, with its gradient
    log_weight: Tensor  # log of the token's rollout correction, detached; 0 without one
    segments: Segments | None


def reinforce(t: Tokens, spec: LossSpec) -> Policy:
    """-A logprob."""
    return Policy(-t.advantage * t.logprob, t.ratio)


def clip(t: Tokens, spec: LossSpec) -> Policy:
    """-min(min(r, delta) A, clamp(r, 1-lo, 1+hi) A), at most -dual_clip A where A < 0."""
    low, high, a = 1 - spec.clip_low, 1 + spec.clip_high, t.advantage
    free = (t.ratio if spec.delta is None else t.ratio.clamp(max=spec.delta)) * a
    loss = -torch.minimum(free, t.ratio.clamp(low, high) * a)
    dual = None
    if spec.dual_clip is not None:
        bound = -spec.dual_clip * a
        dual = (a < 0) & (-free > bound)
        loss = torch.where(a < 0, torch.minimum(loss, bound), loss)
    return Policy(loss, t.ratio, (a < 0) & (t.ratio < low), (a > 0) & (t.ratio > high), dual)


def cispo(t: Tokens, spec: LossSpec) -> Policy:
    """-sg[clamp(r, lo, hi)] A logprob."""
    r = t.ratio.detach()
    loss = -r.clamp(spec.cispo_low, spec.cispo_high) * t.advantage * t.logprob
    return Policy(loss, t.ratio, r < spec.cispo_low, r > spec.cispo_high)


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    # torch.where of two numbers would round them to fp32.
    return torch.where(condition, yes, torch.full_like(like, no))


def sapo(t: Tokens, spec: LossSpec) -> Policy:
    """-A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A."""
    tau = _choose(t.advantage > 0, spec.sapo_tau_pos, spec.sapo_tau_neg, t.ratio)
    return Policy(-t.advantage * (4 / tau) * torch.sigmoid(tau * (t.ratio - 1)), t.ratio)


def gmpo(t: Tokens, spec: LossSpec) -> Policy:
    """-A exp(mean of delta clipped on the side that A's sign selects)."""
    assert t.segments is not None
    delta, a = t.logprob - t.old, t.advantage
    low, high = (a < 0) & (delta < -spec.clip_low), (a > 0) & (delta > spec.clip_high)
    clipped = torch.where(low, -spec.clip_low, torch.where(high, spec.clip_high, delta))
    ratio = capped_exp(t.segments.mean(clipped))
    return Policy(-a * ratio, ratio, low, high)


def vespo(t: Tokens, spec: LossSpec) -> Policy:
    """-sg[exp(lambda + k log w - lambda w)] A logprob, w the sequence's clamped weight."""
    assert t.segments is not None
    delta = (t.logprob - t.old).detach().clamp(-20.0, 20.0)
    log_weight = t.log_weight.clamp(LOG_TINY, LOG_HUGE)
    log_w = t.segments.sum(delta + log_weight).clamp(LOG_TINY, LOG_HUGE)
    positive = t.advantage >= 0
    k = _choose(positive, spec.vespo_k_pos, spec.vespo_k_neg, log_w)
    rate = _choose(positive, spec.vespo_lambda_pos, spec.vespo_lambda_neg, log_w)
    phi = (rate + k * log_w - rate * log_w.exp()).exp()
    return Policy(-phi * t.advantage * t.logprob, t.ratio)


def dppo(t: Tokens, spec: LossSpec) -> Policy:
    """-r A, and 0 where the divergence at the sampled token is beyond its bound on A's side."""
    p, q = t.logprob.detach().exp(), t.old.exp()
    if spec.dppo_divergence == "tv":
        divergence = (p - q).abs()
    else:
        log_pq = torch.where(q > 0, t.old - t.logprob.detach(), 0.0)
        divergence = q * log_pq + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    high = (t.advantage > 0) & (p > q) & (divergence > spec.dppo_high)
    low = (t.advantage <= 0) & (p < q) & (divergence > spec.dppo_low)
    return Policy(torch.where(low | high, 0.0, -t.ratio * t.advantage), t.ratio, low, high)


POLICY_TERMS: dict[str, Callable[[Tokens, LossSpec], Policy]] = {
    "reinforce": reinforce,
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "vespo": vespo,
    "dppo": dppo,
}


def kl_term(logprob: Tensor, ref: Tensor, kind: str) -> Tensor:
    """Per-token KL estimate [T] with d = ref - logprob: k1 -d, k2 d^2/2, k3 exp(d) - d - 1,
    abs |d|, k3_st the value of k3 with the gradient of k2."""
    d = ref - logprob
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return capped_exp(d) - d - 1
    if kind == "abs":
        return d.abs()
    through = d.square() / 2
    return (capped_exp(d) - d - 1).detach() + through - through.detach()


def effective_ratio(logprob: Tensor, old: Tensor, segments: Segments | None, level: str) -> Tensor:
    """exp(delta): token, mean over the sequence, or that mean's value with the token's gradient."""
    delta = logprob - old
    if level != "token":
        assert segments is not None
        mean = segments.mean(delta)
        delta = mean if level == "sequence" else mean.detach() + delta - delta.detach()
    return capped_exp(delta)


class Correction(NamedTuple):
    """Detached rollout correction [T]."""

    weight: Tensor
    scored: Tensor  # bool: a rollout log-prob stands behind the weight
    masked: Tensor  # bool: mis, icepop put 0


def correction_weight(
    old: Tensor, rollout: Tensor, keep: Tensor, segments: Segments | None, spec: LossSpec
) -> Correction:
    """w = exp(old - rollout) of the level, truncated (tis) or masked (mis, icepop); 1 where NaN."""
    scored = keep & ~rollout.isnan()
    log_w = torch.where(scored, old - rollout, 0.0)
    if spec.correction_level != "token":
        assert segments is not None
        log_w = segments.sum(log_w) if spec.correction_level == "sequence" else segments.mean(log_w)
        scored = keep & (segments.sum(scored.to(log_w.dtype)) > 0)
    w = log_w.exp()
    low, high = spec.correction_low, spec.correction_high
    outside = scored & ~((w >= low) & (w <= high))
    if spec.correction == "tis":
        return Correction(
            torch.where(scored, w.clamp(low, high), 1.0), scored, torch.zeros_like(keep)
        )
    return Correction(torch.where(scored, torch.where(outside, 0.0, w), 1.0), scored, outside)


def policy_objective_terms(
    logprob: Tensor,
    entropy: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    keep: Tensor,
    bounds: Tensor | None,
    spec: LossSpec,
) -> tuple[Tensor, Tensor]:
    """sum over kept t of weight_t (correction_t policy_t + kl_coef KL_t - entropy_coef H_t), and
    the metrics.

    All vectors [T] of one floating dtype, `keep` bool [T], `bounds` int64 [B + 1] where
    `spec.couples_tokens`. `old` None or NaN at t: the ratio is 1 with gradient. `ref` NaN at t: no
    KL there. `rollout` NaN at t: unscored. Returns loss (0-d) and float64 [len(METRICS)]. Unkept
    tokens are replaced by neutral values before any arithmetic, so what they hold does not matter;
    the shapes stay static, so nothing waits for the device.
    """
    zero = torch.zeros_like(logprob)
    never = torch.zeros_like(keep)
    segments = None if bounds is None else Segments(bounds, keep)
    logp = torch.where(keep, logprob, zero)
    adv = torch.where(keep, advantage, zero)
    w = torch.where(keep, weight, zero)
    h = zero if entropy is None else torch.where(keep, entropy, zero)

    old = logp.detach() if old is None else old.to(logp.dtype)
    nan_old = old.isnan() & keep
    old = torch.where(keep & ~nan_old, old, logp.detach())
    ratio = effective_ratio(logp, old, segments, spec.ratio_level)

    scored = never if rollout is None else keep & ~rollout.isnan()
    sampler = old if rollout is None else torch.where(scored, rollout.to(logp.dtype), old)
    corrected = Correction(torch.ones_like(logp), never, never)
    if spec.correction is not None:
        unscored = torch.where(scored, sampler, torch.nan)
        corrected = correction_weight(old, unscored, keep, segments, spec)
    tokens = Tokens(logp, old, adv, ratio, corrected.weight.log(), segments)
    policy = POLICY_TERMS[spec.objective](tokens, spec)
    term = torch.where(adv == 0, zero, policy.loss)  # selected: the log-prob may be -inf
    if spec.correction is not None and spec.objective != "vespo":
        # Selected, not multiplied: a masked token's term may be infinite.
        term = torch.where(corrected.weight > 0, corrected.weight * term, zero)
    off_policy = never
    if spec.off_policy_threshold is not None:
        assert segments is not None
        # An unscored token is no evidence: its gap is 0.
        gap = sampler - logp.detach()
        gap = gap if rollout is None else torch.where(scored, gap, zero)
        off_policy = keep & (adv < 0) & (segments.mean(gap) > spec.off_policy_threshold)
        term = torch.where(off_policy, zero, term)

    has_ref = never if ref is None else ~ref.isnan() & keep
    anchor = (
        logp.detach() if ref is None else torch.where(has_ref, ref.to(logp.dtype), logp.detach())
    )
    kl = kl_term(logp, anchor, spec.kl)
    if spec.kl_clamp is not None:
        kl = kl.clamp(-spec.kl_clamp, spec.kl_clamp)
    if spec.kl_ratio_weighted:
        kl = kl * policy.ratio
    kl = torch.where(has_ref, kl, zero)

    # An option that is off adds nothing to the graph: 0 * inf must not reach the loss.
    loss = (w * term).sum()
    if spec.kl_coef:
        loss = loss + spec.kl_coef * (w * kl).sum()
    if spec.entropy_coef:
        loss = loss - spec.entropy_coef * (w * h).sum()
    with torch.no_grad():
        sums = _sums(logp, old, anchor, adv, policy, keep, has_ref)
        sums |= _correction_sums(old, sampler, scored, corrected)
        sums["policy_loss"] = (w.double() * term.double()).sum()
        sums["kl_loss"] = spec.kl_coef * (w.double() * kl.double()).sum()
        sums["entropy_loss"] = -spec.entropy_coef * (w.double() * h.double()).sum()
        sums["entropy_sum"] = h.double().sum()
        sums["off_policy_masked"] = off_policy.sum()
        sums["nan_old"] = nan_old.sum()
        sums["nan_ref"] = (keep & ~has_ref).sum() if ref is not None else zero.sum()
        sums["nan_rollout"] = (keep & ~scored).sum() if rollout is not None else zero.sum()
    return loss, torch.stack([sums[name].double() for name in METRICS])


def _total(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values.double(), 0.0).sum()


def _extreme(values: Tensor, where: Tensor, sign: float) -> Tensor:
    # Extremes of nothing are +inf and -inf, so that they merge across micro-batches.
    edge = values.new_full((1,), sign * torch.inf)
    filled = torch.cat([torch.where(where, values, sign * torch.inf), edge])
    return filled.min() if sign > 0 else filled.max()


def _k3(d: Tensor) -> Tensor:
    return capped_exp(d) - d - 1


def _sums(
    logp: Tensor,
    old: Tensor,
    ref: Tensor,
    adv: Tensor,
    policy: Policy,
    keep: Tensor,
    has_ref: Tensor,
) -> dict[str, Tensor]:
    """Metrics that are sums, counts and extremes over the kept tokens."""
    never = torch.zeros_like(keep)
    low, high, dual = (never if v is None else v for v in (policy.low, policy.high, policy.dual))
    d_ref, d_old = (ref - logp).double(), (old - logp).double()
    return {
        "tokens": keep.sum(),
        "logprob_sum": _total(logp, keep),
        "kl_k1_sum": _total(-d_ref, has_ref),
        "kl_k3_sum": _total(_k3(d_ref), has_ref),
        "old_kl_sum": _total(_k3(d_old), keep),
        "ratio_sum": _total(policy.ratio, keep),
        "ratio_sq_sum": _total(policy.ratio.double().square(), keep),
        "ratio_min": _extreme(policy.ratio, keep, 1.0),
        "ratio_max": _extreme(policy.ratio, keep, -1.0),
        "clip_low": (keep & low).sum(),
        "clip_high": (keep & high).sum(),
        "dual_clip": (keep & dual).sum(),
        "zero_advantage": (keep & (adv == 0)).sum(),
    }


def _correction_sums(
    old: Tensor, sampler: Tensor, scored: Tensor, corrected: Correction
) -> dict[str, Tensor]:
    """Metrics of the rollout correction over the tokens whose weight has a rollout behind it."""
    w = corrected.weight.double()
    return {
        "rollout_kl_sum": _total(_k3((old - sampler).double()), scored),
        "correction_sum": _total(w, corrected.scored),
        "correction_sq_sum": _total(w.square(), corrected.scored),
        "correction_max": _extreme(w, corrected.scored, -1.0),
        "correction_masked": corrected.masked.sum(),
    }
