"""The policy objective on [T]: loss, its two gradients and all metrics in one launch.

Arithmetic is float64: the vectors are short, and ratios next to a clip bound fall on the same side
as in the oracle. Where the tokens of a sequence depend on each other, one program owns the sequence
and sweeps over it: what they share, every token's terms, the gradient that flows to all of them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import objective_terms as known
from .checks import require
from .objective_blocks import Numbers, Pointers, Sequence, read, sequence, terms
from .objective_sums import METRICS, ROW, add_rows, merged, no_sums, store_row
from .objective_terms import GMPO, SEQUENCE, Options
from .tuning import OBJECTIVE, OBJECTIVE_REGISTERS, OBJECTIVE_ROWS, SEQUENCE_OBJECTIVE

#: The layout of pyrl/ops/spec.py, which kernels may not import; a test compares them.
PARAMS = (
    "objective",
    "ratio_level",
    "clip_low",
    "clip_high",
    "dual_clip",
    "delta",
    "cispo_low",
    "cispo_high",
    "sapo_tau_pos",
    "sapo_tau_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "dppo_divergence",
    "dppo_low",
    "dppo_high",
    "kl",
    "kl_coef",
    "kl_ratio_weighted",
    "kl_clamp",
    "entropy_coef",
    "correction",
    "correction_level",
    "correction_low",
    "correction_high",
    "off_policy_threshold",
)


@triton.jit
def _program(program, p, n, options, bounds_ptr, c_ptr, h_ptr, T, B, BLOCK: tl.constexpr):
    """Stores the gradients of one program's tokens and returns its sums [BLOCK]: without bounds
    BLOCK tokens, with bounds [B + 1] one sequence."""
    if bounds_ptr is None:
        t = program * BLOCK + tl.arange(0, BLOCK)
        nothing = Sequence(0.0, 0.0, 0.0, 0.0)
        direct, through, _, h, sums = terms(p, n, read(p, t, t < T), nothing, options)
        tl.store(c_ptr + t, (direct + through).to(tl.float32), mask=t < T)
        tl.store(h_ptr + t, h.to(tl.float32), mask=t < T)
    else:
        # In [0, T] whatever the bounds say: no launch can check them without waiting.
        begin = tl.maximum(tl.load(bounds_ptr + program, mask=program < B, other=0), 0)
        end = tl.minimum(tl.load(bounds_ptr + program + 1, mask=program < B, other=0), T)
        tokens, shared = sequence(p, n, begin, end, options, BLOCK)
        sums = no_sums(BLOCK)
        spread = tl.zeros([BLOCK], tl.float64)
        for start in range(begin, end, BLOCK):
            t = start + tl.arange(0, BLOCK)
            b = read(p, t, t < end)
            direct, through, _, h, metrics = terms(p, n, b, shared, options)
            sums = merged(sums, metrics)
            tl.store(h_ptr + t, h.to(tl.float32), mask=t < end)
            if options.ratio_level == SEQUENCE or options.objective == GMPO:
                spread += through
            else:
                tl.store(c_ptr + t, (direct + through).to(tl.float32), mask=t < end)
        if options.ratio_level == SEQUENCE or options.objective == GMPO:
            share = tl.sum(spread, axis=0) / tokens
            for start in range(begin, end, BLOCK):
                t = start + tl.arange(0, BLOCK)
                b = read(p, t, t < end)
                # Computed again: c as stored would be rounded twice.
                direct, _, bounded, _, _ = terms(p, n, b, shared, options)
                reached = b.keep & ~bounded if options.objective == GMPO else b.keep
                c = direct + tl.where(reached, share, 0.0)
                tl.store(c_ptr + t, c.to(tl.float32), mask=t < end)
    return sums


@triton.jit
def _objective_kernel(
    logprob_ptr,
    entropy_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    advantage_ptr,
    weight_ptr,
    keep_ptr,
    bounds_ptr,
    loss_ptr,
    c_ptr,
    h_ptr,
    metrics_ptr,
    partial_ptr,
    counter_ptr,
    T,
    B,
    x0: tl.float64,
    x1: tl.float64,
    x2: tl.float64,
    x3: tl.float64,
    kl_coef: tl.float64,
    kl_clamp: tl.float64,
    entropy_coef: tl.float64,
    correction_low: tl.float64,
    correction_high: tl.float64,
    off_policy_threshold: tl.float64,
    objective: tl.constexpr,
    has_dual: tl.constexpr,
    has_delta: tl.constexpr,
    divergence: tl.constexpr,
    ratio_level: tl.constexpr,
    kl: tl.constexpr,
    kl_weighted: tl.constexpr,
    kl_clamped: tl.constexpr,
    bonus: tl.constexpr,
    correction: tl.constexpr,
    correction_level: tl.constexpr,
    off_policy: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The program that finishes last adds everyone's partial sums."""
    program = tl.program_id(0).to(tl.int64)
    # In one expression: an assignment would turn the options into run-time values.
    sums = _program(
        program,
        Pointers(
            logprob_ptr,
            entropy_ptr,
            old_ptr,
            ref_ptr,
            rollout_ptr,
            advantage_ptr,
            weight_ptr,
            keep_ptr,
        ),
        Numbers(
            (x0, x1, x2, x3),
            kl_coef,
            kl_clamp,
            entropy_coef,
            correction_low,
            correction_high,
            off_policy_threshold,
        ),
        Options(
            objective,
            has_dual,
            has_delta,
            divergence,
            ratio_level,
            kl,
            kl_weighted,
            kl_clamped,
            bonus,
            correction,
            correction_level,
            off_policy,
        ),
        bounds_ptr,
        c_ptr,
        h_ptr,
        T,
        B,
        BLOCK,
    )
    store_row(partial_ptr + program * ROW, sums)

    tl.debug_barrier()  # every thread's partial sums before this program counts itself done
    finished = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    programs = tl.num_programs(0)
    if finished == programs - 1:
        add_rows(partial_ptr, programs, loss_ptr, metrics_ptr, ROWS)
        tl.store(counter_ptr, 0)  # ready for the next launch


