"""Deterministic mode: the same bits whatever the packing, the padding or the order of the rows.

On while `torch.are_deterministic_algorithms_enabled()`. Two rules make it so:

- GEMMs run over tiles of `TILE` rows, the last one filled with zeros: what a row gets depends on
  neither its neighbours nor their number;
- sums over rows run in an order that is a function of what the rows hold (`canonical`).

It holds on one machine, at one number of threads and on every backend but `reference`, for loss,
metrics, log-probs, entropies and the gradients of hidden, weight, bias and LoRA. On a GPU,
not yet tried, it also rests on cuBLAS repeating itself for equal shapes. It does not hold across
different splits into micro-batches or ranks, whose parts are rounded before they are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of one GEMM. Fixed, so that every row meets the same GEMM kernel and blocking.
TILE = 128

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = (0x9E3779B97F4A7C15 - 2**64, 0xC2B2AE3D27D4EB4F - 2**64)
_ROWS = 4096  # of a wide column that are hashed at a time: their bits take 8 bytes each


def enabled() -> bool:
    """torch.are_deterministic_algorithms_enabled()."""
    return torch.are_deterministic_algorithms_enabled()


def full_tile(x: Tensor) -> Tensor:
    """x [n, ...] with zeros below up to `TILE` rows, in deterministic mode; else x itself."""
    if not enabled() or len(x) == TILE:
        return x
    tile = x.new_zeros(TILE, *x.shape[1:])
    tile[: len(x)] = x
    return tile


def hashes(*columns: Tensor | None) -> Tensor:
    """int64 [T]: a hash of the bits in each row of `columns` [T] or [T, D], modulo 2^64.

    Integer arithmetic alone, so that it is the same at any position and width of vector unit.
    """
    total: Tensor | None = None
    for column in columns:
        if column is None:
            continue
        bits = column.detach().contiguous()
        if bits.dtype != torch.bool:
            bits = bits.view(_INTEGER[bits.element_size()])
        bits = bits.flatten(1) if bits.dim() > 1 else bits[:, None]
        factors = _mix(torch.arange(bits.shape[1], device=bits.device)) | 1
        part = torch.cat(
            [_mix(rows.long() + 1).mul_(factors).sum(1) for rows in bits.split(_ROWS)]
            or [factors.new_zeros(0)]
        )
        total = _mix(part) if total is None else _mix(total * _ODD[0] + part)
    assert total is not None
    return total


def canonical(index: Tensor, *columns: Tensor | None) -> Tensor:
    """`index` int64 [n] in an order that depends only on what the rows hold.

    Rows that hold the same are interchangeable; different rows share a hash with odds of 2^-64.
    """
    return index[hashes(*(None if v is None else v[index] for v in columns)).argsort(stable=True)]


def canonical_sequences(
    keep: Tensor, bounds: Tensor, *columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(index, bounds) of the kept tokens, whole sequences in canonical order, tokens in theirs."""
    running = torch.cat([keep.new_zeros(1).long(), keep.long().cumsum(0)])
    starts = running[bounds]
    index, lengths = keep.nonzero()[:, 0], starts.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=keep.device), lengths)
    place = torch.arange(len(index), device=keep.device) - starts[sequence]
    tokens = hashes(place, *(None if v is None else v[index] for v in columns))
    sums = torch.cat([tokens.new_zeros(1), tokens.cumsum(0)])  # wraps: differences stay exact
    order = _mix(sums[starts[1:]] - sums[starts[:-1]] + lengths).argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    ends = lengths[order].cumsum(0)
    return index[rank[sequence].argsort(stable=True)], torch.cat([ends.new_zeros(1), ends])


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 that spreads every bit over the word."""
    x = (x ^ ((x >> 31) & 0x1FFFFFFFF)) * _ODD[0]  # the mask makes the shift logical
    return x ^ ((x >> 29) & 0x7FFFFFFFF)
