"""Narrow waist 1 for logits that are at hand: log-probability, entropy and log-sum-exp, read where
they lie, and a gradient that may take their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrl.ops import reference
from pyrl.ops.backend import load, once_differentiable, select
from pyrl.ops.linear_logprob import (
    LogProb,
    check_scaling,
    check_targets,
    chunk_rows,
    inv_temperature,
    token_ids,
)
from pyrl.ops.shapes import check_shape, layout
from pyrl.ops.support import Support, SupportRows, check_support, support_fields


def logits_logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    support: Support | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> LogProb:
    """log_softmax(softcap(logits * logit_scale) / temperature)[target], with the entropy and the
    logsumexp of the same distribution.

    logits [T, V] or [B, L, V] (f32, bf16, f16; -inf for a masked token) · everything else as in
    `linear_logprob`. Arithmetic is fp32 whatever the dtype. The forward reads the logits of
    unmasked rows once and copies none: rows may lie any distance apart, as in logits[:, :-1] or
    logits[..., :V] (logits whose columns are not adjacent, or whose rows share memory, are copied).

    The backward reads them once more and writes a gradient of their shape and dtype: a new tensor,
    or with `inplace_backward=True` the memory of the logits, whose values are then gone. Nobody may
    read them after backward; another operation whose backward needs them raises torch's error about
    modified variables if it comes later, and a second backward raises RuntimeError. Under
    torch.compile the gradient is always a new tensor, whose memory the compiler chooses.

    ValueError as in `linear_logprob`, and for `inplace_backward` on a leaf that requires grad or on
    rows that share memory. NotImplementedError for `inplace_backward` on the reference backend.
    """
    where = layout(target, mask, None)
    name = check_logits(logits, target, backend, inplace=inplace_backward)
    check_scaling(softcap, logit_scale)
    y, inv, cap = token_ids(target), inv_temperature(temperature, target), softcap or 0.0
    indptr, ids = support_fields(support, target)
    if name == "reference":
        check_targets(y, where.keep, logits.shape[-1])
        check_support(indptr, ids, y, where.keep, logits.shape[-1])
        flat = logits.reshape(-1, logits.shape[-1])
        out = reference.logits_logprob(flat, y, inv, cap, logit_scale, where.keep, indptr, ids)
    else:
        out = _logits_logprob(
            logits, y, inv, where.keep, indptr, ids, cap, logit_scale, name, inplace_backward
        )
    return LogProb(*(v.float().reshape(target.shape) for v in out))


def check_logits(logits: Tensor, target: Tensor, backend: str | None, *, inplace: bool) -> str:
    """The backend for these logits, after checking that they fit the target, it, and `inplace`."""
    if not logits.is_floating_point() or logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(
            "logits: expected floating [T, V] or [B, L, V] with V > 0, got "
            f"{logits.dtype} {tuple(logits.shape)}"
        )
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target: expected integer token ids, got {target.dtype}")
    check_shape("logits", logits, (*target.shape, logits.shape[-1]), target.device)
    name = select(backend, logits.device)
    if logits.dtype == torch.float64 and name != "reference":
        raise ValueError(
            f"logits: backend {name!r} takes float32, bfloat16 and float16, got float64"
        )
    if inplace:
        _check_inplace(logits, name)
    return name


def _check_inplace(logits: Tensor, backend: str) -> None:
    """Refuses memory that somebody else is known to need, or that a gradient does not fit into."""
    if backend == "reference":
        raise NotImplementedError(
            "inplace_backward=True: backend 'reference' differentiates by autograd, which needs "
            "new tensors"
        )
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and logits.requires_grad):
        return
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            "inplace_backward=True: logits are a leaf that requires grad (or a view of one); "
            "backward would overwrite the values that the leaf holds"
        )
    if matrix(logits) is None:
        raise ValueError(
            "inplace_backward=True: logits need adjacent columns and rows of their own, got shape "
            f"{tuple(logits.shape)} with strides {logits.stride()}"
        )


def matrix(logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """A matrix [N, V] over the memory of logits [..., V], and which of its rows they are.

    Rows int64 [T]. None where there is none: columns that are not adjacent, or rows that overlap.
    """
    vocabulary, device = logits.shape[-1], logits.device
    if logits.numel() == 0:
        return logits.reshape(0, vocabulary), torch.zeros(0, dtype=torch.int64, device=device)
    if vocabulary > 1 and logits.stride(-1) != 1:
        return None
    axes = list(zip(logits.shape[:-1], logits.stride()[:-1], strict=True))
    step = min((stride for size, stride in axes if size > 1), default=vocabulary)
    extent = vocabulary
    for size, stride in sorted(axes, key=lambda axis: axis[1]):
        if size > 1 and (stride < extent or stride % step):
            return None
        extent += (size - 1) * stride
    row = torch.zeros(1, dtype=torch.int64, device=device)
    for size, stride in axes:
        row = (row[:, None] + torch.arange(size, device=device) * (stride // step)).reshape(-1)
    count = (extent - vocabulary) // step + 1
    return logits.as_strided((count, vocabulary), (step, 1)), row


def _matrix(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`matrix`, of a copy where need be."""
    found = matrix(logits) or matrix(logits.contiguous())
    assert found is not None
    return found


