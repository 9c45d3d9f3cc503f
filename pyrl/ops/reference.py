"""The float64 oracle: what every backend must compute, written to be read beside the papers.

Differentiable through plain autograd, no chunks, no tricks; it does build `[T, V]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    inv_temperature: Tensor,
    softcap: float,
    logit_scale: float,
    keep: Tensor,
    indptr: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log_softmax(softcap(hidden @ weight.T + bias) / T).gather(target), entropy, logsumexp.

    hidden [T, D], weight [V, D], target [T], keep [T] bool, and a support (indptr [T + 1], ids
    [nnz]) that softmax runs over → three float64 [T], 0 where not kept.
    """
    hidden = torch.where(keep[:, None], hidden, 0.0)  # 0 * NaN in the gradient of weight is NaN
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    return logits_logprob(z, target, inv_temperature, softcap, logit_scale, keep, indptr, ids)


def logits_logprob(
    logits: Tensor,
    target: Tensor,
    inv_temperature: Tensor,
    softcap: float,
    logit_scale: float,
    keep: Tensor,
    indptr: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of logits [T, V] that are at hand."""
    z = logits.double() * logit_scale
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    z = z * inv_temperature.double()[:, None]
    z = torch.where(keep[:, None], z, 0.0)  # nothing of an unkept row reaches a gradient
    chosen = z.gather(1, torch.where(keep, target, 0)[:, None])[:, 0]
    if indptr is not None and ids is not None:
        z = restrict(z, indptr, ids, keep)
    lse = z.logsumexp(dim=1)
    logp = z - lse[:, None]
    p = logp.exp()
    entropy = -torch.where(p > 0, p * torch.where(p > 0, logp, 0.0), 0.0).sum(dim=1)
    outputs = [torch.where(keep, v, 0.0) for v in (chosen - lse, entropy, lse)]
    return outputs[0], outputs[1], outputs[2]


def restrict(z: Tensor, indptr: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    """z[t, S_t] of z [T, V] as [T, max |S|], the shorter rows filled up with -inf."""
    sizes = torch.where(keep, indptr.diff(), 0)
    k = torch.arange(max([1, *sizes.tolist()]), device=z.device)
    inside = k < sizes[:, None]
    position = torch.where(inside, indptr[:-1, None] + k, 0)
    token = torch.where(inside, torch.nn.functional.pad(ids, (0, 1)).long()[position], 0)
    return torch.where(inside, z.gather(1, token), torch.where(keep, -torch.inf, 0.0)[:, None])


def group_advantage(
    rewards: Tensor,
    group_ids: Tensor,
    method: str,
    unbiased: bool,
    eps: float,
    filters: int,
    drop: bool,
    offset: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages float64 [n], keep bool [n] and metrics float64, one group at a time.

    rewards [n], group_ids [n] any integers; see pyrl/ops/group_advantage.py. `filters`: bits 1
    every r > 0, 2 every r <= 0, 4 all equal.
    """
    given = rewards.double()
    scored, r = ~given.isnan(), offset + scale * given
    x, filtered = torch.zeros_like(r), torch.zeros_like(scored)
    flat = 0
    for group in group_ids.unique():
        member = (group_ids == group) & scored
        if not member.any():
            continue
        g, low, high = r[member], given[member].min(), given[member].max()
        flat += int(low == high)
        reasons = (low > 0, high <= 0, low == high)
        filtered[member] = any(bool(reason) for i, reason in enumerate(reasons) if filters >> i & 1)
        alone = g.numel() == 1
        # A group of one has mean 0 and std 1; equal rewards deviate by exactly 0 from their mean.
        mean = torch.zeros_like(g) if alone else g if low == high else g.mean()
        if method in ("grpo", "scaled"):
            std = 1.0 if alone else g.std(correction=int(unbiased))
            above = g - mean if method == "grpo" else g
            flat_group = not alone and bool(low == high)
            x[member] = torch.zeros_like(g) if flat_group else above / (std + eps)
        elif method == "rloo":
            others = (g.sum() - g) / max(g.numel() - 1, 1)
            x[member] = 0.0 if alone or low == high else g - others
        elif method in ("mean", "batch_std", "whiten_baseline"):
            x[member] = g - mean
        elif method == "positive":
            x[member] = (g == g.max()).double()
        elif method == "correct":
            x[member] = (g > 0).double()
        else:  # raw, whiten
            x[member] = g

    live = scored & ~filtered if drop else scored
    if method in ("batch_std", "whiten", "whiten_baseline") and live.any():
        batch = r[live] if method == "batch_std" else x[live]
        mean, std = batch.new_zeros(()), batch.new_ones(())
        if batch.numel() > 1:
            mean = batch.mean() if method != "batch_std" else mean
            std = batch.std(correction=int(unbiased))
        x = torch.zeros_like(x) if _equal(batch) else (x - mean) / (std + eps)
    counts = [
        rewards.numel(),
        group_ids.unique().numel(),
        flat,
        filtered.sum(),
        (~scored).sum(),
        given[scored].sum(),
        given[scored].square().sum(),
        live.sum(),
    ]
    metrics = torch.tensor([float(v) for v in counts], dtype=torch.float64, device=r.device)
    return torch.where(scored & ~filtered, x, 0.0), live, metrics


def _equal(values: Tensor) -> bool:
    return values.numel() > 1 and bool((values == values[0]).all())


def gae(
    rewards: Tensor,
    values: Tensor,
    keep: Tensor,
    bounds: Tensor,
    bootstrap: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """delta = r + gamma V' - V, A = delta + gamma lam A', R = A + V, one token at a time.

    V' and A' are those of the sequence's next kept token, bootstrap and 0 after the last. All [T],
    bounds [B + 1], bootstrap [B] → float64 [T], 0 where not kept.
    """
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    returns = torch.zeros_like(advantages)
    ends = bounds.tolist()
    for s, bootstrapped in enumerate(bootstrap.double()):
        next_value, next_advantage = bootstrapped, torch.zeros_like(bootstrapped)
        for t in reversed(range(ends[s], ends[s + 1])):
            if not keep[t]:
                continue
            value = values[t].double()
            delta = rewards[t].double() + gamma * next_value - value
            next_advantage = delta + gamma * lam * next_advantage
            next_value = value
            advantages[t], returns[t] = next_advantage, next_advantage + value
    return advantages, returns
