"""Plain torch, any device: the baseline every other backend is measured against.

It has no `objective_terms`: pyrl/ops/objective.py runs as it stands, under autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrl.ops.group_advantage import METHODS
from pyrl.ops.support import span_entries


def unavailable_reason() -> str | None:
    """None if usable here, else why not."""
    return None


def has_head_kernels(dtype: torch.dtype) -> bool:
    """See `Backend.has_head_kernels`."""
    return False


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
    rewards: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    method: int,
    unbiased: bool,
    eps: float,
    filters: int,
    drop: bool,
    offset: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.group_advantage_terms`. Sums run over segments of the sorted rewards, in an
    order that never changes (index_add on a GPU has none)."""
    name = METHODS[method]
    r = rewards if order is None else rewards[order]
    scored = ~r.isnan()
    positions = torch.arange(r.numel(), device=r.device)
    group = torch.searchsorted(offsets[1:].contiguous(), positions, right=True)

    def over(values: Tensor, how: str = "sum", empty: float = 0.0) -> Tensor:
        return torch.segment_reduce(values, how, offsets=offsets, initial=empty, unsafe=True)

    given = torch.where(scored, r, 0.0)
    size, count = offsets.diff().double(), over(scored.double())
    low = over(torch.where(scored, r, torch.inf), "min", torch.inf)
    high = over(torch.where(scored, r, -torch.inf), "max", -torch.inf)
    flat, alone = (count > 0) & (low == high), count == 1
    # Two passes: the deviations correct the rounding of the first mean. Equal rewards have none.
    mean = over(given) / count.clamp(min=1)
    deviation = torch.where(scored, r - mean[group], 0.0)
    shift = over(deviation) / count.clamp(min=1)
    mean = torch.where(flat, low, mean + shift)
    squares = torch.where(flat, 0.0, over(deviation.square()) - count * shift.square())

    filtered = torch.zeros_like(flat)
    if filters & 1:
        filtered |= (count > 0) & (low > 0)
    if filters & 2:
        filtered |= (count > 0) & (high <= 0)
    if filters & 4:
        filtered |= flat

    mapped = offset + scale * given
    value = torch.where(alone[group], mapped, scale * (given - mean[group]))
    if name in ("grpo", "scaled"):
        value = value if name == "grpo" else mapped
        std = abs(scale) * (squares / (count - int(unbiased)).clamp(min=1)).sqrt()
        std = torch.where(alone, 1.0, std)
        value = torch.where((flat & ~alone)[group], 0.0, value / (std + eps)[group])
    elif name == "rloo":
        factor = torch.where(alone, 0.0, count / (count - 1).clamp(min=1))
        value = value * factor[group]
    elif name == "positive":
        value = (given == (high if scale > 0 else low)[group]).double()
    elif name == "correct":
        value = (mapped > 0).double()
    elif name in ("raw", "whiten"):
        value = mapped

    gone = scored & filtered[group]
    keep = scored & ~gone if drop else scored
    if name in ("batch_std", "whiten", "whiten_baseline"):
        # A group's deviations from its own mean sum to exactly 0, unless the group is of one.
        summed = torch.where(alone[group], mapped, 0.0) if name == "whiten_baseline" else mapped
        value = _batch_scaled(
            value, value if name == "whiten_baseline" else mapped, summed, keep, unbiased, eps,
            centre=name != "batch_std",
        )  # fmt: skip
    advantages = torch.where(scored & ~gone, value, 0.0).float()
    sums = (
        size.sum(),
        (size > 0).sum(),
        flat.sum(),
        gone.sum(),
        (~scored).sum(),
        given.sum(),
        given.square().sum(),
        keep.sum(),
    )
    metrics = torch.stack([v.double() for v in sums])
    if order is None:
        return advantages, keep, metrics
    return (
        torch.empty_like(advantages).scatter_(0, order, advantages),
        torch.empty_like(keep).scatter_(0, order, keep),
        metrics,
    )


def _batch_scaled(
    value: Tensor,
    batch: Tensor,
    summed: Tensor,
    live: Tensor,
    unbiased: bool,
    eps: float,
    *,
    centre: bool,
) -> Tensor:
    """(value - mean) / (std + eps) with the moments of batch[live]; sum(summed) = sum(batch)."""
    count = live.sum()
    mean = torch.where(live, summed, 0.0).sum() / count.clamp(min=1)
    squares = torch.where(live, batch - mean, 0.0).square().sum()
    std = torch.where(count > 1, (squares / (count - int(unbiased)).clamp(min=1)).sqrt(), 1.0)
    low = torch.where(live, batch, torch.inf)
    high = torch.where(live, batch, -torch.inf)
    edge = batch.new_full((1,), torch.inf)  # extremes of nothing
    flat = (count > 1) & (torch.cat([low, edge]).min() == torch.cat([high, -edge]).max())
    shift = torch.where((count > 1) & centre, mean, 0.0)
    return torch.where(flat, 0.0, (value - shift) / (std + eps))


def gae_terms(
    rewards: Tensor,
    values: Tensor,
    keep: Tensor,
    bounds: Tensor,
    bootstrap: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """See `Backend.gae_terms`: log2(T) rounds over [T], whatever the lengths of the sequences.

    With u = gamma V' + gamma lam A' of the next kept token, A = r - V + u, and a kept token turns u
    into gamma lam u + gamma (1 - lam) V + gamma lam r. Round k composes these maps over 2^k tokens.
    """
    tokens = rewards.numel()
    if tokens == 0:
        return torch.empty_like(rewards), torch.empty_like(rewards)
    r, v = (torch.where(keep, x, 0.0).double() for x in (rewards, values))
    factor = torch.where(keep, torch.full_like(v, gamma * lam), 1.0)
    constant = gamma * (1 - lam) * v + gamma * lam * r
    # What token t sees: the map of token t + 1, or gamma bootstrap at the end of its sequence.
    positions = torch.arange(tokens, device=r.device)
    sequence = torch.searchsorted(bounds[1:].contiguous(), positions, right=True)
    last = bounds[1:][sequence] == positions + 1
    factor = torch.where(last, 0.0, factor.roll(-1))
    constant = torch.where(last, gamma * bootstrap.double()[sequence], constant.roll(-1))
    step = 1
    while step < tokens:
        c = factor[:-step]
        # Selected: beyond a sequence's end the factor is 0 and the next sequence may be infinite.
        add = torch.where(c != 0, c * constant[step:], 0.0)
        constant = torch.cat([constant[:-step] + add, constant[-step:]])
        factor = torch.cat([c * factor[step:], factor[-step:]])
        step *= 2
    advantages = torch.where(keep, r - v + constant, 0.0)
    returns = torch.where(keep, r + constant, 0.0)
    return advantages.float(), returns.float()