@torch.library.custom_op("pyrl::logits_logprob", mutates_args=())
def _logits_logprob(
    logits: Tensor,
    target: Tensor,
    inv_temperature: Tensor,
    keep: Tensor,
    indptr: Tensor | None,
    ids: Tensor | None,
    softcap: float,
    logit_scale: float,
    backend: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_targets(target, keep, logits.shape[-1])
    check_support(indptr, ids, target, keep, logits.shape[-1])
    kernels = load(backend)
    z, row = _matrix(logits)
    index = keep.nonzero()[:, 0]
    y, inv, row = target[index], inv_temperature[index], row[index]
    support = SupportRows(indptr, ids, index)
    outputs = [
        torch.zeros(target.shape, dtype=torch.float32, device=logits.device) for _ in range(3)
    ]
    step = chunk_rows(logits, logits.shape[-1])
    for i in range(0, len(index), step):
        part = slice(i, i + step)
        stats = kernels.logits_stats(
            z, y[part], inv[part], logit_scale, softcap, rows=row[part], **support(part)
        )
        for full, values in zip(outputs, stats, strict=True):
            full[index[part]] = values
    return outputs[0], outputs[1], outputs[2]


@_logits_logprob.register_fake
def _(logits, target, *rest):
    return tuple(logits.new_empty(target.shape, dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("pyrl::logits_logprob_backward_", mutates_args=("dlogits",))
def _gradient_(
    dlogits: Tensor,
    logits: Tensor | None,
    target: Tensor,
    inv_temperature: Tensor,
    keep: Tensor,
    indptr: Tensor | None,
    ids: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    c: Tensor,
    h: Tensor,
    g: Tensor,
    softcap: float,
    logit_scale: float,
    backend: str,
) -> None:
    """dlogits <- dL/dlogits for dL/dlogprob = c, dL/dentropy = h, dL/dlse = g, 0 in unkept rows;
    without `logits`, of the logits that dlogits itself holds."""
    kernels = load(backend)
    z, row = _matrix(dlogits if logits is None else logits)
    out = None if logits is None else dlogits.view(-1, z.shape[1])
    y = torch.where(keep, target, 0)
    c, h, g = (torch.where(keep, v, 0.0) for v in (c, h, g))
    support = SupportRows(indptr, ids)
    step = chunk_rows(dlogits, z.shape[1])
    for i in range(0, len(y), step):
        part = slice(i, i + step)
        kernels.logits_grad_(
            z if out is None else out[part],
            y[part],
            inv_temperature[part],
            logit_scale,
            softcap,
            lse[part],
            entropy[part],
            c[part],
            h[part],
            g[part],
            rows=row[part],
            source=None if out is None else z,
            **support(part),
        )


@_gradient_.register_fake
def _(*args):
    return None


@torch.library.custom_op("pyrl::logits_logprob_backward", mutates_args=())
def _gradient(
    logits: Tensor,
    target: Tensor,
    inv_temperature: Tensor,
    keep: Tensor,
    indptr: Tensor | None,
    ids: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    c: Tensor,
    h: Tensor,
    g: Tensor,
    softcap: float,
    logit_scale: float,
    backend: str,
) -> Tensor:
    """The same as a new, contiguous tensor."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    vectors = (target, inv_temperature, keep, indptr, ids, entropy, lse, c, h, g)
    _gradient_(dlogits, logits, *vectors, softcap, logit_scale, backend)
    return dlogits


@_gradient.register_fake
def _(logits, *rest):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, softcap, logit_scale, backend, ctx.inplace = inputs
    ctx.options = (softcap, logit_scale, backend)
    ctx.overwritten = False
    ctx.save_for_backward(*tensors, output[1], output[2])


def _backward(ctx, c, h, g):
    once_differentiable("logits_logprob")
    if ctx.overwritten:
        raise RuntimeError(
            "logits with inplace_backward=True: backward ran a second time, but the first one put "
            "the gradient where the logits were"
        )
    logits, *rest = ctx.saved_tensors
    c, h, g = (torch.zeros_like(rest[-1]) if v is None else v.contiguous() for v in (c, h, g))
    logits = logits.detach()
    if ctx.inplace and not torch.compiler.is_compiling():
        ctx.overwritten = True
        _gradient_(logits, None, *rest, c, h, g, *ctx.options)
        dlogits = logits
    else:
        dlogits = _gradient(logits, *rest, c, h, g, *ctx.options)
    return dlogits, *([None] * 9)


_logits_logprob.register_autograd(_backward, setup_context=_setup)
