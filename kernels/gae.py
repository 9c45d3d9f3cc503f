"""Generalised advantage estimation: one program a sequence, scanned backwards in blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import require
from .tuning import GAE


@triton.jit
def _compose(c_later, d_later, c, d):
    """u -> c (c_later u + d_later) + d."""
    return c * c_later, c * d_later + d


@triton.jit
def _token(rewards_ptr, values_ptr, keep_ptr, t, inside):
    """Reward, value (float64, 0 where unkept) and keep of the tokens t."""
    kept = tl.load(keep_ptr + t, mask=inside, other=0) != 0
    reward = tl.load(rewards_ptr + t, mask=kept, other=0.0).to(tl.float64)
    value = tl.load(values_ptr + t, mask=kept, other=0.0).to(tl.float64)
    return reward, value, kept


@triton.jit
def _gae_kernel(
    rewards_ptr,
    values_ptr,
    keep_ptr,
    bounds_ptr,
    bootstrap_ptr,
    advantages_ptr,
    returns_ptr,
    gamma: tl.float64,
    lam: tl.float64,
    BLOCK: tl.constexpr,
):
    """With u_t = gamma V + gamma lam A of the kept token after t, A_t = r_t - V_t + u_t, and a kept
    token turns u into gamma lam u + gamma (1 - lam) V + gamma lam r; an unkept one leaves it."""
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(bounds_ptr + sequence)
    end = tl.load(bounds_ptr + sequence + 1)
    lane = tl.arange(0, BLOCK)
    one = tl.full([BLOCK], 1.0, tl.float64)  # a scalar alone would enter `where` as fp32
    carry = gamma * tl.load(bootstrap_ptr + sequence).to(tl.float64)
    for start in range(0, end - begin, BLOCK):
        t = end - 1 - start - lane  # lane 0 has the last token: the scan runs forwards
        inside = t >= begin
        # u_t is what the token after t makes of its own u: lane 0 takes it from the block before.
        r, v, kept = _token(rewards_ptr, values_ptr, keep_ptr, t + 1, inside & (t + 1 < end))
        c = tl.where(kept, one * (gamma * lam), one)
        d = tl.where(kept, gamma * (1 - lam) * v + gamma * lam * r, 0.0)
        c, d = tl.associative_scan((c, d), 0, _compose)
        u = c * carry + d
        carry = tl.sum(tl.where(lane == BLOCK - 1, u, 0.0), axis=0)
        r, v, kept = _token(rewards_ptr, values_ptr, keep_ptr, t, inside)
        advantage = tl.where(kept, r - v + u, 0.0)
        ret = tl.where(kept, r + u, 0.0)
        tl.store(advantages_ptr + t, advantage.to(tl.float32), mask=inside)
        tl.store(returns_ptr + t, ret.to(tl.float32), mask=inside)


def gae_terms(
    rewards: Tensor,
    values: Tensor,
    keep: Tensor,
    bounds: Tensor,
    bootstrap: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, fp32 [T]: A_t = r_t + gamma V' - V_t + gamma lam A', R_t = A_t + V_t.

    V' and A' are those of the next kept token of the sequence, bootstrap and 0 after the last.

    rewards, values fp32 [T], keep bool [T], bounds int64 [B + 1] from 0 to T, bootstrap fp32 [B].
    Unkept tokens get 0. float64 inside; deterministic. ValueError for another dtype, shape or
    stride.
    """
    T, B = rewards.numel(), bootstrap.numel()
    require(torch.float32, (T,), rewards=rewards, values=values)
    require(torch.bool, (T,), keep=keep)
    require(torch.int64, (B + 1,), bounds=bounds)
    require(torch.float32, (B,), bootstrap=bootstrap)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    if T == 0:
        return advantages, returns
    with torch.cuda.device_of(rewards):
        _gae_kernel[(B,)](
            rewards,
            values,
            keep,
            bounds,
            bootstrap,
            advantages,
            returns,
            float(gamma),
            float(lam),
            BLOCK=GAE.block,
            num_warps=GAE.warps,
            enable_fp_fusion=True,
        )
    return advantages, returns
