"""A block of tokens of the objective: what is read, what its sequence shares, and its terms."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .objective_sums import Metrics
from .objective_terms import (
    GMPO,
    SEQUENCE,
    TOKEN,
    VESPO,
    Tokens,
    capped_exp,
    correction_weight,
    gmpo_clipped,
    k3,
    kl_term,
    policy_term,
    vespo_log_weight,
)


class Pointers(NamedTuple):
    """The inputs [T]; None where not given."""

    logprob: Any
    entropy: Any
    old: Any
    ref: Any
    rollout: Any
    advantage: Any
    weight: Any
    keep: Any


class Numbers(NamedTuple):
    """float64 scalars: the objective's `NUMBERS` x, and everyone's."""

    x: Any
    kl_coef: Any
    kl_clamp: Any
    entropy_coef: Any
    correction_low: Any
    correction_high: Any
    off_policy_threshold: Any


class Block(NamedTuple):
    """BLOCK tokens in float64. Selected by mask: what an unkept token holds is never read, and all
    that it adds up to is 0."""

    keep: Any
    A: Any
    weight: Any
    entropy: Any
    logp: Any
    old: Any
    delta: Any  # logp - old; where old is missing logp - logp, 0 unless logp is NaN
    nan_old: Any
    log_w: Any  # old - rollout, 0 where unscored
    scored: Any
    nan_rollout: Any
    gap: Any  # (rollout, else old) - logp, 0 where that is missing
    d: Any  # ref - logp, 0 where ref is missing
    nan_ref: Any


class Sequence(NamedTuple):
    """What the tokens of a sequence share; unused where they share nothing."""

    log_ratio: Any  # mean of delta, as the objective clips it (vespo: the sum of its log-weights)
    log_w: Any  # sum or mean
    scored: Any  # tokens
    gap: Any  # mean


@triton.jit
def _load(ptr, t, mask):
    return tl.load(ptr + t, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _spread(value, like):
    """A number of the sequence, at each of its tokens."""
    return tl.zeros(like.shape, tl.float64) + value


@triton.jit
def _count(where):
    return tl.where(where, 1, 0)


@triton.jit
def read(p, t, inside):
    """The tokens t as a Block."""
    keep = tl.load(p.keep + t, mask=inside, other=0).to(tl.int1) & inside
    zero, never = tl.zeros(t.shape, tl.float64), tl.zeros(t.shape, tl.int1)
    logp = _load(p.logprob, t, keep)
    old, nan_old = logp, never
    if p.old is not None:
        old = _load(p.old, t, keep)
        nan_old = old != old
        old = tl.where(nan_old, logp, old)
    delta = logp - old
    log_w, scored, nan_rollout, gap = zero, never, never, -delta
    if p.rollout is not None:
        rollout = _load(p.rollout, t, keep)
        nan_rollout = rollout != rollout
        scored = keep & ~nan_rollout
        log_w = tl.where(scored, old - rollout, 0.0)
        gap = tl.where(scored, rollout - logp, 0.0)
    d, nan_ref = zero, never
    if p.ref is not None:
        ref = _load(p.ref, t, keep)
        nan_ref = ref != ref
        d = tl.where(nan_ref, 0.0, ref - logp)
    entropy = zero
    if p.entropy is not None:
        entropy = _load(p.entropy, t, keep)
    A, weight = _load(p.advantage, t, keep), _load(p.weight, t, keep)
    return Block(
        keep,
        A,
        weight,
        entropy,
        logp,
        old,
        delta,
        nan_old,
        log_w,
        scored,
        nan_rollout,
        gap,
        d,
        nan_ref,
    )


@triton.jit
def sequence(p, n, begin, end, options, BLOCK: tl.constexpr):
    """The first sweep: kept tokens and what the tokens of begin ... end share."""
    tokens, scored = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    log_ratio, log_w = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    gap = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        b = read(p, t, t < end)
        tokens += _count(b.keep)
        if options.objective == GMPO:
            clipped, _, _ = gmpo_clipped(b.delta, b.A, n.x[0], n.x[1])
            log_ratio += clipped
        elif options.objective == VESPO:
            w = tl.full([BLOCK], 1.0, tl.float64)
            if options.correction is not None:
                w, _ = correction_weight(
                    b.log_w, b.scored, n.correction_low, n.correction_high, options
                )
            log_ratio += vespo_log_weight(b.delta, w)
        elif options.ratio_level != TOKEN:
            log_ratio += b.delta
        if options.correction is not None and options.correction_level != TOKEN:
            log_w += b.log_w
            scored += _count(b.scored)
        if options.off_policy:
            gap += b.gap
    count = tl.maximum(tl.sum(tokens, axis=0).to(tl.float64), 1.0)
    total_ratio, total_w = tl.sum(log_ratio, axis=0), tl.sum(log_w, axis=0)
    if options.objective != VESPO:
        total_ratio = total_ratio / count
    if options.correction_level != SEQUENCE:
        total_w = total_w / count
    shared = Sequence(total_ratio, total_w, tl.sum(scored, axis=0), tl.sum(gap, axis=0) / count)
    return count, shared


@triton.jit
def terms(p, n, b, s, options):
    """Of a block b in sequence s: dloss/dlogp at a fixed ratio, dloss/dlog(ratio), where the bounds
    act, dloss/dentropy, and the metrics."""
    # x + -0.0 is x for every x: the compiler drops the sums of what is absent.
    absent = tl.full(b.A.shape, -0.0, tl.float64)
    never = tl.zeros(b.A.shape, tl.int1)
    if options.ratio_level == TOKEN and options.objective != GMPO:
        ratio = capped_exp(b.delta)
    else:
        ratio = _spread(capped_exp(s.log_ratio), b.A)
    term = policy_term(Tokens(b.logp, b.old, b.delta, ratio, s.log_ratio, b.A), n.x, options)
    loss, direct, through = term.loss, term.direct, term.through

    corrected, corrected_sq, masked = absent, absent, never
    corrected_max = tl.full(b.A.shape, -float("inf"), tl.float64)
    if options.correction is not None:
        log_w, scored = b.log_w, b.scored
        if options.correction_level != TOKEN:
            log_w = _spread(s.log_w, b.A)
            scored = b.keep & (_spread(s.scored, b.A) > 0)
        w, masked = correction_weight(log_w, scored, n.correction_low, n.correction_high, options)
        if options.objective != VESPO:
            # Selected, not multiplied: a masked token's term may be infinite.
            loss, direct = tl.where(w > 0, w * loss, 0.0), tl.where(w > 0, w * direct, 0.0)
            through = tl.where(w > 0, w * through, 0.0)
        corrected, corrected_sq = tl.where(scored, w, 0.0), tl.where(scored, w * w, 0.0)
        corrected_max = tl.where(scored, w, -float("inf"))
    off_policy = never
    if options.off_policy:
        off_policy = b.keep & (b.A < 0) & (_spread(s.gap, b.A) > n.off_policy_threshold)
        loss, direct = tl.where(off_policy, 0.0, loss), tl.where(off_policy, 0.0, direct)
        through = tl.where(off_policy, 0.0, through)

    kl_loss = absent
    if options.kl is not None:
        kl, kl_grad = kl_term(b.d, n.kl_clamp, options)
        kl, kl_grad = n.kl_coef * kl, n.kl_coef * kl_grad
        if options.kl_weighted:
            kl, kl_grad = kl * ratio, kl_grad * ratio
            through += tl.where(b.nan_ref, 0.0, kl)
        direct += tl.where(b.nan_ref, 0.0, kl_grad)
        kl_loss = tl.where(b.keep & ~b.nan_ref, b.weight * kl, 0.0)
    kl_k1, kl_k3, old_kl, rollout_kl = absent, absent, absent, absent
    if p.ref is not None:
        kl_k1, kl_k3 = -b.d, k3(b.d)
    if p.old is not None:
        old_kl = k3(-b.delta)
    if p.rollout is not None:
        rollout_kl = k3(b.log_w)
    entropy_loss, entropy, h = absent, absent, tl.zeros(b.A.shape, tl.float64)
    if p.entropy is not None:
        entropy = b.entropy
    if options.bonus:
        entropy_loss = tl.where(b.keep, b.weight * (-n.entropy_coef * b.entropy), 0.0)
        h = tl.where(b.keep, -n.entropy_coef * b.weight, 0.0)

    kept_ratio = tl.where(b.keep, ratio, 0.0)
    metrics = Metrics(
        _count(b.keep),
        tl.where(b.keep, b.weight * loss, 0.0),
        kl_loss,
        entropy_loss,
        b.logp,
        entropy,
        kl_k1,
        kl_k3,
        old_kl,
        rollout_kl,
        kept_ratio,
        kept_ratio * kept_ratio,
        tl.where(b.keep, ratio, float("inf")),
        tl.where(b.keep, ratio, -float("inf")),
        _count(b.keep & term.low),
        _count(b.keep & term.high),
        _count(b.keep & term.dual),
        corrected,
        corrected_sq,
        corrected_max,
        _count(masked),
        _count(off_policy),
        _count(b.keep & (b.A == 0)),
        _count(b.nan_old),
        _count(b.nan_ref),
        _count(b.nan_rollout),
    )
    direct = tl.where(b.keep, b.weight * direct, 0.0)
    through = tl.where(b.keep, b.weight * through, 0.0)
    return direct, through, term.low | term.high, h, metrics
