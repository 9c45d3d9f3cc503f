"""One pass of a head over the kept rows, chunk by chunk: statistics, then gradients.

`TorchPass` runs torch's GEMMs with the backend's row kernels on `[rows, V]` logits between them;
`FusedPass` runs the CPU's kernels of whole heads, which have the softmax inside their own GEMMs.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyrl.ops import deterministic
from pyrl.ops.backend import Backend
from pyrl.ops.head import Head, HeadGradients, Needs
from pyrl.ops.support import SupportRows

#: The fused kernels take rows by so many; chunks are whole multiples where there are several.
LANES = 32
#: Rows of a chunk of the fused kernels that keeps no logits.
SCORED_ROWS = 1024
#: The most rows of a chunk of the fused kernels: dz of a block of tokens stays in the L2 cache.
CACHED_ROWS = 1536
#: Bytes of a cache line.
LINE = 64
#: The least rows of a chunk of a 24-bit sum, which passes over all of dweight: a few take no less.
SUMMED_ROWS = 128

Leaves = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class HeadRows(NamedTuple):
    """The n kept rows a head is applied to, and what makes softmax inputs of their logits."""

    x: Tensor
    """[n, D]."""
    places: Tensor | slice
    """Where they are among all rows."""
    target: Tensor
    """int64 [n]."""
    inv_temperature: Tensor
    """fp32 [n]."""
    logit_scale: float
    softcap: float
    support: SupportRows

    def at(self, rows: slice) -> Tensor | slice:
        """Where a chunk's rows are."""
        return rows if isinstance(self.places, slice) else self.places[rows]


class Wanted(NamedTuple):
    """The gradients of a pass, as `HeadGradients` has them."""

    leaves: Leaves
    needs: Needs
    partial: bool = False


