"""Plain torch, any device: the baseline every other backend is measured against.

It has no `objective_terms`: pyrl/ops/objective.py runs as it stands, under autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unavailable_reason() -> str | None:
    """None if usable here, else why not."""
    return None


def _scaled(
    z: Tensor, inv_temperature: Tensor, logit_scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """fp32 softmax inputs x[n, V] and dx/dz[n, V or 1] of raw logits z[n, V]."""
    x = z.float() * logit_scale
    slope = inv_temperature[:, None] * logit_scale
    if softcap > 0:
        squashed = torch.tanh(x / softcap)
        x, slope = softcap * squashed, slope * (1 - squashed.square())
    return x * inv_temperature[:, None], slope


def logits_stats(
    z: Tensor, target: Tensor, inv_temperature: Tensor, logit_scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.logits_stats`."""
    x, _ = _scaled(z, inv_temperature, logit_scale, softcap)
    lse = torch.logsumexp(x, dim=1)
    p = torch.where(x > -torch.inf, (x - lse[:, None]).exp(), 0.0)
    plogp = torch.where(p > 0, p * (x - lse[:, None]), 0.0)
    logprob = torch.where(lse > -torch.inf, x.gather(1, target[:, None])[:, 0] - lse, -torch.inf)
    return logprob, -plogp.sum(dim=1), lse


def logits_grad_(
    z: Tensor,
    target: Tensor,
    inv_temperature: Tensor,
    logit_scale: float,
    softcap: float,
    lse: Tensor,
    entropy: Tensor,
    c: Tensor,
    h: Tensor,
    g: Tensor | None,
) -> None:
    """See `Backend.logits_grad_`."""
    x, slope = _scaled(z, inv_temperature, logit_scale, softcap)
    logp = x - lse[:, None]
    p = torch.where(x > -torch.inf, logp.exp(), 0.0)
    surprise = torch.where(p > 0, logp + entropy[:, None], 0.0)
    through_lse = -c if g is None else g - c
    dx = through_lse[:, None] * p - h[:, None] * p * surprise
    dx.scatter_add_(1, target[:, None], c[:, None])
    used = (c != 0) | (h != 0) if g is None else (c != 0) | (h != 0) | (g != 0)
    z.copy_(torch.where(used[:, None], dx * slope, 0.0))


def group_advantage_terms(
    rewards: Tensor, order: Tensor, offsets: Tensor, method: int, unbiased: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.group_advantage_terms`."""
    n = rewards.numel()
    group = torch.empty_like(order)
    group[order] = torch.searchsorted(offsets[1:], torch.arange(n, device=order.device), right=True)
    scored = ~rewards.isnan()
    r = torch.where(scored, rewards, 0.0)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(n, dtype=values.dtype, device=r.device).index_add_(0, group, values)

    def extreme(how: str, start: float) -> Tensor:
        filled = torch.where(scored, rewards, start)
        return torch.full_like(r, start).scatter_reduce_(0, group, filled, how)[group]

    count = total(scored.to(r.dtype))[group]
    mean = total(r)[group] / count.clamp(min=1)
    alone = count <= 1
    low, high = extreme("amin", torch.inf), extreme("amax", -torch.inf)
    centred = torch.where(alone, r, r - mean)
    if method == 0:
        squares = total(torch.where(scored, r - mean, 0.0).square())[group]
        std = (squares / (count - int(unbiased)).clamp(min=1)).sqrt()
        # Equal rewards have no spread: rounding of the mean must not be divided by eps.
        centred = torch.where((low == high) & ~alone, 0.0, centred)
        advantages = centred / (torch.where(alone, 1.0, std) + eps)
    elif method == 1:
        advantages = torch.where((low == high) & ~alone, 0.0, centred)
    elif method == 2:
        advantages = torch.where(alone, 0.0, (r - mean) * count / (count - 1).clamp(min=1))
        advantages = torch.where(low == high, 0.0, advantages)
    elif method == 3:
        advantages = (r == high).to(r.dtype)
    else:
        advantages = r
    nan = torch.full_like(r, torch.nan)
    return (
        torch.where(scored, advantages, 0.0),
        torch.where(scored, low, nan),
        torch.where(scored, high, nan),
    )
