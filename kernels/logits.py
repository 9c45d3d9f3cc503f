"""Rows of logits: log-prob, entropy and log-sum-exp, and the gradient in place.

With raw logits z[n, V], everything in fp32:

    u = z * logit_scale;  s = softcap * tanh(u / softcap) if softcap > 0 else u
    x = s * inv_temperature[row];  p = softmax(x)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import require
from .tuning import grad_tile, stats_tile

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
#: e^x is 0 in fp32 from here down; a stand-in for such x, since 0 times one near -3e38 may be nan.
_FLOOR = tl.constexpr(-104.0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _tanh(y):
    # 1 - exp(-2|y|) cancels near 0; there an odd polynomial is exact to fp32 (next term < 1e-8).
    y2 = y * y
    series = y * (
        1.0 + y2 * (-1.0 / 3.0 + y2 * (2.0 / 15.0 + y2 * (-17.0 / 315.0 + y2 * (62.0 / 2835.0))))
    )
    decay = tl.exp(-2.0 * tl.abs(y))
    ratio = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(y) < 0.25, series, tl.where(y < 0, -ratio, ratio))


@triton.jit
def softmax_input(z, inv_temperature, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """x and dx/dz of raw logits z."""
    x = z.to(tl.float32) * logit_scale
    slope = tl.full(x.shape, 1.0, tl.float32) * (inv_temperature * logit_scale)
    if HAS_SOFTCAP:
        squashed = _tanh(x / softcap)
        x = softcap * squashed
        slope *= 1.0 - squashed * squashed
    return x * inv_temperature, slope


@triton.jit
def finite(m):
    """m, and 0 for -inf: -inf - -inf would be nan, exp(-inf - 0) is 0."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 x in dtype, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates: round here, so that what it cuts off is zero.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def row_offset(rows_ptr, row, stride, HAS_ROWS: tl.constexpr):
    """Elements from the matrix's first to the first of row `row` of the vectors; 64-bit, since the
    product passes 2^31."""
    if HAS_ROWS:
        row = tl.load(rows_ptr + row)
    return row.to(tl.int64) * stride


