"""Narrow waist 1: from hidden states to log-probability, entropy and log-sum-exp; knows no loss.

Rows with `mask` false are compacted away before the GEMM. The rest go through chunk by chunk: a
GEMM into `[rows, V]` raw logits, then the backend's row kernels on that buffer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrl.ops import reference
from pyrl.ops.backend import load, select
from pyrl.ops.shapes import check_shape, layout
from pyrl.ops.support import Support, SupportRows, check_support, support_fields

#: Bytes of one chunk of logits. CPU: what stays near the last-level cache while the GEMMs over it
#: are still long enough to run at full rate. GPU: what keeps the GEMMs saturated.
CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 1 << 30}


class LogProb(NamedTuple):
    """fp32 tensors shaped like `target`; 0 where `mask` is false."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    support: Support | None = None,
    backend: str | None = None,
) -> LogProb:
    """log_softmax(softcap((hidden @ weight.T + bias) * logit_scale) / temperature)[target], with
    the entropy and the logsumexp of the same distribution, and no `[T, V]` tensor.

    hidden [T, D] or [B, L, D] (f32, bf16, f16) · weight [V, D] · target [T] or [B, L] integers in
    [0, V), aligned: hidden[t] predicts target[t] · bias [V] · temperature scalar, [T] or [B, L] ·
    mask like target, true = computed · support: the softmax of each token, and so its entropy and
    logsumexp, runs over its sampling support only. Natural logarithms. Differentiable in hidden,
    weight and bias through all three outputs; gradients have their input's dtype and are
    accumulated in fp32; no gradient enters a logit outside the support.

    ValueError for a wrong shape, dtype or device, for a malformed support, and for a kept target
    outside [0, V) or its support, named with its position.
    """
    where = layout(target, mask, None)
    check_head(hidden, weight, target, bias)
    x = hidden.reshape(-1, hidden.shape[-1])
    y = target.reshape(-1)
    inv, cap = inv_temperature(temperature, target), softcap or 0.0
    indptr, ids = support_fields(support, target)
    name = select(backend, hidden.device)
    if name == "reference":
        check_targets(y, where.keep, weight.shape[0])
        check_support(indptr, ids, y, where.keep, weight.shape[0])
        out = reference.linear_logprob(
            x, weight, y, bias, inv, cap, logit_scale, where.keep, indptr, ids
        )
    else:
        out = _linear_logprob(
            x, weight, y, bias, inv, where.keep, indptr, ids, cap, logit_scale, name
        )
    return LogProb(*(v.float().reshape(target.shape) for v in out))


def check_head(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of a linear head and its target."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected floating [V, D], got {weight.dtype} {tuple(weight.shape)}"
        )
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target: expected integer token ids, got {target.dtype}")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden: expected a floating dtype, got {hidden.dtype}")
    check_shape("hidden", hidden, (*target.shape, weight.shape[1]), target.device)
    check_shape("weight", weight, weight.shape, target.device)
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1], target.device)


def check_targets(target: Tensor, keep: Tensor, vocabulary: int) -> None:
    """ValueError naming the first kept target outside [0, V)."""
    bad = (((target < 0) | (target >= vocabulary)) & keep).nonzero()
    if bad.numel():
        i = int(bad[0])
        raise ValueError(
            f"target[{i}] = {int(target[i])} is outside the vocabulary [0, {vocabulary})"
        )


def inv_temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    """fp32 [T]: 1 / temperature for every row."""
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature!r}: expected a finite number > 0")
        return torch.full((like.numel(),), 1.0 / temperature, device=like.device)
    if temperature.dim() == 0:
        temperature = temperature.expand(like.shape)
    check_shape("temperature", temperature, like.shape, like.device)
    return temperature.detach().reshape(-1).float().reciprocal()


def chunk_rows(hidden: Tensor, vocabulary: int) -> int:
    """Rows of logits that one chunk holds."""
    size = 4 if hidden.device.type == "cuda" else hidden.element_size()
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
    return max(1, budget // (size * max(vocabulary, 1)))


def raw_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias as [n, V]; fp32 on CUDA, where the GEMM can keep its accumulator."""
    if x.device.type == "cuda" and x.dtype != torch.float32:
        z = torch.mm(x, weight.t(), out_dtype=torch.float32)
        return z if bias is None else z.add_(bias.float())
    if bias is None:
        return torch.mm(x, weight.t())
    return torch.addmm(bias, x, weight.t())  # one rounding, not two


class HeadGradients:
    """fp32 accumulators of dweight and dbias, and dhidden of the kept rows."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
        chunks: int,
    ) -> None:
        self.chunks = chunks
        self.needs = needs
        self.hidden = torch.zeros_like(hidden) if needs[0] else hidden.new_empty(0)
        self.weight = hidden.new_zeros(weight.shape if needs[1] else (0,), dtype=torch.float32)
        used = bias is not None and needs[2]
        self.bias = hidden.new_zeros(weight.shape[:1] if used else (0,), dtype=torch.float32)
        self._dtypes = (weight.dtype, weight.dtype if bias is None else bias.dtype)

    def add(self, dz: Tensor, x: Tensor, weight: Tensor, index: Tensor | slice) -> None:
        """One chunk: dz [n, V] of rows x [n, D], which are rows `index` of hidden."""
        dz = dz.to(x.dtype)
        if self.needs[0]:
            self.hidden[index] = torch.mm(dz, weight)
        if self.bias.numel():
            self.bias += dz.sum(dim=0, dtype=torch.float32)
        if not self.needs[1]:
            return
        if x.dtype == torch.float32:
            self.weight.addmm_(dz.t(), x)
            return
        if x.device.type == "cuda":
            self.weight += torch.mm(dz.t(), x, out_dtype=torch.float32)
            return
        # Half-precision GEMMs on the CPU round their result. One chunk's result is rounded at the
        # end anyway; parts of a sum may cancel, so they are formed in fp32, a slab of the
        # vocabulary at a time to keep the casts in cache.
        exact = self.chunks > 1
        x = x.float() if exact else x
        for v in range(0, self.weight.shape[0], 4096):
            part = dz[:, v : v + 4096].t()
            if exact:
                self.weight[v : v + 4096].addmm_(part.float(), x)
            else:
                self.weight[v : v + 4096] = torch.mm(part, x)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """dhidden, dweight, dbias in their input's dtype; what is not needed is empty."""
        return self.hidden, self.weight.to(self._dtypes[0]), self.bias.to(self._dtypes[1])


