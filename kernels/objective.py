"""The policy objective on [T]: loss, its two gradients and all metrics in one launch.

The same formulas as pyrl/ops/objective.py, with closed-form gradients. Arithmetic is float64: the
vectors are short, and ratios next to a clip bound fall on the same side as in the oracle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import require
from .tuning import OBJECTIVE, OBJECTIVE_ROWS

#: The layouts of pyrl/ops/spec.py, which kernels may not import; a test compares them.
PARAMS = ("objective", "clip_low", "clip_high", "dual_clip", "kl", "kl_coef", "entropy_coef")
METRICS = (
    "tokens",
    "policy_loss",
    "kl_loss",
    "entropy_loss",
    "logprob_sum",
    "entropy_sum",
    "kl_k1_sum",
    "kl_k3_sum",
    "old_kl_sum",
    "ratio_sum",
    "ratio_sq_sum",
    "ratio_min",
    "ratio_max",
    "clip_low",
    "clip_high",
    "dual_clip",
    "zero_advantage",
    "nan_old",
    "nan_ref",
)
OBJECTIVES = ("reinforce", "clip")
KLS = ("k1", "k2", "k3")

_METRICS = tl.constexpr(len(METRICS))
_ROW = tl.constexpr(triton.next_power_of_2(len(METRICS)))  # one program's partial sums
_FIRST_LOSS = tl.constexpr(METRICS.index("policy_loss"))
_LAST_LOSS = tl.constexpr(METRICS.index("entropy_loss"))
_RATIO_MIN = tl.constexpr(METRICS.index("ratio_min"))
_RATIO_MAX = tl.constexpr(METRICS.index("ratio_max"))
_REINFORCE = tl.constexpr(OBJECTIVES.index("reinforce"))
_K1 = tl.constexpr(KLS.index("k1"))
_K2 = tl.constexpr(KLS.index("k2"))


@triton.jit
def _policy_term(logp, ratio, A, low, high, dual, OBJECTIVE: tl.constexpr, HAS_DUAL: tl.constexpr):
    """Policy loss, its gradient by logp, and where the low, high and dual clips act."""
    never = tl.zeros(A.shape, tl.int1)
    if OBJECTIVE == _REINFORCE:
        loss = -A * logp
        grad = -A
        clip_low, clip_high, clip_dual = never, never, never
    else:
        # where instead of minimum: nan stays visible.
        clamped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        surrogate, clipped = ratio * A, clamped * A
        clip_low = (A < 0) & (ratio < low)
        clip_high = (A > 0) & (ratio > high)
        clip_dual = never
        loss = -tl.where(clipped < surrogate, clipped, surrogate)
        grad = tl.where(clip_low | clip_high, 0.0, -surrogate)
        if HAS_DUAL:
            cap = -dual * A
            clip_dual = (A < 0) & (-surrogate > cap)
            # At an exact tie torch.minimum hands each side half of the gradient.
            tie = (A < 0) & (loss == cap)
            grad = tl.where((A < 0) & (loss > cap), 0.0, tl.where(tie, 0.5 * grad, grad))
            loss = tl.where((A < 0) & (loss > cap), cap, loss)
    return loss, grad, clip_low, clip_high, clip_dual


@triton.jit
def _k3(d):
    return tl.exp(d) - d - 1.0


@triton.jit
def _kl_term(d, KL: tl.constexpr):
    """KL estimate with d = ref - logp, and its gradient by logp."""
    if KL == _K1:
        kl, grad = -d, tl.full(d.shape, 1.0, tl.float64)
    elif KL == _K2:
        kl, grad = 0.5 * d * d, -d
    else:
        kl, grad = _k3(d), 1.0 - tl.exp(d)
    return kl, grad


@triton.jit
def _count(where):
    return tl.sum(tl.where(where, 1.0, 0.0).to(tl.float64), axis=0)


@triton.jit
def _load(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _objective_kernel(
    logprob_ptr,
    entropy_ptr,
    old_ptr,
    ref_ptr,
    advantage_ptr,
    weight_ptr,
    keep_ptr,
    loss_ptr,
    c_ptr,
    h_ptr,
    metrics_ptr,
    partial_ptr,
    counter_ptr,
    T,
    low: tl.float64,
    high: tl.float64,
    dual: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    OBJECTIVE: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    KL: tl.constexpr,
    HAS_KL: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """BLOCK tokens a program; the program that finishes last adds everyone's partial sums, in
    program order, so the result does not depend on the schedule."""
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = t < T
    # Selection by mask: what an unkept token holds is never read.
    keep = tl.load(keep_ptr + t, mask=inside, other=0).to(tl.int1) & inside
    logp = _load(logprob_ptr, t, keep)
    A = _load(advantage_ptr, t, keep)
    weight = _load(weight_ptr, t, keep)
    zero = tl.zeros([BLOCK], tl.float64)

    delta = zero
    nan_old = tl.zeros([BLOCK], tl.int1)
    if HAS_OLD:
        old = _load(old_ptr, t, keep)
        nan_old = keep & (old != old)
        delta = tl.where(old != old, 0.0, logp - old)
    ratio = tl.exp(delta)
    policy, c, clip_low, clip_high, clip_dual = _policy_term(
        logp, ratio, A, low, high, dual, OBJECTIVE, HAS_DUAL
    )

    d = zero
    kl = zero
    nan_ref = tl.zeros([BLOCK], tl.int1)
    if HAS_REF:
        ref = _load(ref_ptr, t, keep)
        nan_ref = keep & (ref != ref)
        d = tl.where(ref != ref, 0.0, ref - logp)
        if HAS_KL:
            kl, kl_grad = _kl_term(d, KL)
            kl = tl.where(nan_ref, 0.0, kl_coef * kl)
            c += tl.where(nan_ref, 0.0, kl_coef * kl_grad)

    entropy = zero
    bonus = zero
    h = zero
    if HAS_ENTROPY:
        entropy = _load(entropy_ptr, t, keep)
    if HAS_BONUS:
        bonus = -entropy_coef * entropy
        h = tl.where(keep, -entropy_coef * weight, 0.0)
    c = tl.where(keep, weight * c, 0.0)
    tl.store(c_ptr + t, c.to(tl.float32), mask=inside)
    tl.store(h_ptr + t, h.to(tl.float32), mask=inside)

    kept_ratio = tl.where(keep, ratio, 0.0)
    sums = (  # in the order of METRICS
        _count(keep),
        tl.sum(tl.where(keep, weight * policy, 0.0), axis=0),
        tl.sum(tl.where(keep, weight * kl, 0.0), axis=0),
        tl.sum(tl.where(keep, weight * bonus, 0.0), axis=0),
        tl.sum(logp, axis=0),
        tl.sum(entropy, axis=0),
        tl.sum(tl.where(keep, -d, 0.0), axis=0),
        tl.sum(tl.where(keep, _k3(d), 0.0), axis=0),
        tl.sum(tl.where(keep, _k3(-delta), 0.0), axis=0),
        tl.sum(kept_ratio, axis=0),
        tl.sum(kept_ratio * kept_ratio, axis=0),
        tl.min(tl.where(keep, ratio, float("inf")), axis=0),
        tl.max(tl.where(keep, ratio, -float("inf")), axis=0),
        _count(keep & clip_low),
        _count(keep & clip_high),
        _count(keep & clip_dual),
        _count(keep & (A == 0)),
        _count(nan_old),
        _count(nan_ref),
    )
    row_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * _ROW
    for i in tl.static_range(_METRICS):
        tl.store(row_ptr + i, sums[i])

    tl.debug_barrier()  # every thread's partial sums before this program counts itself done
    finished = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    programs = tl.num_programs(0)
    if finished == programs - 1:
        _add_partials(partial_ptr, programs, loss_ptr, metrics_ptr, ROWS)
        tl.store(counter_ptr, 0)  # ready for the next launch


@triton.jit
def _add_partials(partial_ptr, programs, loss_ptr, metrics_ptr, ROWS: tl.constexpr):
    metric = tl.arange(0, _ROW)
    total = tl.zeros([_ROW], tl.float64)
    lowest = tl.full([_ROW], float("inf"), tl.float64)
    highest = tl.full([_ROW], -float("inf"), tl.float64)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (metric < _METRICS)[None, :]
        # .cg reads the L2, where the other programs' stores are.
        part = tl.load(
            partial_ptr + row[:, None].to(tl.int64) * _ROW + metric[None, :],
            mask=mask,
            other=0.0,
            cache_modifier=".cg",
        )
        total += tl.sum(part, axis=0)
        lowest = tl.minimum(lowest, tl.min(tl.where(mask, part, float("inf")), axis=0))
        highest = tl.maximum(highest, tl.max(tl.where(mask, part, -float("inf")), axis=0))
    total = tl.where(metric == _RATIO_MIN, lowest, tl.where(metric == _RATIO_MAX, highest, total))
    tl.store(metrics_ptr + metric, total, mask=metric < _METRICS)
    is_loss = (metric >= _FIRST_LOSS) & (metric <= _LAST_LOSS)
    loss = tl.sum(tl.where(is_loss, total, 0.0), axis=0)
    tl.store(loss_ptr, loss.to(tl.float32))


def objective_terms(
    logprob: Tensor,
    entropy: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    keep: Tensor,
    params: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss = sum over kept t of weight (policy + kl_coef KL - entropy_coef entropy), fp32 0-d;
    c = dloss/dlogprob and h = dloss/dentropy, fp32 [T]; metrics, float64 [len(METRICS)].

    Vectors fp32 [T], keep bool [T], params the float64 CPU vector in the order of PARAMS. With
    delta = logprob - old (0, with gradient, where old is None or NaN), r = exp(delta) and
    d = ref - logprob (no KL where ref is None or NaN):

        reinforce  -A logprob       clip  -min(r A, clamp(r, 1 - clip_low, 1 + clip_high) A),
                                          at most -dual_clip A where A < 0 and dual_clip > 0
        k1  -d      k2  d^2 / 2     k3    exp(d) - d - 1

    An unkept token adds nothing, whatever it holds. Deterministic; nothing waits for the device.
    ValueError for a bonus without entropies, or another dtype, shape or stride.
    """
    T = logprob.numel()
    require(torch.float32, (T,), logprob=logprob, entropy=entropy, old=old, ref=ref)
    require(torch.float32, (T,), advantage=advantage, weight=weight)
    require(torch.bool, (T,), keep=keep)
    p = dict(zip(PARAMS, params.tolist(), strict=True))
    if p["entropy_coef"] != 0 and entropy is None:
        raise ValueError(f"entropy_coef={p['entropy_coef']!r} needs entropy, got None")
    c, h = torch.empty_like(logprob), torch.empty_like(logprob)
    loss = logprob.new_empty(())
    metrics = logprob.new_empty(len(METRICS), dtype=torch.float64)
    programs = max(1, triton.cdiv(T, OBJECTIVE.block))  # one even for T = 0: it writes the metrics
    partial = logprob.new_empty(programs * _ROW.value, dtype=torch.float64)
    with torch.cuda.device_of(logprob):
        _objective_kernel[(programs,)](
            logprob,
            entropy,
            old,
            ref,
            advantage,
            weight,
            keep,
            loss,
            c,
            h,
            metrics,
            partial,
            _counter(logprob.device),
            T,
            1 - p["clip_low"],
            1 + p["clip_high"],
            p["dual_clip"],
            p["kl_coef"],
            p["entropy_coef"],
            OBJECTIVE=int(p["objective"]),
            HAS_DUAL=p["dual_clip"] > 0,
            KL=int(p["kl"]),
            HAS_KL=p["kl_coef"] != 0,
            HAS_BONUS=p["entropy_coef"] != 0,
            HAS_ENTROPY=entropy is not None,
            HAS_OLD=old is not None,
            HAS_REF=ref is not None,
            BLOCK=OBJECTIVE.block,
            ROWS=OBJECTIVE_ROWS,
            num_warps=OBJECTIVE.warps,
            enable_fp_fusion=True,
        )
    return loss, c, h, metrics


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """A zeroed int32 that the kernel leaves zeroed: clearing one per call would be a second launch.

    One per stream, as launches of different streams overlap. A CUDA graph gets its own, whose
    clearing is captured: memory of a capture's pool must not outlive it in the cache.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]
