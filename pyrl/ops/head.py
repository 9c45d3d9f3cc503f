"""The GEMMs of a linear head, a chunk of rows at a time: raw logits, and gradients of its inputs.

z = hidden @ weight.T + bias + scale * (hidden @ a.T) @ b.T, the last part where there is a `LoRA`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrl.ops.deterministic import full_tile

#: Rows of the vocabulary that are cast to fp32 at a time on the CPU: the casts stay in cache.
SLAB = 4096


class Head(NamedTuple):
    """What hidden states are multiplied with, in their dtype; the first `vocab` rows."""

    weight: Tensor
    """[vocab, D]."""
    bias: Tensor | None
    """[vocab]."""
    a: Tensor | None
    """[r, D]."""
    b: Tensor | None
    """[vocab, r]."""
    scale: float

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        dtype: torch.dtype,
        vocab: int,
    ) -> Head:
        """The caller's tensors in the GEMMs' dtype, without the rows of a padded vocabulary."""
        return cls(
            weight[:vocab].to(dtype),
            None if bias is None else bias[:vocab].to(dtype),
            None if a is None else a.to(dtype),
            None if b is None else b[:vocab].to(dtype),
            scale,
        )

    def logits(self, x: Tensor) -> Tensor:
        """Raw logits [n, vocab] of x [n, D]; fp32 on CUDA, where the GEMM keeps its accumulator. On
        the CPU half-precision logits are rounded to their dtype, as plain torch's are."""
        # Under autocast a GEMM would run in another dtype than its inputs', forward only.
        with torch.autocast(x.device.type, enabled=False):
            return self._logits(full_tile(x))[: len(x)]

    def _logits(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda" and x.dtype != torch.float32:
            z = torch.mm(x, self.weight.t(), out_dtype=torch.float32)
            if self.a is not None and self.b is not None:
                u = torch.mm(x, self.a.t(), out_dtype=torch.float32)
                z.addmm_(u, self.b.float().t(), alpha=self.scale)  # in place: z is the largest
            return z if self.bias is None else z.add_(self.bias.float())
        if self.a is None or self.b is None:
            if self.bias is None:
                return torch.mm(x, self.weight.t())
            return torch.addmm(self.bias, x, self.weight.t())  # one rounding, not two
        # The small term first: what it is rounded to is small beside the sum's own rounding.
        u = torch.mm(x, self.a.t())
        if self.bias is None:
            z = torch.mm(u, self.b.t()).mul_(self.scale)
        else:
            z = torch.addmm(self.bias, u, self.b.t(), alpha=self.scale)
        return z.addmm_(x, self.weight.t())


def exact_mm(x: Tensor, y: Tensor) -> Tensor:
    """x @ y as fp32, of halves: no rounding but the accumulator's."""
    if x.dtype == torch.float32:
        return torch.mm(x, y)
    if x.device.type == "cuda":
        return torch.mm(x, y, out_dtype=torch.float32)
    out = x.new_zeros((x.shape[0], y.shape[1]), dtype=torch.float32)
    for v in range(0, y.shape[0], SLAB):
        out.addmm_(x[:, v : v + SLAB].float(), y[v : v + SLAB].float())
    return out


class Needs(NamedTuple):
    """Which gradients are wanted; one that is not costs no GEMM."""

    hidden: bool
    weight: bool
    bias: bool
    a: bool
    b: bool


class HeadGradients:
    """fp32 accumulators of dweight, dbias, da and db, and dhidden of the kept rows.

    `partial`: dhidden and da are one rank's part of a sum over ranks; they stay in fp32 because the
    parts cancel.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        needs: Needs,
        chunks: int,
        partial: bool = False,
    ) -> None:
        # Half-precision GEMMs on the CPU round their result. One chunk's result is rounded at the
        # end anyway; parts of a sum may cancel, so they are formed in fp32.
        self.exact = chunks > 1
        self.needs = needs
        self.partial = partial
        dtype = torch.float32 if partial else hidden.dtype

        def zeros(like: Tensor | None, wanted: bool) -> Tensor:
            shape = like.shape if like is not None and wanted else torch.Size([0])
            return hidden.new_zeros(shape, dtype=torch.float32)

        self.hidden = hidden.new_zeros(hidden.shape if needs.hidden else (0,), dtype=dtype)
        self.weight, self.bias = zeros(weight, needs.weight), zeros(bias, needs.bias)
        self.a, self.b = zeros(a, needs.a), zeros(b, needs.b)
        self._dtypes = [(weight if v is None else v).dtype for v in (weight, bias, a, b)]
        if partial:
            self._dtypes[2] = torch.float32

    def add(self, dz: Tensor, x: Tensor, head: Head, index: Tensor | slice) -> None:
        """One chunk: dz [n, vocab] of rows x [n, D], which are rows `index` of hidden."""
        with torch.autocast(x.device.type, enabled=False):
            self._add(dz.to(x.dtype), x, head, index)

    def _add(self, dz: Tensor, x: Tensor, head: Head, index: Tensor | slice) -> None:
        vocab, needs, rows = dz.shape[1], self.needs, len(dz)
        dz, x = full_tile(dz), full_tile(x)
        if needs.bias:
            self.bias[:vocab] += dz.sum(dim=0, dtype=torch.float32)
        if needs.weight:
            self._accumulate(self.weight[:vocab], dz, x, self.exact)
        du = None
        if head.a is not None and head.b is not None:
            if needs.hidden or needs.a:
                du = torch.mm(dz, head.b)
            # A few columns, so always exact: adapters are often kept in fp32.
            if needs.a and du is not None:
                self._accumulate(self.a, du, x, exact=True)
            if needs.b:
                self._accumulate(self.b[:vocab], dz, torch.mm(x, head.a.t()), exact=True)
        if needs.hidden:
            self.hidden[index] = self._dhidden(dz, du, head)[:rows]

    def _dhidden(self, dz: Tensor, du: Tensor | None, head: Head) -> Tensor:
        mm = exact_mm if self.partial else torch.mm
        if du is None or head.a is None:
            return mm(dz, head.weight)
        low = mm(du, head.a).mul_(head.scale)
        if self.partial:
            return low.add_(mm(dz, head.weight))
        return low.addmm_(dz, head.weight)  # the small term first, as in `Head.logits`

    def _accumulate(self, total: Tensor, dz: Tensor, x: Tensor, exact: bool) -> None:
        """total [V, K] += dz.T [V, n] @ x [n, K]."""
        if x.dtype == torch.float32:
            total.addmm_(dz.t(), x)
            return
        if x.device.type == "cuda":
            total += torch.mm(dz.t(), x, out_dtype=torch.float32)
            return
        x = x.float() if exact else x
        for v in range(0, total.shape[0], SLAB):
            part = dz[:, v : v + SLAB].t()
            if exact:
                total[v : v + SLAB].addmm_(part.float(), x)
            else:
                total[v : v + SLAB] = torch.mm(part, x)

    def result(self, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dhidden, dweight, dbias, da, db in their input's dtype; what is not needed is empty.

        `scale`: the LoRA's, applied once here to the sums of da and db.
        """
        grads = (self.weight, self.bias, self.a.mul_(scale), self.b.mul_(scale))
        weight, bias, a, b = (v.to(t) for v, t in zip(grads, self._dtypes, strict=True))
        return self.hidden, weight, bias, a, b


def fake_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    needs: Needs,
    partial: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of `HeadGradients.result`, for tracing."""

    def empty(like: Tensor | None, wanted: bool) -> Tensor:
        source = weight if like is None else like
        return source.new_empty(source.shape if like is not None and wanted else 0)

    dhidden = hidden.new_empty(hidden.shape if needs.hidden else 0)
    da = empty(a, needs.a)
    if partial:
        dhidden, da = dhidden.float(), da.float()
    return dhidden, empty(weight, needs.weight), empty(bias, needs.bias), da, empty(b, needs.b)
