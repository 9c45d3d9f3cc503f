"""Generalised advantage estimation over packed or padded sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrl.ops import reference
from pyrl.ops.backend import load, select
from pyrl.ops.shapes import check_finite, check_shape, flat_float, layout


class GAE(NamedTuple):
    """Advantages and returns, fp32, shaped like rewards, detached."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> GAE:
    """delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, returns = A + V.

    rewards, values [T] with `cu_seqlens` [B + 1], or [B, L] · mask true = a token of the policy;
    other tokens (tool output, padding) are passed over: t + 1 is the sequence's next kept token,
    and their own advantage and return are 0, whatever they hold · bootstrap [B]: the value after a
    sequence's last kept token, for one that was cut short; 0 (terminated) by default · gamma, lam
    in [0, 1].

    float64 inside, rounded once; detached; nothing waits for the device. ValueError names a wrong
    shape, dtype or device, and on the CPU the first kept value that is not finite.
    Source: arXiv 1506.02438.
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r}: expected a number in [0, 1]")
    where = layout(rewards, mask, cu_seqlens)
    if where.cu_seqlens is None or where.sequences is None:
        raise ValueError("gae on packed [T] needs cu_seqlens")
    r, v = flat_float("rewards", rewards, where), flat_float("values", values, where)
    assert r is not None and v is not None
    check_finite("rewards", r, where.keep)
    check_finite("values", v, where.keep)
    if bootstrap is None:
        after = r.new_zeros(where.sequences)
    else:
        check_shape("bootstrap", bootstrap, (where.sequences,), r.device)
        after = bootstrap.detach().float().contiguous()
        check_finite("bootstrap", after, torch.ones_like(after, dtype=torch.bool))
    advantages, returns = _gae(
        r, v, where.keep, where.cu_seqlens.contiguous(), after, float(gamma), float(lam),
        select(backend, r.device),
    )  # fmt: skip
    return GAE(advantages.reshape(where.shape), returns.reshape(where.shape))


@torch.library.custom_op("pyrl::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    keep: Tensor,
    bounds: Tensor,
    bootstrap: Tensor,
    gamma: float,
    lam: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, fp32 [T]."""
    if backend != "reference":
        return load(backend).gae_terms(rewards, values, keep, bounds, bootstrap, gamma, lam)
    advantages, returns = reference.gae(rewards, values, keep, bounds, bootstrap, gamma, lam)
    return advantages.float(), returns.float()


@_gae.register_fake
def _(rewards, values, keep, bounds, bootstrap, gamma, lam, backend):
    return torch.empty_like(rewards), torch.empty_like(rewards)