@triton.jit
def _logits_stats_kernel(
    z_ptr,
    rows_ptr,
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
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program a row (grid axis 0: the others end at 65,535).

    Every lane keeps m = max x, S = sum e^(x-m) and W = sum e^(x-m) (x-m) of what it has seen:
    lse = m + log S and entropy = log S - W / S, without cancelling large logits.
    """
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    z_row = z_ptr + row_offset(rows_ptr, row, stride, HAS_ROWS)
    offsets = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]

    m = tl.full([LANES], -float("inf"), tl.float32)
    S = tl.zeros([LANES], tl.float32)
    W = tl.zeros([LANES], tl.float32)
    for start in range(0, V, STEPS * LANES):
        columns = start + offsets
        z = tl.load(z_row + columns, mask=columns < V, other=0.0)
        x, _ = softmax_input(z, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
        # After the transform: a negative scale or a softcap would bring -inf back.
        x = tl.where(columns < V, x, -float("inf"))
        new_m = tl.maximum(m, tl.max(x, axis=0))
        shift = finite(new_m)
        drift = tl.maximum(m - shift, _FLOOR)
        decay = tl.exp(m - shift)
        centred = x - shift[None, :]
        weight = tl.exp(centred)
        centred = tl.maximum(centred, _FLOOR)
        W = decay * (W + drift * S) + tl.sum(weight * centred, axis=0)
        S = decay * S + tl.sum(weight, axis=0)
        m = new_m

    top = tl.max(m, axis=0)
    shift = finite(top)
    drift = tl.maximum(m - shift, _FLOOR)
    decay = tl.exp(m - shift)
    W = tl.sum(decay * (W + drift * S), axis=0)
    S = tl.sum(decay * S, axis=0)
    dead = S == 0  # a row of -inf; nan is not 0 and stays visible
    S = tl.where(dead, 1.0, S)
    log_S = tl.log(S)

    target = tl.load(target_ptr + row)
    # A target outside [0, V) gives nan instead of a read outside the row.
    z = tl.load(z_row + target, mask=(target >= 0) & (target < V), other=float("nan"))
    x, _ = softmax_input(z, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
    tl.store(logprob_ptr + row, tl.where(dead, -float("inf"), (x - shift) - log_S))
    tl.store(entropy_ptr + row, tl.where(dead, 0.0, log_S - W / S))
    tl.store(lse_ptr + row, tl.where(dead, -float("inf"), shift + log_S))


def logits_stats(
    z: Tensor,
    target: Tensor,
    inv_temperature: Tensor,
    logit_scale: float,
    softcap: float,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse = logsumexp(x), logprob = x[target] - lse, entropy = -sum p log p, each fp32 [n].

    z [n, V] f32, bf16 or f16; target [n] int64; inv_temperature [n] fp32; softcap 0 = none. With
    `rows` [n] int64, row i is row rows[i] of z [N, V], whose rows may be any distance apart. An
    x of -inf has p = 0 and adds nothing; a row of them has lse = logprob = -inf, entropy 0. A
    target outside [0, V) has logprob nan. ValueError for another dtype, shape or stride.
    """
    n, V = check_rows(z, rows, target, inv_temperature=inv_temperature)
    logprob, entropy, lse = (torch.empty(n, dtype=torch.float32, device=z.device) for _ in range(3))
    if n == 0:
        return logprob, entropy, lse
    tile = stats_tile(V, z.element_size())
    with torch.cuda.device_of(z):
        _logits_stats_kernel[(n,)](
            z,
            rows,
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
            STEPS=tile.steps,
            LANES=tile.lanes,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
    return logprob, entropy, lse


@triton.jit
def _logits_grad_kernel(
    z_ptr,
    dz_ptr,
    rows_ptr,
    dz_rows_ptr,
    target_ptr,
    inv_temperature_ptr,
    lse_ptr,
    entropy_ptr,
    c_ptr,
    h_ptr,
    g_ptr,
    V,
    tiles,
    stride,
    dz_stride,
    logit_scale: tl.float32,
    softcap: tl.float32,
    HAS_ROWS: tl.constexpr,
    HAS_DZ_ROWS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of one row a program; consecutive programs walk a row, all on grid axis 0."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    columns = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    lse = tl.load(lse_ptr + row)
    c = tl.load(c_ptr + row)
    h = tl.load(h_ptr + row)
    # Without an entropy gradient whatever the entropy holds must not matter.
    entropy = tl.load(entropy_ptr + row, mask=h != 0, other=0.0)
    active = (c != 0) | (h != 0)
    through_lse = -c
    if HAS_G:
        g = tl.load(g_ptr + row)
        active = active | (g != 0)
        through_lse = g - c

    live = columns < tl.where(active, V, 0)  # a row without gradient is not even read
    z_row = z_ptr + row_offset(rows_ptr, row, stride, HAS_ROWS)
    z = tl.load(z_row + columns, mask=live, other=0.0)
    x, slope = softmax_input(z, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
    dead = x == -float("inf")
    logp = tl.where(dead, 0.0, x - lse)
    p = tl.where(dead, 0.0, tl.exp(logp))
    logp = tl.maximum(logp, _FLOOR)
    dx = p * (through_lse - h * (logp + entropy)) + tl.where(columns == target, c, 0.0)
    dz = tl.where(live, dx * slope, 0.0)
    dz_row = dz_ptr + row_offset(dz_rows_ptr, row, dz_stride, HAS_DZ_ROWS)
    tl.store(dz_row + columns, narrow(dz, z_ptr.dtype.element_ty), mask=columns < V)


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
    rows: Tensor | None = None,
    source: Tensor | None = None,
) -> None:
    """z := dloss/dz, in z's dtype, from c, h, g = dloss/d(logprob, entropy, lse), fp32 [n]:

        dx_v = c (1[v = target] - p_v) - h p_v (log p_v + entropy) + g p_v
        dz_v = dx_v * inv_temperature * (1 - (s_v / softcap)^2 if softcap > 0) * logit_scale

    z [n, V] f32, bf16 or f16, as `logits_stats` saw it (rows included), and its lse and entropy
    fp32 [n]. With a `source`, that is what `logits_stats` saw, and z [n, V] is only written. A row
    with c = h = g = 0 becomes exact zeros whatever it holds. ValueError for another dtype, shape
    or stride.
    """
    raw, z_rows = (z, rows) if source is None else (source, None)
    n, V = check_rows(
        raw, rows, target, inv_temperature=inv_temperature, lse=lse, entropy=entropy, c=c, h=h, g=g
    )
    if source is not None:
        require(source.dtype, (n, V), z=z)
    if n == 0:
        return
    tile = grad_tile(V, z.element_size())
    tiles = triton.cdiv(V, tile.block)
    with torch.cuda.device_of(z):
        _logits_grad_kernel[(n * tiles,)](
            raw,
            z,
            rows,
            z_rows,
            target,
            inv_temperature,
            lse,
            entropy,
            c,
            h,
            g,
            V,
            tiles,
            raw.stride(0),
            z.stride(0),
            float(logit_scale),
            float(softcap),
            HAS_ROWS=rows is not None,
            HAS_DZ_ROWS=z_rows is not None,
            HAS_SOFTCAP=softcap > 0,
            HAS_G=g is not None,
            BLOCK=tile.block,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )


def check_rows(
    z: Tensor, rows: Tensor | None, target: Tensor, **vectors: Tensor | None
) -> tuple[int, int]:
    """n and V; ValueError for logits or per-row vectors that the kernels would misread."""
    adjacent = z.is_contiguous() if rows is None else z.dim() == 2 and z[:1].is_contiguous()
    if z.dtype not in _DTYPES or z.dim() != 2 or z.shape[1] == 0 or not adjacent:
        expected = "a contiguous [n, V] tensor" if rows is None else "adjacent columns in [N, V]"
        raise ValueError(
            f"z: expected {expected} of one of {list(_DTYPES)} with V > 0, got "
            f"{z.dtype} of shape {list(z.shape)} and strides {list(z.stride())}"
        )
    n = z.shape[0] if rows is None else rows.numel()
    require(torch.int64, (n,), target=target, rows=rows)
    require(torch.float32, (n,), **vectors)
    return n, z.shape[1]