class HeadPass(Protocol):
    """For every chunk in turn `logits` or `stats`, then `add` where gradients are wanted; then
    `result`."""

    def chunks(self) -> list[slice]:
        """The rows of every chunk."""
        ...

    def logits(self, rows: slice) -> None:
        """Form the chunk's logits."""
        ...

    def stats(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """`logits`, and their logprob, entropy and lse [n]."""
        ...

    def add(
        self, rows: slice, lse: Tensor, entropy: Tensor, c: Tensor, h: Tensor, g: Tensor | None
    ) -> None:
        """The chunk's gradients for dL/dlogprob = c, dL/dentropy = h, dL/dlse = g."""
        ...

    def result(self, scale: float) -> Gradients:
        """As `HeadGradients.result`."""
        ...


def head_pass(
    kernels: Backend, head: Head, rows: HeadRows, wanted: Wanted | None, step: int, scratch: int
) -> HeadPass:
    """`step`: rows of a chunk of a `TorchPass`; `scratch`: bytes of a `FusedPass` beside gradients.

    The fused kernels leave to torch's GEMMs: adapters, supports, f16, deterministic mode, and a
    weight whose gradient has another dtype than the hidden states.
    """
    plain = head.a is None and not rows.support.given and not deterministic.enabled()
    same = wanted is None or wanted.leaves[1].dtype == rows.x.dtype
    if plain and same and kernels.has_head_kernels(rows.x.dtype):
        return FusedPass(kernels, head, rows, wanted, scratch)
    return TorchPass(kernels, head, rows, wanted, step)


class TorchPass:
    """GEMM, row kernels over the logits, GEMMs of what they were turned into."""

    def __init__(
        self, kernels: Backend, head: Head, rows: HeadRows, wanted: Wanted | None, step: int
    ) -> None:
        self.kernels, self.head, self.rows, self.step = kernels, head, rows, step
        self.z: Tensor | None = None
        if wanted is not None:
            count = len(self.chunks())
            self.grads = HeadGradients(
                *wanted.leaves, wanted.needs, chunks=count, partial=wanted.partial
            )

    def chunks(self) -> list[slice]:
        """See `HeadPass.chunks`."""
        return [slice(i, i + self.step) for i in range(0, len(self.rows.x), self.step)]

    def logits(self, rows: slice) -> None:
        """See `HeadPass.logits`."""
        self.z = None  # freed before the next is formed
        self.z = self.head.logits(self.rows.x[rows])

    def stats(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """See `HeadPass.stats`."""
        self.logits(rows)
        z, y, inv, scale, cap = self._chunk(rows)
        return self.kernels.logits_stats(z, y, inv, scale, cap, **self.rows.support(rows))

    def add(
        self, rows: slice, lse: Tensor, entropy: Tensor, c: Tensor, h: Tensor, g: Tensor | None
    ) -> None:
        """See `HeadPass.add`."""
        z, y, inv, scale, cap = self._chunk(rows)
        support = self.rows.support(rows)
        self.kernels.logits_grad_(z, y, inv, scale, cap, lse, entropy, c, h, g, **support)
        self.grads.add(z, self.rows.x[rows], self.head, self.rows.at(rows))

    def result(self, scale: float) -> Gradients:
        """See `HeadPass.result`."""
        return self.grads.result(scale)

    def _chunk(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, float, float]:
        r = self.rows
        assert self.z is not None
        return self.z, r.target[rows], r.inv_temperature[rows], r.logit_scale, r.softcap


class Plan(NamedTuple):
    """How a `FusedPass` cuts its rows and its scratch tensor."""

    chunks: list[slice]
    near: int
    """Rows of the first chunk whose logits lie in dweight, at most."""
    width: int
    """Bytes of scratch for each token of the vocabulary."""
    low: int
    """How many of them hold low bits of dweight, after the first chunk."""


def plan(n: int, vocab: int, dim: int, size: int, scratch: int, threads: int, weight: bool) -> Plan:
    """For n rows of `dim` elements of `size` bytes; `weight`: dweight is wanted.

    At most `scratch` bytes, but for a bf16 dweight of several chunks of no less than its low bits
    and SUMMED_ROWS rows, and for any other of no less than LANES rows. Of chunks that fit, no more
    bytes than they need: fresh memory costs a small head more time than longer chunks save.
    """

    def lanes(width: int) -> int:
        return width // size // LANES * LANES

    def padded(rows: int) -> int:
        return max(-(-rows // LANES) * LANES, 0)

    near = dim // LANES * LANES if weight else 0
    # Every thread has its own fp32 sum of a chunk's dhidden.
    most = min(max(scratch // (4 * dim * threads) // LANES * LANES, LANES), CACHED_ROWS)
    width, low = scratch // vocab, 0
    if n > min(near + lanes(width), most):
        low = -(-dim // LINE) * LINE if weight and size == 2 else 0
        width = max(width, low + size * (SUMMED_ROWS if low else LANES))
    first, then = min(near + lanes(width), most), min(lanes(width - low), most)
    if n <= first:
        return Plan([slice(0, n)] if n else [], near, padded(n - near) * size, 0)
    later = -(-(n - first) // then)
    # Equal chunks, or the first as small as the others allow: for its rows nothing is read back.
    then = min(then, padded(-(-n // (later + 1))))
    first = padded(n - later * then)
    bounds = [0, *range(first, n, then), n]
    width = max(padded(first - near) * size, low + then * size)
    return Plan([slice(*pair) for pair in itertools.pairwise(bounds)], near, width, low)


class FusedPass:
    """Logits are kept transposed, [V, rows]: those of the first D rows in the memory of dweight,
    which is formed over them block by block of the vocabulary, the others in a scratch tensor.

    A bf16 dweight of several chunks is summed in 24 bits, 16 in dweight and 8 in the scratch
    tensor, where the first chunk had logits; that of one chunk is rounded once.
    """

    def __init__(
        self, kernels: Backend, head: Head, rows: HeadRows, wanted: Wanted | None, scratch: int
    ) -> None:
        def adjacent(t: Tensor) -> Tensor:
            return t if t.stride(1) == 1 else t.contiguous()

        x, self.weight = adjacent(rows.x), adjacent(head.weight)
        self.bias = None if head.bias is None else head.bias.contiguous()
        self.kernels, self.rows, self.wanted = kernels, rows._replace(x=x), wanted
        n, (vocab, dim), size = len(x), self.weight.shape, x.element_size()
        self.scratch: Tensor | None = None
        self.dweight: Tensor | None = None
        if wanted is not None and any(wanted.needs):
            threads = torch.get_num_threads()
            self.plan = plan(n, vocab, dim, size, scratch, threads, wanted.needs.weight)
        else:
            starts = range(0, n, SCORED_ROWS)
            self.plan = Plan([slice(i, min(i + SCORED_ROWS, n)) for i in starts], 0, 0, 0)
        if self.plan.width:
            self.scratch = x.new_empty((vocab, self.plan.width), dtype=torch.uint8)
        if wanted is None:
            return
        hidden, weight, bias, _, _ = wanted.leaves
        self.dhidden = torch.zeros_like(
            hidden if wanted.needs.hidden else hidden.new_empty(0),
            dtype=torch.float32 if wanted.partial else hidden.dtype,
            memory_format=torch.contiguous_format,
        )
        if wanted.needs.weight:
            fresh = torch.empty if n else torch.zeros
            self.dweight = fresh(weight.shape, dtype=weight.dtype)
            self.dweight[vocab:] = 0
        shape = bias.shape if bias is not None and wanted.needs.bias else (0,)
        self.dbias = x.new_zeros(shape, dtype=torch.float32)

    def chunks(self) -> list[slice]:
        """See `HeadPass.chunks`."""
        return self.plan.chunks

    def logits(self, rows: slice) -> None:
        """See `HeadPass.logits`."""
        self.stats(rows)  # their sums are formed on the way

    def stats(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """See `HeadPass.stats`."""
        return self.kernels.head_stats(*self._chunk(rows))

    def add(
        self, rows: slice, lse: Tensor, entropy: Tensor, c: Tensor, h: Tensor, g: Tensor | None
    ) -> None:
        """See `HeadPass.add`."""
        assert self.wanted is not None
        x, at, (vocab, dim) = self.rows.x[rows], self.rows.at(rows), self.weight.shape
        first, last = rows.start == 0, rows.stop == len(self.rows.x)
        dhidden = dbias = low = None
        if self.wanted.needs.hidden:
            whole = isinstance(at, slice)
            dhidden = self.dhidden[at] if whole else torch.empty_like(x, dtype=self.dhidden.dtype)
        if self.wanted.needs.bias:
            dbias = self.dbias[:vocab]
        if self.plan.low and self.scratch is not None:
            low = self.scratch[:, :dim]
        self.kernels.head_grad_(
            *self._chunk(rows), lse, entropy, c, h, g, dhidden, low, dbias, first, last
        )
        if dhidden is not None and not isinstance(at, slice):
            self.dhidden[at] = dhidden

    def result(self, scale: float) -> Gradients:
        """See `HeadPass.result`."""
        assert self.wanted is not None
        _, weight, bias, a, b = self.wanted.leaves
        dtypes = [(weight if v is None else v).dtype for v in (weight, bias, a, b)]
        if self.wanted.partial:
            dtypes[2] = torch.float32
        low_a, low_b = (self.dbias.new_empty(0, dtype=dtype) for dtype in dtypes[2:])
        dweight = self.dbias.new_empty(0, dtype=dtypes[0]) if self.dweight is None else self.dweight
        return self.dhidden, dweight, self.dbias.to(dtypes[1]), low_a, low_b

    def _chunk(self, rows: slice) -> tuple[
        Tensor, Tensor, Tensor | None, Tensor, Tensor, float, float, Tensor | None, int,
        Tensor | None,
    ]:  # fmt: skip
        """The arguments that head_stats and head_grad_ share."""
        r = self.rows
        x = r.x[rows]
        near = min(self.plan.near, len(x)) if rows.start == 0 else 0
        dweight = None if self.dweight is None else self.dweight[: len(self.weight)]
        far = None
        if self.scratch is not None and len(x) > near:
            far = self.scratch[:, 0 if rows.start == 0 else self.plan.low :].view(x.dtype)
        return (
            x, self.weight, self.bias, r.target[rows], r.inv_temperature[rows], r.logit_scale,
            r.softcap, dweight, near, far,
        )  # fmt: skip
