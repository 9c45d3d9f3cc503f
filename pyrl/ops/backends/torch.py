"""Plain torch, any device: the baseline every other backend is measured against.

It has no `objective_terms`: pyrl/ops/objective.py runs as it stands, under autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrl.ops.support import span_entries


def unavailable_reason() -> str | None:
    """None if usable here, else why not."""
    return None


def _scaled(
    z: Tensor, inv_temperature: Tensor, logit_scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """fp32 softmax inputs x and dx/dz of raw logits z, inv_temperature broadcast against them."""
    x = z.float() * logit_scale
    slope = inv_temperature * logit_scale
    if softcap > 0:
        squashed = torch.tanh(x / softcap)
        x, slope = softcap * squashed, slope * (1 - squashed.square())
    return x * inv_temperature, slope


def logits_stats(
    z: Tensor,
    target: Tensor,
    inv_temperature: Tensor,
    logit_scale: float,
    softcap: float,
    spans: Tensor | None = None,
    ids: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.logits_stats`."""
    if spans is not None and ids is not None:
        n = target.numel()
        row, token = _entries(spans, ids)
        at = torch.arange(n, device=z.device) if rows is None else rows
        x, _ = _scaled(z[at[row], token], inv_temperature[row], logit_scale, softcap)
        chosen, _ = _scaled(z[at, target], inv_temperature, logit_scale, softcap)
        top = x.new_full((n,), -torch.inf).scatter_reduce_(0, row, x, "amax")
        top = torch.where(top > -torch.inf, top, 0.0)
        lse = top + x.new_zeros(n).index_add_(0, row, (x - top[row]).exp()).log()
        plogp = _plogp(x, lse[row])
        entropy = -x.new_zeros(n).index_add_(0, row, plogp)
    else:
        z = z if rows is None else z[rows]
        x, _ = _scaled(z, inv_temperature[:, None], logit_scale, softcap)
        chosen = x.gather(1, target[:, None])[:, 0]
        lse = torch.logsumexp(x, dim=1)
        entropy = -_plogp(x, lse[:, None]).sum(dim=1)
    return torch.where(lse > -torch.inf, chosen - lse, -torch.inf), entropy, lse


def _plogp(x: Tensor, lse: Tensor) -> Tensor:
    p = torch.where(x > -torch.inf, (x - lse).exp(), 0.0)
    return torch.where(p > 0, p * (x - lse), 0.0)


def _entries(spans: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Row and token id of every entry of the rows' supports."""
    row, position = span_entries(spans[:, 0], spans[:, 1] - spans[:, 0])
    return row, ids[position].long()


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
    spans: Tensor | None = None,
    ids: Tensor | None = None,
    rows: Tensor | None = None,
    source: Tensor | None = None,
) -> None:
    """See `Backend.logits_grad_`."""
    raw = z if source is None else source
    used = (c != 0) | (h != 0) if g is None else (c != 0) | (h != 0) | (g != 0)
    through_lse = -c if g is None else g - c
    written = rows if source is None else None
    if spans is not None and ids is not None:
        row, token = _entries(torch.where(used[:, None], spans, 0), ids)
        x, slope = _scaled(
            raw[row if rows is None else rows[row], token], inv_temperature[row], logit_scale,
            softcap,
        )  # fmt: skip
        dx = _softmax_dx(x, lse[row], entropy[row], through_lse[row], h[row])
        dz = ((dx + torch.where(token == target[row], c[row], 0.0)) * slope).to(z.dtype)
        if written is None:
            z.zero_()[row, token] = dz
        else:
            z.index_fill_(0, written, 0.0)[written[row], token] = dz
        return
    x, slope = _scaled(
        raw if rows is None else raw[rows], inv_temperature[:, None], logit_scale, softcap
    )
    dx = _softmax_dx(x, *(v[:, None] for v in (lse, entropy, through_lse, h)))
    dx.scatter_add_(1, target[:, None], c[:, None])
    dz = torch.where(used[:, None], dx * slope, 0.0)
    if written is None:
        z.copy_(dz)
    else:
        z[written] = dz.to(z.dtype)


def _softmax_dx(x: Tensor, lse: Tensor, entropy: Tensor, through_lse: Tensor, h: Tensor) -> Tensor:
    """p (g - c) - h p (log p + entropy): dL/dx but for the target's own c."""
    logp = x - lse
    p = torch.where(x > -torch.inf, logp.exp(), 0.0)
    surprise = torch.where(p > 0, logp + entropy, 0.0)
    return through_lse * p - h * p * surprise


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
