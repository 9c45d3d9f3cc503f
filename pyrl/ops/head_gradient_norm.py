"""How large the gradient of each sequence's log-likelihood is at the output head.

sum_t δ_t h_tᵀ is never formed: its square is sum_{t,u} (δ_t·δ_u)(h_t·h_u), two small Gram matrices.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from pyrl.ops import deterministic, reference
from pyrl.ops.backend import Backend, load, select
from pyrl.ops.head import SLAB, Head, exact_mm
from pyrl.ops.linear_logprob import (
    check_head,
    check_scaling,
    check_targets,
    chunk_rows,
    inv_temperature,
    token_ids,
)
from pyrl.ops.shapes import flat_float, layout


@torch.no_grad()
def head_gradient_norms(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lse: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """|∇_weight sum_{t in s} -linear_logprob(hidden, weight, target)[t]|_F of every sequence s.

    hidden [T, D] with cu_seqlens [B + 1], or [B, L, D] · weight [V, D] · target, bias, mask,
    temperature, softcap, logit_scale as in `linear_logprob` · lse like target: its log-sum-exp,
    where it is at hand. Returns fp32 [B], 0 for a sequence without kept tokens. Nothing is
    differentiable.

    With δ_t = dL/dz_t [V] and n kept tokens, |sum_t δ_t h_tᵀ|² = sum_{t,u} (δ_t·δ_u)(h_t·h_u) where
    n <= D, else the sum of squares of the gradient's slices; neither a `[T, V]` tensor nor a
    sequence's `[V, D]` is formed. δ has the dtype of the logits, Gram matrices are fp32 and summed
    in float64, so the error is the rounding of the largest terms, also where they cancel.

    ValueError as in `linear_logprob`, and for packed input without cu_seqlens.
    """
    where = layout(target, mask, cu_seqlens)
    vocab = check_head(hidden, weight, target, bias)
    check_scaling(softcap, logit_scale)
    if where.cu_seqlens is None:
        raise ValueError("packed [T] input needs cu_seqlens: one norm is computed a sequence")
    x, y = hidden.reshape(-1, hidden.shape[-1]), token_ids(target)
    inv, cap = inv_temperature(temperature, target), softcap or 0.0
    known = flat_float("lse", lse, where)
    check_targets(y, where.keep, vocab)
    name = select(backend, hidden.device)
    index = where.keep.nonzero().squeeze(1)
    kept_before = torch.nn.functional.pad(where.keep.long().cumsum(0), (1, 0))
    bounds = kept_before[where.cu_seqlens].tolist()
    if name == "reference":
        return _reference(x[index], weight, y[index], bias, inv[index], cap, logit_scale, bounds)
    x = x[index]
    rows = _Rows(
        x,
        y[index],
        inv[index],
        None if known is None else known[index],
        Head.of(weight, bias, None, None, 1.0, x.dtype, vocab),
        logit_scale,
        cap,
        load(name),
    )
    squares = torch.zeros(len(bounds) - 1, dtype=torch.float64, device=x.device)
    step = chunk_rows(x, vocab)
    with torch.autocast(x.device.type, enabled=False):
        for run in _runs(bounds, step):
            begin, end = bounds[run.start], bounds[run.stop]
            if begin == end:
                continue
            if end - begin > step:
                squares[run.start] = rows.long_square(begin, end, step)
                continue
            dz = rows.logit_gradients(begin, end)
            for s in run:
                if bounds[s] < bounds[s + 1]:
                    cut = slice(bounds[s] - begin, bounds[s + 1] - begin)
                    squares[s] = _square(dz[cut], x[begin:end][cut])
            del dz  # before the next chunk's
    return squares.clamp(min=0).sqrt().float()


def _runs(bounds: list[int], step: int) -> Iterator[range]:
    """Sequences in order, together as long as they have `step` rows at most, or one longer."""
    first = 0
    for s in range(len(bounds) - 1):
        if s > first and bounds[s + 1] - bounds[first] > step:
            yield range(first, s)
            first = s
    if first < len(bounds) - 1:
        yield range(first, len(bounds) - 1)


def _square(dz: Tensor, x: Tensor) -> Tensor:
    """|dz.T @ x|_F² of dz [n, V] and x [n, D], float64 0-d, by the cheaper way."""
    dz = dz.to(x.dtype)
    if len(x) <= x.shape[1]:
        return _inner(exact_mm(dz, dz.t()), exact_mm(x, x.t()))
    parts = [_slice_square(part, x) for part in dz.split(SLAB, dim=1)]
    return torch.stack(parts).sum()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum()


def _slice_square(dz: Tensor, x: Tensor) -> Tensor:
    return exact_mm(dz.t(), x).square().sum(dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The kept tokens: x [n, D], y, inv, lse [n], and what makes logits of them."""

    x: Tensor
    y: Tensor
    inv: Tensor
    lse: Tensor | None
    head: Head
    scale: float
    cap: float
    kernels: Backend

    def _stats(self, z: Tensor, rows: slice) -> Tensor:
        """lse of the rows whose logits are z."""
        if self.lse is not None:
            return self.lse[rows]
        return self.kernels.logits_stats(z, self.y[rows], self.inv[rows], self.scale, self.cap)[2]

    def logit_gradients(self, begin: int, end: int) -> Tensor:
        """d(-log p)/dz [n, V] of a chunk of rows, in the logits' dtype."""
        rows = slice(begin, end)
        z = self.head.logits(self.x[rows])
        lse = self._stats(z, rows)
        minus, none = torch.full_like(lse, -1.0), torch.zeros_like(lse)
        self.kernels.logits_grad_(
            z, self.y[rows], self.inv[rows], self.scale, self.cap, lse, none, minus, none, None
        )
        return z

    def long_square(self, begin: int, end: int, step: int) -> Tensor:
        """As `_square` for a sequence of more rows than a chunk: slices of the vocabulary, each of
        as many logits as a chunk has."""
        chunks = [slice(i, min(i + step, end)) for i in range(begin, end, step)]
        lse = torch.cat([self._stats(self.head.logits(self.x[rows]), rows) for rows in chunks])
        x, vocab = self.x[begin:end], self.head.weight.shape[0]
        width = max(1, step * vocab // len(x))
        gram = len(x) <= x.shape[1]
        square = torch.zeros((), dtype=torch.float64, device=x.device)
        products = x.new_zeros((len(x), len(x)), dtype=torch.float32) if gram else None
        for v in range(0, vocab, width):
            parts = [
                self._slice_gradients(rows, lse[rows.start - begin : rows.stop - begin], v, width)
                for rows in (chunks if deterministic.enabled() else [slice(begin, end)])
            ]
            dz = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.dtype)
            del parts
            if products is not None:
                products += exact_mm(dz, dz.t())
            else:
                square += _slice_square(dz, x)
        return square if products is None else _inner(products, exact_mm(x, x.t()))

    def _slice_gradients(self, rows: slice, lse: Tensor, v: int, width: int) -> Tensor:
        """Columns v ... v + width - 1 of `logit_gradients`."""
        head, y = self.head, self.y[rows]
        cut = slice(v, v + width)
        bias = None if head.bias is None else head.bias[cut]
        z = Head(head.weight[cut], bias, None, None, 1.0).logits(self.x[rows])
        # dz = p (g - c) + c e_y: where the target is in another slice, its c moves to g.
        inside = (y >= v) & (y < v + width)
        c, g = -inside.float(), (~inside).float()
        y = torch.where(inside, y - v, 0)
        none = torch.zeros_like(lse)
        self.kernels.logits_grad_(z, y, self.inv[rows], self.scale, self.cap, lse, none, c, none, g)
        return z


def _reference(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None,
    inv: Tensor,
    cap: float,
    scale: float,
    bounds: list[int],
) -> Tensor:
    """One autograd pass a sequence, in float64."""
    weight = weight.detach().double().requires_grad_()
    keep = torch.ones_like(y, dtype=torch.bool)
    with torch.enable_grad():
        logprob, _, _ = reference.linear_logprob(x.detach(), weight, y, bias, inv, cap, scale, keep)
        norms = [
            torch.autograd.grad(-logprob[begin:end].sum(), weight, retain_graph=True)[0].norm()
            for begin, end in itertools.pairwise(bounds)
        ]
    return torch.stack(norms).float() if norms else x.new_zeros(0, dtype=torch.float32)
