"""Narrow waist 1: from hidden states to log-probability, entropy and log-sum-exp; knows no loss.

Rows with `mask` false are compacted away before the GEMM. The rest go through chunk by chunk: a
GEMM into `[rows, V]` raw logits, then the backend's row kernels on that buffer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrl.ops import deterministic, reference
from pyrl.ops.backend import load, once_differentiable, select
from pyrl.ops.head import Head, Needs, fake_gradients
from pyrl.ops.head_pass import HeadRows, Wanted, head_pass
from pyrl.ops.lora import LoRA
from pyrl.ops.shapes import check_shape, layout, on_cpu
from pyrl.ops.sharded import check_whole
from pyrl.ops.support import (
    Support,
    SupportRows,
    check_support,
    support_fields,
    support_hashes,
)

#: Bytes of one chunk of logits. CPU: with what else is held beside the gradients, 64 MiB. GPU: what
#: keeps the GEMMs saturated.
CHUNK_BYTES = {"cpu": 54 << 20, "cuda": 1 << 30}


#: Its reciprocal is far inside fp32; greedy sampling has no log-probs.
MIN_TEMPERATURE = 1e-30
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    lora: LoRA | None = None,
    vocab_size: int | None = None,
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
    [0, V), aligned: hidden[t] predicts target[t] · bias [V] · lora: the head is weight + scale * b
    @ a, never formed · vocab_size: rows of weight, bias and b from there on are padding, neither
    read nor given a gradient, and V = vocab_size · temperature scalar, [T] or [B, L] · mask like
    target, true = computed · support: the softmax of each token, and so its entropy and logsumexp,
    runs over its sampling support only, and no gradient enters another logit. Natural logarithms.
    Differentiable in hidden, weight, bias, lora.a and lora.b through all three outputs; gradients
    have their input's dtype and are accumulated in fp32 (of a bf16 dweight the CPU's fused kernels
    keep 24 bits between chunks); one that is not needed (a frozen weight) costs no GEMM.

    ValueError for a wrong shape, dtype or device, for a malformed support, for a kept target
    outside [0, V) or its support, named with its position, and for a sharded weight, with what to
    do.
    """
    where = layout(target, mask, None)
    vocab = check_head(hidden, weight, target, bias, lora, vocab_size)
    x = hidden.reshape(-1, hidden.shape[-1])
    y = token_ids(target)
    check_scaling(softcap, logit_scale)
    inv, cap = inv_temperature(temperature, target), softcap or 0.0
    a, b, scale = lora_parts(lora)
    indptr, ids = support_fields(support, target)
    name = select(backend, hidden.device)
    if name == "reference":
        check_targets(y, where.keep, vocab)
        check_support(indptr, ids, y, where.keep, vocab)
        weight = weight if lora is None else lora.merged(weight)
        bias = None if bias is None else bias[:vocab]
        out = reference.linear_logprob(
            x, weight[:vocab], y, bias, inv, cap, logit_scale, where.keep, indptr, ids
        )
    else:
        rows = (inv, where.keep, indptr, ids)
        out = _linear_logprob(x, weight, y, bias, a, b, *rows, scale, cap, logit_scale, vocab, name)
    return LogProb(*(v.float().reshape(target.shape) for v in out))


def check_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lora: LoRA | None = None,
    vocab_size: int | None = None,
) -> int:
    """V, after checking shapes, dtypes and devices of a linear head and its target."""
    check_whole("weight", weight)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected floating [V, D], got {weight.dtype} {tuple(weight.shape)}"
        )
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target: expected integer token ids, got {target.dtype}")
    for name, value in (("hidden", hidden), ("weight", weight)):
        if value.dtype not in DTYPES:
            raise ValueError(f"{name}: expected one of {list(DTYPES)}, got {value.dtype}")
    check_shape("hidden", hidden, (*target.shape, weight.shape[1]), target.device)
    check_shape("weight", weight, weight.shape, target.device)
    if bias is not None:
        if weight.shape[0]:  # an empty shard of a head has an empty bias
            check_whole("bias", bias)
        check_shape("bias", bias, weight.shape[:1], target.device)
    if lora is not None:
        if not isinstance(lora, LoRA):
            raise ValueError(f"lora: expected a LoRA, got {type(lora).__name__}")
        lora.check(weight)
    if vocab_size is None:
        return weight.shape[0]
    if type(vocab_size) is not int or not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(
            f"vocab_size={vocab_size!r}: expected 1 to {weight.shape[0]}, the rows of weight"
        )
    return vocab_size


def check_scaling(softcap: float | None, logit_scale: float) -> None:
    """ValueError unless softcap is None or > 0 and logit_scale not 0, both finite."""
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap!r}: expected None or a finite number > 0")
    if not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale={logit_scale!r}: expected a finite number that is not 0")


def lora_parts(lora: LoRA | None) -> tuple[Tensor | None, Tensor | None, float]:
    """a, b and scale, as the registered ops take them."""
    return (None, None, 1.0) if lora is None else (lora.a, lora.b, float(lora.scale))


def token_ids(target: Tensor) -> Tensor:
    """int64 [T], contiguous, of any integer dtype and stride."""
    return target.reshape(-1).long().contiguous()


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
        if not MIN_TEMPERATURE <= temperature < float("inf"):
            raise ValueError(
                f"temperature={temperature!r}: expected a finite number >= {MIN_TEMPERATURE}"
            )
        return torch.full(
            (like.numel(),), 1.0 / temperature, dtype=torch.float32, device=like.device
        )
    if temperature.dim() == 0:
        temperature = temperature.expand(like.shape)
    check_shape("temperature", temperature, like.shape, like.device)
    if on_cpu(temperature):
        bad = (~(temperature >= MIN_TEMPERATURE) | temperature.isinf()).flatten().nonzero()
        if bad.numel():
            i = int(bad[0])
            value = float(temperature.flatten()[i])
            raise ValueError(
                f"temperature[{i}] = {value}: expected a finite number >= {MIN_TEMPERATURE}"
            )
    return temperature.detach().reshape(-1).float().reciprocal()