def kept_rows(hidden: Tensor, keep: Tensor) -> tuple[Tensor, Tensor | slice]:
    """The rows that carry loss, and how they index the full row axis."""
    index = keep.nonzero().squeeze(1)
    if index.numel() == keep.numel():
        return hidden, slice(None)
    return hidden[index], index


@torch.library.custom_op("pyrl::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    inv_temperature: Tensor,
    keep: Tensor,
    indptr: Tensor | None,
    ids: Tensor | None,
    softcap: float,
    logit_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_targets(target, keep, weight.shape[0])
    check_support(indptr, ids, target, keep, weight.shape[0])
    kernels = load(backend)
    outputs = [torch.zeros(target.shape, device=hidden.device) for _ in range(3)]
    x, index = kept_rows(hidden, keep)
    y, inv = target[index], inv_temperature[index]
    support = SupportRows(indptr, ids, index)
    w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    packed = [torch.empty(y.shape, device=x.device) for _ in range(3)]
    step = chunk_rows(x, weight.shape[0])
    for i in range(0, len(y), step):
        rows = slice(i, i + step)
        z = raw_logits(x[rows], w, b)
        stats = kernels.logits_stats(z, y[rows], inv[rows], logit_scale, softcap, **support(rows))
        for full, part in zip(packed, stats, strict=True):
            full[rows] = part
    for full, part in zip(outputs, packed, strict=True):
        full[index] = part
    return outputs[0], outputs[1], outputs[2]


@_linear_logprob.register_fake
def _(hidden, weight, target, bias, inv_temperature, keep, indptr, ids, *options):
    return tuple(hidden.new_empty(target.shape, dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("pyrl::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
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
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight, dbias for dL/dlogprob = c, dL/dentropy = h, dL/dlse = g."""
    kernels = load(backend)
    # Rows without a gradient (clipped, zero advantage) take no part in the GEMMs.
    x, index = kept_rows(hidden, keep & ((c != 0) | (h != 0) | (g != 0)))
    step = chunk_rows(x, weight.shape[0])
    needs = (needs_hidden, needs_weight, needs_bias)
    grads = HeadGradients(hidden, weight, bias, needs, chunks=-(-len(x) // step))
    support = SupportRows(indptr, ids, index)
    rows_of = [v[index] for v in (target, inv_temperature, lse, entropy, c, h, g)]
    w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    for i in range(0, len(x), step):
        rows = slice(i, i + step)
        y, inv, lse_i, entropy_i, c_i, h_i, g_i = (v[rows].contiguous() for v in rows_of)
        z = raw_logits(x[rows], w, b)
        kernels.logits_grad_(
            z, y, inv, logit_scale, softcap, lse_i, entropy_i, c_i, h_i, g_i, **support(rows)
        )
        grads.add(z, x[rows], w, rows if isinstance(index, slice) else index[rows])
    return grads.result()


@_linear_logprob_backward.register_fake
def _(
    hidden,
    weight,
    target,
    bias,
    inv_temperature,
    keep,
    indptr,
    ids,
    entropy,
    lse,
    c,
    h,
    g,
    softcap,
    logit_scale,
    backend,
    needs_hidden,
    needs_weight,
    needs_bias,
):
    return fake_gradients(hidden, weight, bias, needs_hidden, needs_weight, needs_bias)


def fake_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of `HeadGradients.result`, for tracing."""
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape if needs_bias else 0)
    dhidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    return dhidden, weight.new_empty(weight.shape if needs_weight else 0), dbias


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, ctx.rest = inputs[:8], inputs[8:]
    _, entropy, lse = output
    ctx.has_bias = tensors[3] is not None
    ctx.save_for_backward(*tensors, entropy, lse)


def _backward(ctx, c, h, g):
    saved = ctx.saved_tensors  # in the order of the backward's parameters
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    c, h, g = (torch.zeros_like(saved[-1]) if v is None else v.contiguous() for v in (c, h, g))
    dx, dw, db = _linear_logprob_backward(*saved, c, h, g, *ctx.rest, *needs)
    return (
        dx if needs[0] else None,
        dw if needs[1] else None,
        None,
        db if needs[2] and ctx.has_bias else None,
        *([None] * 7),
    )


_linear_logprob.register_autograd(_backward, setup_context=_setup)
