"""The value loss of an actor-critic: squared error against returns, clipped around old values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrl.ops.backend import select_formula
from pyrl.ops.policy_objective import PolicyLoss
from pyrl.ops.shapes import check_finite, flat_float, layout, token_weights
from pyrl.ops.spec import Aggregation, LossSpec


def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregation: Aggregation = "token_mean",
    max_length: int | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """sum_t weight_t 0.5 max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2).

    Without `clip`, 0.5 (V - R)^2. values, returns, old_values [T] with `cu_seqlens` [B + 1], or
    [B, L] with `mask` (true = the token counts) · clip > 0 with old_values, the values that the
    returns were estimated with · aggregation, max_length, weights and denominator make weight_t as
    in `LossSpec` and `policy_objective`.

    Differentiable in values; at a tie of the two squares each has half the gradient (torch's
    maximum). metrics, sums and counts: tokens, value_loss, clipped (the clipped square is the
    greater), value_sum, return_sum, return_sq_sum, error_sum and error_sq_sum of R - V: explained
    variance is 1 - var(error) / var(return). backend: torch or reference (float64).
    ValueError names a wrong shape, device, option or (on the CPU) a kept return or old value that
    is not finite. Source: PPO's critic, arXiv 1707.06347 and 2005.12729.
    """
    if not values.is_floating_point():
        raise ValueError(f"values: expected a floating dtype, got {values.dtype}")
    if (clip is None) != (old_values is None):
        missing = "old_values" if old_values is None else "clip"
        raise ValueError(f"clip={clip!r}: clip and old_values go together, {missing} is missing")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip={clip!r}: expected a finite number > 0")
    name = select_formula(backend, values.device, "value_loss")
    where = layout(values, mask, cu_seqlens)
    target, old = flat_float("returns", returns, where), flat_float("old_values", old_values, where)
    assert target is not None
    check_finite("returns", target, where.keep)
    spec = LossSpec(aggregation=aggregation, max_length=max_length)
    weight = token_weights(spec, where, weights, denominator)

    dtype = torch.float64 if name == "reference" else torch.float32
    # Selected before any arithmetic: what an unkept token holds does not matter.
    v = torch.where(where.keep, values.reshape(-1).to(dtype), 0.0)
    r = torch.where(where.keep, target.to(dtype), 0.0)
    square = (v - r).square()
    clipped = torch.zeros_like(where.keep)
    if old is not None and clip is not None:
        check_finite("old_values", old, where.keep)
        centre = torch.where(where.keep, old.to(dtype), 0.0)
        bounded = (torch.clamp(v, centre - clip, centre + clip) - r).square()
        clipped = bounded > square
        square = torch.maximum(square, bounded)
    loss = 0.5 * (weight.to(dtype) * square).sum()

    with torch.no_grad():
        error, target = (r - v).double(), r.double()
        metrics = {
            "tokens": where.keep.sum().double(),
            "value_loss": 0.5 * (weight.double() * square.double()).sum(),
            "clipped": clipped.sum().double(),
            "value_sum": v.double().sum(),
            "return_sum": target.sum(),
            "return_sq_sum": target.square().sum(),
            "error_sum": error.sum(),
            "error_sq_sum": error.square().sum(),
        }
    return PolicyLoss(loss.float(), metrics)
