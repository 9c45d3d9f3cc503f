"""The preference loss of (iterative) direct preference optimisation, over pairs of sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyrl.ops.backend import select_formula
from pyrl.ops.objective import Segments
from pyrl.ops.policy_objective import PolicyLoss
from pyrl.ops.shapes import check_denominator, check_finite, check_shape, flat_float, layout


def preference_loss(
    logprob: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    ref_logprob: Tensor | None = None,
    beta: float = 0.1,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """sum_p w_p (-(1 - s) log sigmoid(m_p) - s log sigmoid(-m_p)) / denominator, with the margin
    m_p = beta (D(chosen_p) - D(rejected_p)) and D(i) = the sum over the kept tokens of sequence i
    of logprob - ref_logprob.

    logprob, ref_logprob [T] with `cu_seqlens` [B + 1], or [B, L] with `mask` · chosen, rejected
    integers [P]: the sequences of each pair; a sequence may be in several, or in none · ref None:
    D sums logprob alone; a NaN ref leaves its token out, counted · s = label_smoothing in [0, 0.5)
    · weights [P], 1 by default · denominator: the weight of all pairs of the optimizer step
    (clamped to >= 1), by default sum w.

    Differentiable in logprob. metrics, sums and counts: tokens, pairs, pair_weight,
    preference_loss, accurate (pairs with m > 0; accuracy is accurate / pairs), margin_sum,
    margin_sq_sum, chosen_sum and rejected_sum of beta D, nan_ref. backend: torch or reference
    (float64). ValueError names a wrong shape, option or (on the CPU) a sequence that is not in the
    batch. Sources: DPO arXiv 2305.18290, iterative DPO 2312.11456, smoothing: conservative DPO of
    the same authors as DPO.
    """
    if not logprob.is_floating_point():
        raise ValueError(f"logprob: expected a floating dtype, got {logprob.dtype}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta!r}: expected a finite number > 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing!r}: expected a number in [0, 0.5)")
    name = select_formula(backend, logprob.device, "preference_loss")
    where = layout(logprob, mask, cu_seqlens)
    if where.cu_seqlens is None or where.sequences is None:
        raise ValueError("preference_loss on packed [T] needs cu_seqlens")
    pairs = chosen.numel()
    for side, index in (("chosen", chosen), ("rejected", rejected)):
        _check_index(side, index, pairs, where.sequences, logprob.device)
    chosen, rejected = chosen.long(), rejected.long()  # uint8 would select as a mask
    ref = flat_float("ref_logprob", ref_logprob, where)

    dtype = torch.float64 if name == "reference" else torch.float32
    kept = where.keep if ref is None else where.keep & ~ref.isnan()
    gap = torch.where(kept, logprob.reshape(-1).to(dtype), 0.0)
    if ref is not None:
        gap = gap - torch.where(kept, ref.to(dtype), 0.0)
    # Summed in float64: a margin is a small difference of two long sums.
    ids = Segments(where.cu_seqlens, kept).ids
    score = gap.new_zeros(where.sequences, dtype=torch.float64).index_add(0, ids, gap.double())
    better, worse = beta * score[chosen], beta * score[rejected]
    margin = better - worse
    each = -(1 - label_smoothing) * logsigmoid(margin)
    if label_smoothing:
        each = each - label_smoothing * logsigmoid(-margin)
    w, total = _weights(weights, denominator, margin)
    loss = (w / total * each).sum()

    with torch.no_grad():
        metrics = {
            "tokens": kept.sum().double(),
            "pairs": torch.full_like(total, pairs),
            "pair_weight": w.sum(),
            "preference_loss": loss.detach().clone(),
            "accurate": (margin > 0).sum().double(),
            "margin_sum": margin.sum(),
            "margin_sq_sum": margin.square().sum(),
            "chosen_sum": better.sum(),
            "rejected_sum": worse.sum(),
            "nan_ref": (where.keep & ~kept).sum().double(),
        }
    return PolicyLoss(loss.float(), metrics)


def _check_index(
    name: str, index: Tensor, pairs: int, sequences: int, device: torch.device
) -> None:
    if index.is_floating_point() or index.dtype == torch.bool or index.dim() != 1:
        raise ValueError(f"{name}: expected integers [P], got {index.dtype} {tuple(index.shape)}")
    check_shape(name, index, (pairs,), device)
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ((index < 0) | (index >= sequences)).nonzero()
        if bad.numel():
            i = int(bad[0])
            raise ValueError(
                f"{name}[{i}] = {int(index[i])}: expected a sequence in [0, {sequences})"
            )


def _weights(
    weights: Tensor | None, denominator: float | Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """float64 weights [P] and what divides them (0-d)."""
    if weights is None:
        w = torch.ones_like(like)
    else:
        check_shape("weights", weights, like.shape, like.device)
        w = weights.detach().double()
        check_finite("weights", w, torch.ones_like(w, dtype=torch.bool))
    if denominator is None:
        total = w.sum()
        return w, torch.where(total == 0, 1.0, total)
    return w, check_denominator(denominator, like.device).clamp(min=1)
