"""The formulas of the policy objective on a block of tokens, with their closed-form gradients.

pyrl/ops/objective.py states the same formulas for autograd. A new objective is one function here,
a branch of `policy_term` and a line of `NUMBERS` (docs/adding-a-loss.md).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

#: The names of pyrl/ops/spec.py, which kernels may not import; a test compares them. An objective's
#: numbers, at most four, reach its function in this order.
NUMBERS: dict[str, tuple[str, ...]] = {
    "reinforce": (),
    "clip": ("clip_low", "clip_high", "dual_clip", "delta"),
    "cispo": ("cispo_low", "cispo_high"),
    "sapo": ("sapo_tau_pos", "sapo_tau_neg"),
    "gmpo": ("clip_low", "clip_high"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    "dppo": ("dppo_low", "dppo_high"),
}
OBJECTIVES = tuple(NUMBERS)
RATIO_LEVELS = ("token", "sequence", "sequence_token")
KLS = ("k1", "k2", "k3", "abs", "k3_st")
CORRECTIONS = ("none", "tis", "mis", "icepop")
CORRECTION_LEVELS = ("token", "sequence", "geometric")
DIVERGENCES = ("tv", "kl")

REINFORCE, CLIP, CISPO, SAPO, GMPO, VESPO, DPPO = (tl.constexpr(i) for i in range(len(NUMBERS)))
TOKEN, SEQUENCE = tl.constexpr(0), tl.constexpr(1)  # levels of the ratio and of the correction
_K1, _K2, _K3, _ABS, _K3_ST = (tl.constexpr(i) for i in range(5))
_TIS, _TV = tl.constexpr(1), tl.constexpr(0)

_LOG_TINY, _LOG_HUGE = tl.constexpr(math.log(1e-8)), tl.constexpr(20.0)  # of vespo's log-weights
_EXP_CAP = tl.constexpr(700.0)


class Options(NamedTuple):
    """What the kernel is compiled for: indexes into the names above, None or False where off."""

    objective: Any
    has_dual: Any
    has_delta: Any
    divergence: Any
    ratio_level: Any
    kl: Any
    kl_weighted: Any
    kl_clamped: Any
    bonus: Any
    correction: Any
    correction_level: Any
    off_policy: Any


class Tokens(NamedTuple):
    """What a policy term reads: float64 [BLOCK], neutral where not kept."""

    logp: Any
    old: Any
    delta: Any  # logp - old; where old is missing logp - logp, 0 unless logp is NaN
    ratio: Any  # of the ratio level
    log_w: Any  # vespo: the sequence's summed log-weights
    A: Any


class Policy(NamedTuple):
    """A policy term [BLOCK]; the kernel carries `through` to the tokens that make up the ratio."""

    loss: Any
    direct: Any  # dloss/dlogp at a fixed ratio
    through: Any  # dloss/dlog(ratio)
    low: Any  # where the bounds act
    high: Any
    dual: Any


@triton.jit
def capped_exp(x):
    """exp(min(x, 700)): huge but finite, so that 0 times it is 0; differentiated as exp."""
    return tl.exp(x - tl.where(x > _EXP_CAP, x - _EXP_CAP, 0.0))


@triton.jit
def clamp(x, low, high):
    """min(max(x, low), high); nan stays nan, which tl.minimum would drop."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _zero(x):
    return tl.zeros(x.shape, tl.float64)


@triton.jit
def _never(x):
    return tl.zeros(x.shape, tl.int1)


@triton.jit
def _by_sign(positive, if_positive, otherwise):
    # The interpreter would make two bare numbers fp32.
    return tl.where(positive, if_positive, _zero(positive) + otherwise)


@triton.jit
def reinforce(t):
    """-A logp."""
    never = _never(t.A)
    return Policy(-t.A * t.logp, -t.A, _zero(t.A), never, never, never)


@triton.jit
def clip(t, clip_low, clip_high, dual_clip, delta, options):
    """-min(min(r, delta) A, clamp(r, 1 - clip_low, 1 + clip_high) A), at most -dual_clip A where
    A < 0."""
    r, A = t.ratio, t.A
    low, high = 1.0 - clip_low, 1.0 + clip_high
    free, free_slope = r * A, _zero(A) + 1.0
    if options.has_delta:
        free = tl.where(r > delta, delta, r) * A
        free_slope = tl.where(r > delta, 0.0, free_slope)
    bounded = clamp(r, low, high) * A
    bounded_slope = tl.where((r >= low) & (r <= high), 1.0, _zero(A))
    # At an exact tie torch.minimum hands each side half of the gradient.
    tied = 0.5 * (free_slope + bounded_slope)
    slope = tl.where(free < bounded, free_slope, tl.where(free > bounded, bounded_slope, tied))
    loss, through = -tl.where(bounded < free, bounded, free), -A * r * slope
    dual = _never(A)
    if options.has_dual:
        cap = -dual_clip * A
        dual = (A < 0) & (-free > cap)
        above, tie = (A < 0) & (loss > cap), (A < 0) & (loss == cap)
        through = tl.where(above, 0.0, tl.where(tie, 0.5 * through, through))
        loss = tl.where(above, cap, loss)
    return Policy(loss, _zero(A), through, (A < 0) & (r < low), (A > 0) & (r > high), dual)


@triton.jit
def cispo(t, low, high):
    """-sg[clamp(r, low, high)] A logp."""
    direct = -clamp(t.ratio, low, high) * t.A
    beyond = (t.ratio < low, t.ratio > high)
    return Policy(direct * t.logp, direct, _zero(t.A), beyond[0], beyond[1], _never(t.A))