def _index(p: dict[str, float], param: str, names: tuple[str, ...]) -> int:
    if p[param] not in range(len(names)):
        raise NotImplementedError(
            f"backend 'triton': {param} number {p[param]:g} is none of {list(names)}"
        )
    return int(p[param])


def _options(
    p: dict[str, float], entropy: Tensor | None, ref: Tensor | None, rollout: Tensor | None
) -> Options:
    """What these params compile to; an option that is off looks the same whatever its numbers."""
    objective = _index(p, "objective", known.OBJECTIVES)
    ratio_level = _index(p, "ratio_level", known.RATIO_LEVELS)
    correction = _index(p, "correction", known.CORRECTIONS)
    correction_level = _index(p, "correction_level", known.CORRECTION_LEVELS)
    divergence = _index(p, "dppo_divergence", known.DIVERGENCES)
    kl = _index(p, "kl", known.KLS)
    if p["entropy_coef"] != 0 and entropy is None:
        raise ValueError(f"entropy_coef={p['entropy_coef']!r} needs entropy, got None")
    is_clip = known.OBJECTIVES[objective] == "clip"
    has_kl = p["kl_coef"] != 0 and ref is not None
    corrects = correction != 0 and rollout is not None
    return Options(
        objective=objective,
        has_dual=is_clip and math.isfinite(p["dual_clip"]),
        has_delta=is_clip and math.isfinite(p["delta"]),
        divergence=divergence if known.OBJECTIVES[objective] == "dppo" else None,
        ratio_level=ratio_level,
        kl=kl if has_kl else None,
        kl_weighted=has_kl and p["kl_ratio_weighted"] != 0,
        kl_clamped=has_kl and math.isfinite(p["kl_clamp"]),
        bonus=p["entropy_coef"] != 0,
        correction=correction if corrects else None,
        correction_level=correction_level if corrects else 0,
        off_policy=math.isfinite(p["off_policy_threshold"]),
    )


def objective_terms(
    logprob: Tensor,
    entropy: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    keep: Tensor,
    bounds: Tensor | None,
    params: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss = sum over kept t of weight (correction policy + kl_coef KL - entropy_coef entropy),
    fp32 0-d; c = dloss/dlogprob and h = dloss/dentropy, fp32 [T]; metrics, float64 [len(METRICS)].

    Vectors fp32 [T], keep bool [T], params the float64 CPU vector in the order of PARAMS, an absent
    bound infinite; bounds int64 [B + 1] from 0 to T, without which no option may couple the tokens
    of a sequence. The formulas stand at their functions in kernels/objective_terms.py. old None or
    NaN at t: ratio 1, with gradient; ref None or NaN: no KL; rollout None or NaN: correction 1.

    An unkept token adds nothing, whatever it holds. Deterministic; nothing waits for the device.
    ValueError for missing bounds, a bonus without entropies, or another dtype, shape or stride;
    NotImplementedError for an option whose number has no name here.
    """
    T = logprob.numel()
    require(torch.float32, (T,), logprob=logprob, entropy=entropy, old=old, ref=ref)
    require(torch.float32, (T,), rollout=rollout, advantage=advantage, weight=weight)
    require(torch.bool, (T,), keep=keep)
    p = dict(zip(PARAMS, params.tolist(), strict=True))
    options = _options(p, entropy, ref, rollout)
    objective = known.OBJECTIVES[options.objective]
    if bounds is None:
        if (
            objective in ("gmpo", "vespo")
            or options.ratio_level
            or options.correction_level
            or options.off_policy
        ):
            raise ValueError(
                "this loss couples the tokens of a sequence: bounds expected, got None"
            )
        tile, programs, B = OBJECTIVE, triton.cdiv(T, OBJECTIVE.block), 0
    else:
        B = bounds.numel() - 1
        require(torch.int64, (max(B, 0) + 1,), bounds=bounds)
        tile, programs = SEQUENCE_OBJECTIVE, B
    programs = max(1, programs)  # one even for T = 0: it writes the metrics
    x = [p[name] for name in known.NUMBERS[objective]]
    c, h = torch.empty_like(logprob), torch.empty_like(logprob)
    loss = logprob.new_empty(())
    metrics = logprob.new_empty(len(METRICS), dtype=torch.float64)
    partial = logprob.new_empty(programs * ROW.value, dtype=torch.float64)
    with torch.cuda.device_of(logprob):
        _objective_kernel[(programs,)](
            logprob,
            entropy,
            old,
            ref,
            rollout,
            advantage,
            weight,
            keep,
            bounds,
            loss,
            c,
            h,
            metrics,
            partial,
            _counter(logprob.device),
            T,
            B,
            *x,
            *[0.0] * (4 - len(x)),
            p["kl_coef"],
            p["kl_clamp"],
            p["entropy_coef"],
            p["correction_low"],
            p["correction_high"],
            p["off_policy_threshold"],
            **options._asdict(),
            BLOCK=tile.block,
            ROWS=OBJECTIVE_ROWS,
            num_warps=tile.warps,
            maxnreg=OBJECTIVE_REGISTERS,
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
