"""Rows of logits whose softmax runs over a sampling support, a few tokens of the vocabulary.

The formulas of logits.py with p = softmax of x over the support: only its logits are read, and the
gradient is 0 outside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import require
from .logits import _FLOOR, check_rows, finite, narrow, row_offset, softmax_input
from .tuning import SUPPORT, SUPPORT_ZEROS


@triton.jit
def _support_stats_kernel(
    z_ptr,
    rows_ptr,
    spans_ptr,
    ids_ptr,
    target_ptr,
    inv_temperature_ptr,
    logprob_ptr,
    entropy_ptr,
    lse_ptr,
    V,
    stride,
    logit_scale: tl.float32,
    softcap: tl.float32,
    HAS_ROWS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row; every lane keeps its own maximum and sums, as in `logits_stats`."""
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    target = tl.load(target_ptr + row)
    z_row = z_ptr + row_offset(rows_ptr, row, stride, HAS_ROWS)
    begin = tl.load(spans_ptr + 2 * row)
    end = tl.load(spans_ptr + 2 * row + 1)

    m = tl.full([BLOCK], -float("inf"), tl.float32)
    S = tl.zeros([BLOCK], tl.float32)
    W = tl.zeros([BLOCK], tl.float32)
    member = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(ids_ptr + at, mask=at < end, other=-1).to(tl.int64)
        # A wrong id gives nan instead of a read outside the row.
        z = tl.load(z_row + token, mask=(token >= 0) & (token < V), other=float("nan"))
        x, _ = softmax_input(z, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
        x = tl.where(at < end, x, -float("inf"))
        member = tl.where((at < end) & (token == target), 1, member)
        new_m = tl.maximum(m, x)
        shift = finite(new_m)
        drift = tl.maximum(m - shift, _FLOOR)
        decay = tl.exp(m - shift)
        centred = x - shift
        weight = tl.exp(centred)
        centred = tl.maximum(centred, _FLOOR)
        W = decay * (W + drift * S) + weight * centred
        S = decay * S + weight
        m = new_m

    top = tl.max(m, axis=0)
    shift = finite(top)
    drift = tl.maximum(m - shift, _FLOOR)
    decay = tl.exp(m - shift)
    W = tl.sum(decay * (W + drift * S), axis=0)
    S = tl.sum(decay * S, axis=0)
    dead = S == 0
    S = tl.where(dead, 1.0, S)
    log_S = tl.log(S)

    inside = (tl.max(member, axis=0) == 1) & (target >= 0) & (target < V)
    z = tl.load(z_row + target, mask=inside, other=float("nan"))
    x, _ = softmax_input(z, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
    tl.store(logprob_ptr + row, tl.where(dead, -float("inf"), (x - shift) - log_S))
    tl.store(entropy_ptr + row, tl.where(dead, 0.0, log_S - W / S))
    tl.store(lse_ptr + row, tl.where(dead, -float("inf"), shift + log_S))


def support_stats(
    z: Tensor,
    target: Tensor,
    inv_temperature: Tensor,
    logit_scale: float,
    softcap: float,
    spans: Tensor,
    ids: Tensor,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse = logsumexp(x), logprob = x[target] - lse, entropy = -sum p log p over S_i, fp32 [n].

    S_i = ids[spans[i, 0]:spans[i, 1]]; spans [n, 2] int64, ids int64 or int32, none twice in S_i.
    The rest as in `logits.logits_stats`. A target outside S_i, or an id outside [0, V), gives nan.
    """
    n, V = check_rows(z, rows, target, inv_temperature=inv_temperature)
    _check_spans(n, spans, ids)
    logprob, entropy, lse = (torch.empty(n, dtype=torch.float32, device=z.device) for _ in range(3))
    if n == 0:
        return logprob, entropy, lse
    with torch.cuda.device_of(z):
        _support_stats_kernel[(n,)](
            z,
            rows,
            spans,
            ids,
            target,
            inv_temperature,
            logprob,
            entropy,
            lse,
            V,
            z.stride(0),
            float(logit_scale),
            float(softcap),
            HAS_ROWS=rows is not None,
            HAS_SOFTCAP=softcap > 0,
            BLOCK=SUPPORT.block,
            num_warps=SUPPORT.warps,
            enable_fp_fusion=True,
        )
    return logprob, entropy, lse


@triton.jit
def _support_grad_kernel(
    z_ptr,
    dz_ptr,
    rows_ptr,
    dz_rows_ptr,
    spans_ptr,
    ids_ptr,
    scratch_ptr,
    target_ptr,
    inv_temperature_ptr,
    lse_ptr,
    entropy_ptr,
    c_ptr,
    h_ptr,
    g_ptr,
    V,
    stride,
    dz_stride,
    logit_scale: tl.float32,
    softcap: tl.float32,
    HAS_ROWS: tl.constexpr,
    HAS_DZ_ROWS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_G: tl.constexpr,
    BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """One program a row. The support's gradients wait in `scratch`, at their ids' places, while the
    row that they come from is zeroed."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    lse = tl.load(lse_ptr + row)
    c = tl.load(c_ptr + row)
    h = tl.load(h_ptr + row)
    entropy = tl.load(entropy_ptr + row, mask=h != 0, other=0.0)
    active = (c != 0) | (h != 0)
    through_lse = -c
    if HAS_G:
        g = tl.load(g_ptr + row)
        active = active | (g != 0)
        through_lse = g - c
    begin = tl.load(spans_ptr + 2 * row, mask=active, other=0)
    end = tl.load(spans_ptr + 2 * row + 1, mask=active, other=0)

    z_row = z_ptr + row_offset(rows_ptr, row, stride, HAS_ROWS)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(ids_ptr + at, mask=at < end, other=-1).to(tl.int64)
        z = tl.load(z_row + token, mask=(token >= 0) & (token < V), other=float("nan"))
        x, slope = softmax_input(z, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
        dead = x == -float("inf")
        logp = tl.where(dead, 0.0, x - lse)
        p = tl.where(dead, 0.0, tl.exp(logp))
        dx = p * (through_lse - h * (logp + entropy)) + tl.where(token == target, c, 0.0)
        tl.store(scratch_ptr + at, dx * slope, mask=at < end)

    tl.debug_barrier()  # every logit is read before any is overwritten
    dz_row = dz_ptr + row_offset(dz_rows_ptr, row, dz_stride, HAS_DZ_ROWS)
    zeros = tl.zeros([ZEROS], dz_ptr.dtype.element_ty)
    for start in range(0, V, ZEROS):
        columns = start + tl.arange(0, ZEROS)
        tl.store(dz_row + columns, zeros, mask=columns < V)

    tl.debug_barrier()  # the zeros before what belongs among them
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(ids_ptr + at, mask=at < end, other=-1).to(tl.int64)
        dz = tl.load(scratch_ptr + at, mask=at < end, other=0.0)
        inside = (token >= 0) & (token < V)
        tl.store(dz_row + token, narrow(dz, dz_ptr.dtype.element_ty), mask=inside)


def support_grad_(
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
    spans: Tensor,
    ids: Tensor,
    rows: Tensor | None = None,
    source: Tensor | None = None,
) -> None:
    """z := dloss/dz as in `logits.logits_grad_`, p over the support of the row and dz 0 outside.

    spans and ids as in `support_stats`; spans of different rows must not overlap. The span of a row
    with c = h = g = 0 is not read.
    """
    raw, z_rows = (z, rows) if source is None else (source, None)
    n, V = check_rows(
        raw, rows, target, inv_temperature=inv_temperature, lse=lse, entropy=entropy, c=c, h=h, g=g
    )
    if source is not None:
        require(source.dtype, (n, V), z=z)
    _check_spans(n, spans, ids)
    if n == 0:
        return
    with torch.cuda.device_of(z):
        _support_grad_kernel[(n,)](
            raw,
            z,
            rows,
            z_rows,
            spans,
            ids,
            torch.empty(ids.shape, dtype=torch.float32, device=z.device),
            target,
            inv_temperature,
            lse,
            entropy,
            c,
            h,
            g,
            V,
            raw.stride(0),
            z.stride(0),
            float(logit_scale),
            float(softcap),
            HAS_ROWS=rows is not None,
            HAS_DZ_ROWS=z_rows is not None,
            HAS_SOFTCAP=softcap > 0,
            HAS_G=g is not None,
            BLOCK=SUPPORT.block,
            ZEROS=SUPPORT_ZEROS,
            num_warps=SUPPORT.warps,
            enable_fp_fusion=True,
        )


def _check_spans(n: int, spans: Tensor, ids: Tensor) -> None:
    require(torch.int64, (n, 2), spans=spans)
    require(torch.int32 if ids.dtype == torch.int32 else torch.int64, (ids.numel(),), ids=ids)