def chunk_rows(hidden: Tensor, vocabulary: int) -> int:
    """Rows of logits that one chunk holds."""
    if deterministic.enabled():
        return deterministic.TILE
    size = 4 if hidden.device.type == "cuda" else hidden.element_size()
    return max(1, chunk_bytes(hidden.device) // (size * max(vocabulary, 1)))


def chunk_bytes(device: torch.device) -> int:
    """`CHUNK_BYTES` of a device."""
    return CHUNK_BYTES[device.type if device.type in CHUNK_BYTES else "cpu"]


def kept_rows(
    hidden: Tensor, keep: Tensor, *fields: Tensor | None
) -> tuple[Tensor, Tensor | slice]:
    """The rows that carry loss, and how they index the full row axis.

    In deterministic mode in canonical order, for which `fields` are what else a row holds.
    """
    index = keep.nonzero().squeeze(1)
    if deterministic.enabled():
        index = deterministic.canonical(index, hidden, *fields)
    elif index.numel() == keep.numel():
        return hidden, slice(None)
    return hidden[index], index


@torch.library.custom_op("pyrl::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    inv_temperature: Tensor,
    keep: Tensor,
    indptr: Tensor | None,
    ids: Tensor | None,
    lora_scale: float,
    softcap: float,
    logit_scale: float,
    vocab: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_targets(target, keep, vocab)
    check_support(indptr, ids, target, keep, vocab)
    kernels = load(backend)
    outputs = [
        torch.zeros(target.shape, dtype=torch.float32, device=hidden.device) for _ in range(3)
    ]
    x, index = kept_rows(hidden, keep)
    support = SupportRows(indptr, ids, index)
    head = Head.of(weight, bias, lora_a, lora_b, lora_scale, x.dtype, vocab)
    y, inv = target[index], inv_temperature[index]
    packed = [torch.empty(y.shape, dtype=torch.float32, device=x.device) for _ in range(3)]
    head_rows = HeadRows(x, index, y, inv, logit_scale, softcap, support)
    chunks = head_pass(kernels, head, head_rows, None, chunk_rows(x, vocab), chunk_bytes(x.device))
    for rows in chunks.chunks():
        for full, part in zip(packed, chunks.stats(rows), strict=True):
            full[rows] = part
    for full, part in zip(outputs, packed, strict=True):
        full[index] = part
    return outputs[0], outputs[1], outputs[2]


@_linear_logprob.register_fake
def _(hidden, weight, target, *rest):
    return tuple(hidden.new_empty(target.shape, dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("pyrl::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    inv_temperature: Tensor,
    keep: Tensor,
    indptr: Tensor | None,
    ids: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
    c: Tensor,
    h: Tensor,
    g: Tensor,
    lora_scale: float,
    softcap: float,
    logit_scale: float,
    vocab: int,
    backend: str,
    needs: list[bool],
    partial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dhidden, dweight, dbias, da, db for dL/dlogprob = c, dL/dentropy = h, dL/dlse = g.

    `needs` and `partial` as in `HeadGradients`.
    """
    kernels = load(backend)
    # Rows without a gradient (clipped, zero advantage) take no part in the GEMMs.
    fields = (target, inv_temperature, c, h, g, support_hashes(indptr, ids))
    x, index = kept_rows(hidden, keep & ((c != 0) | (h != 0) | (g != 0)), *fields)
    support = SupportRows(indptr, ids, index)
    y, inv, *given = (
        v[index].contiguous() for v in (target, inv_temperature, lse, entropy, c, h, g)
    )
    head = Head.of(weight, bias, lora_a, lora_b, lora_scale, x.dtype, vocab)
    head_rows = HeadRows(x, index, y, inv, logit_scale, softcap, support)
    wanted = Wanted((hidden, weight, bias, lora_a, lora_b), Needs(*needs), partial)
    chunks = head_pass(
        kernels, head, head_rows, wanted, chunk_rows(x, vocab), chunk_bytes(x.device)
    )
    for rows in chunks.chunks():
        chunks.logits(rows)
        chunks.add(rows, *(v[rows] for v in given))
    return chunks.result(lora_scale)


@_linear_logprob_backward.register_fake
def _(hidden, weight, target, bias, lora_a, lora_b, *rest):
    *_, needs, partial = rest
    return fake_gradients(hidden, weight, bias, lora_a, lora_b, Needs(*needs), partial)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:10], *output[1:])
    ctx.rest = inputs[10:]


def _backward(ctx, c, h, g):
    once_differentiable("linear_logprob")
    used = ctx.needs_input_grad
    needs = [used[0], used[1], used[3], used[4], used[5]]
    saved = ctx.saved_tensors  # once: a checkpoint gives them out once
    c, h, g = (torch.zeros_like(saved[-1]) if v is None else v.contiguous() for v in (c, h, g))
    grads = _linear_logprob_backward(*saved, c, h, g, *ctx.rest, needs, False)
    dx, dw, db, da, dlb = (v if wanted else None for v, wanted in zip(grads, needs, strict=True))
    return dx, dw, None, db, da, dlb, *([None] * 9)


_linear_logprob.register_autograd(_backward, setup_context=_setup)
