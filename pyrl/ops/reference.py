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
    rewards: Tensor, group_ids: Tensor, method: str, unbiased: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, and each sample's group minimum and maximum, one group at a time.

    rewards [n], group_ids [n] any integers → three float64 [n]. A NaN reward leaves its group.
    """
    r = rewards.double()
    advantages, low, high = torch.zeros_like(r), r.clone(), r.clone()
    for group in group_ids.unique():
        member = (group_ids == group) & ~r.isnan()
        x = r[member]
        if x.numel() == 0:
            continue
        low[member], high[member] = x.min(), x.max()
        alone = x.numel() == 1
        mean = 0.0 if alone else x.mean()
        std = 1.0 if alone else x.std(correction=int(unbiased))
        equal = bool((x == x[0]).all()) and not alone
        if method == "grpo":
            a = torch.zeros_like(x) if equal else (x - mean) / (std + eps)
        elif method == "mean":
            a = torch.zeros_like(x) if equal else x - mean
        elif method == "rloo":
            others = (x.sum() - x) / max(x.numel() - 1, 1)
            a = torch.zeros_like(x) if alone or equal else x - others
        elif method == "positive":
            a = (x == x.max()).double()
        else:
            a = x
        advantages[member] = a
    return advantages, low, high