@triton.jit
def sapo(t, tau_pos, tau_neg):
    """-A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A."""
    never = _never(t.A)
    tau = _by_sign(t.A > 0, tau_pos, tau_neg)
    gate = 1.0 / (1.0 + tl.exp(-tau * (t.ratio - 1.0)))
    through = -4.0 * t.A * gate * (1.0 - gate) * t.ratio
    return Policy(-t.A * (4.0 / tau) * gate, _zero(t.A), through, never, never, never)


@triton.jit
def gmpo_clipped(delta, A, clip_low, clip_high):
    """delta clipped on the side that A's sign selects, and where: what gmpo averages."""
    low, high = (A < 0) & (delta < -clip_low), (A > 0) & (delta > clip_high)
    return tl.where(low, -clip_low, tl.where(high, clip_high, delta)), low, high


@triton.jit
def gmpo(t, clip_low, clip_high):
    """-A r, r = exp(mean of the clipped deltas), to which a clipped token passes no gradient."""
    _, low, high = gmpo_clipped(t.delta, t.A, clip_low, clip_high)
    return Policy(-t.A * t.ratio, _zero(t.A), -t.A * t.ratio, low, high, _never(t.A))


@triton.jit
def vespo_log_weight(delta, w):
    """clamp(delta, -20, 20) + clamp(log w, log 1e-8, 20): what vespo sums."""
    return clamp(delta, -20.0, 20.0) + clamp(tl.log(w), _LOG_TINY, _LOG_HUGE)


@triton.jit
def vespo(t, k_pos, lambda_pos, k_neg, lambda_neg):
    """-sg[exp(lambda + k log w - lambda w)] A logp, log w the sequence's sum, clamped."""
    never = _never(t.A)
    log_w = clamp(t.log_w, _LOG_TINY, _LOG_HUGE)
    k, rate = _by_sign(t.A >= 0, k_pos, k_neg), _by_sign(t.A >= 0, lambda_pos, lambda_neg)
    direct = -tl.exp(rate + k * log_w - rate * tl.exp(log_w)) * t.A
    return Policy(direct * t.logp, direct, _zero(t.A), never, never, never)


@triton.jit
def dppo(t, bound_low, bound_high, options):
    """-r A, and 0 where the divergence at the sampled token is beyond its bound on A's side."""
    p, q = tl.exp(t.logp), tl.exp(t.old)
    if options.divergence == _TV:
        divergence = tl.abs(p - q)
    else:
        log_pq = tl.where(q > 0, t.old - t.logp, 0.0)
        divergence = q * log_pq + (1.0 - q) * tl.log((1.0 - q + 1e-8) / (1.0 - p + 1e-8))
    low = (t.A <= 0) & (p < q) & (divergence > bound_low)
    high = (t.A > 0) & (p > q) & (divergence > bound_high)
    loss = tl.where(low | high, 0.0, -t.ratio * t.A)
    return Policy(loss, _zero(t.A), loss, low, high, _never(t.A))


@triton.jit
def policy_term(t, x, options):
    """The objective's term with its NUMBERS x; 0 where A is 0."""
    if options.objective == REINFORCE:
        term = reinforce(t)
    elif options.objective == CLIP:
        term = clip(t, x[0], x[1], x[2], x[3], options)
    elif options.objective == CISPO:
        term = cispo(t, x[0], x[1])
    elif options.objective == SAPO:
        term = sapo(t, x[0], x[1])
    elif options.objective == GMPO:
        term = gmpo(t, x[0], x[1])
    elif options.objective == VESPO:
        term = vespo(t, x[0], x[1], x[2], x[3])
    else:
        tl.static_assert(options.objective == DPPO)
        term = dppo(t, x[0], x[1], options)
    # Selected, not multiplied: the log-prob may be -inf.
    loss, direct = tl.where(t.A == 0, 0.0, term.loss), tl.where(t.A == 0, 0.0, term.direct)
    through = tl.where(t.A == 0, 0.0, term.through)
    return Policy(loss, direct, through, term.low, term.high, term.dual)


@triton.jit
def k3(d):
    """exp(d) - d - 1."""
    return capped_exp(d) - d - 1.0


@triton.jit
def kl_term(d, bound, options):
    """KL estimate with d = ref - logp, and its gradient by logp: k1 -d, k2 d^2/2, k3, abs |d|,
    k3_st the value of k3 with the gradient of k2; clamped to [-bound, bound], gradient 0 beyond."""
    if options.kl == _K1:
        kl, grad = -d, _zero(d) + 1.0
    elif options.kl == _K2:
        kl, grad = 0.5 * d * d, -d
    elif options.kl == _K3:
        kl, grad = k3(d), 1.0 - capped_exp(d)
    elif options.kl == _ABS:
        kl, grad = tl.abs(d), tl.where(d > 0, -1.0, tl.where(d < 0, 1.0, _zero(d)))
    else:
        tl.static_assert(options.kl == _K3_ST)
        kl, grad = k3(d), -d
    if options.kl_clamped:
        grad = tl.where((kl >= -bound) & (kl <= bound), grad, 0.0)
        kl = clamp(kl, -bound, bound)
    return kl, grad


@triton.jit
def correction_weight(log_w, scored, low, high, options):
    """w = exp(log_w): tis clamps it to [low, high], mis and icepop put 0 outside; 1 where not
    scored. And where it was put to 0."""
    w = tl.exp(log_w)
    if options.correction == _TIS:
        w, masked = clamp(w, low, high), _never(w)
    else:
        inside = (w >= low) & (w <= high)
        w, masked = tl.where(inside, w, 0.0), scored & ~inside
    return tl.where(scored, w, 1.0), masked
