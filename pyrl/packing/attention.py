"""Block-diagonal causal attention over packed sequences, registered with transformers.

    out_t = sum_{u in window(t)} softmax_u(scale * q_t . k_u) v_u,
    window(t) = the tokens u <= t of t's own sequence (the last `sliding_window` of them, if set)

The sequence boundaries travel as keyword arguments of the model call (`cu_seq_lens_q`, the name
transformers uses, or a ready `varlen_plan`), so there is no global state and recomputation under
activation checkpointing sees the same boundaries. No `[T, T]` mask is built: each sequence is a
separate attention problem. Without boundaries the call is plain transformers SDPA, so the same
model also generates with a KV cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "pyrl_varlen"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class VarlenPlan:
    """Boundaries of the S sequences of a flat `[T]` batch, checked once per model call."""

    cu_seqlens: Tensor
    """int32 [S+1], on the tokens' device."""
    lengths: tuple[int, ...]
    """Lengths of the S sequences; zeros are allowed."""

    @classmethod
    def build(cls, cu_seqlens: Tensor, num_tokens: int) -> VarlenPlan:
        """Raises ValueError unless `cu_seqlens` rises from 0 to `num_tokens`."""
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"cu_seqlens of shape {list(cu_seqlens.shape)}: expected [S+1]")
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0:
            raise ValueError(f"cu_seqlens[0]={bounds[0]}: expected 0")
        if bounds[-1] != num_tokens:
            raise ValueError(f"cu_seqlens[-1]={bounds[-1]}: expected {num_tokens} (the tokens)")
        lengths = tuple(b - a for a, b in itertools.pairwise(bounds))
        for i, length in enumerate(lengths):
            if length < 0:
                raise ValueError(f"cu_seqlens[{i + 1}]={bounds[i + 1]} is below {bounds[i]}")
        return cls(cu_seqlens.to(torch.int32), lengths)

    @property
    def max_length(self) -> int:
        """Of the longest sequence; 0 without any."""
        return max(self.lengths, default=0)


def no_mask(device: torch.device) -> Tensor:
    """The `attention_mask` to pass with boundaries: bool [1, 1, 0, 0].

    transformers hands a 4-D mask to the attention function as it is, without building its own.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def check_options(
    query: Tensor, scale: float | None, sliding_window: int | None, softcap: float | None
) -> None:
    """ValueError, naming it, for what no attention of this package computes; None is a default.

    A scale <= 0 is refused because flash kernels take the greatest score before they scale.
    """
    if query.dtype not in _DTYPES:
        raise ValueError(f"dtype {query.dtype}: expected one of {[str(d) for d in _DTYPES]}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        try:
            fits = value is None or (math.isfinite(value) and value > 0)
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"{name}={value!r}: expected a finite number > 0, or None")
    try:
        fits = sliding_window is None or operator.index(sliding_window) >= 1
    except TypeError:
        fits = False
    if not fits or isinstance(sliding_window, bool):
        raise ValueError(
            f"sliding_window={sliding_window!r}: expected a whole number >= 1, or None"
        )


def as_autocast(*tensors: Tensor) -> tuple[tuple[Tensor, ...], contextlib.AbstractContextManager]:
    """What autocast makes of SDPA's inputs, and a context in which it casts nothing more.

    Under autocast q and k may leave RoPE in float32 while v is in half precision; SDPA then gets
    all of them in autocast's dtype. float64 is left alone, as autocast does. The context keeps
    what `widen` made float32.
    """
    kind = tensors[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors, contextlib.nullcontext()
    if all(x.is_floating_point() and x.dtype != torch.float64 for x in tensors):
        tensors = tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
    return tensors, torch.autocast(kind, enabled=False)


def _band(length: int, sliding_window: int, device: torch.device) -> Tensor:
    """bool [L, L]: query t sees keys t - sliding_window < u <= t."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - sliding_window)


def widen(x: Tensor) -> Tensor:
    """Half precision to float32 on the CPU; float32, float64 and CUDA tensors as they are.

    torch's half-precision CPU flash backward takes twice as long as the float32 one, casts
    included, and is less exact.
    """
    return x.float() if x.device.type == "cpu" and x.dtype.itemsize < 4 else x


def attend_softcap(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, mask: Tensor | None
) -> Tensor:
    """softmax(where(mask, softcap * tanh(scale * q k^T / softcap), min)) v, which SDPA lacks.

    q [B, H, L, d], k [B, K, M, d], v [B, K, M, e], mask bool broadcastable to [B, H, L, M] ->
    [B, H, L, e]. The H/K query heads of a KV head are stacked as rows, so that K and V are not
    repeated. Memory is B * H * L * M.
    """
    batch, heads, length, dim = q.shape
    rows = q.reshape(batch, k.shape[1], -1, dim)
    scores = softcap * torch.tanh((rows @ k.transpose(2, 3)) * (scale / softcap))
    scores = scores.view(batch, heads, length, k.shape[2])
    if mask is not None:
        # The least number, not -inf: a padded query that sees no key must not become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32))
    probs = probs.to(v.dtype).view(batch, k.shape[1], -1, k.shape[2])
    return (probs @ v).view(batch, heads, length, v.shape[-1])


def _flash_takes(query: Tensor, value: Tensor) -> bool:
    dim = query.shape[-1]
    fits = dim == value.shape[-1] and dim % 8 == 0 and dim <= 256
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and fits


def _attend_flash(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, scale: float, window: int
) -> Tensor:
    """One varlen flash-attention launch.

    torch's operator rather than its wrapper `torch.nn.attention.varlen`: the wrapper's arguments
    changed in each release from 2.10 (no scale, no window) to 2.12, the operator's did not.
    """
    out, *_ = torch.ops.aten._flash_attention_forward(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        plan.cu_seqlens,
        plan.cu_seqlens,
        plan.max_length,
        plan.max_length,
        0.0,  # dropout
        True,  # causal
        False,  # no debug mask
        scale=scale,
        window_size_left=-1 if window >= plan.max_length else window - 1,
        window_size_right=0,
    )
    return out[None]


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: VarlenPlan,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention inside each sequence of the plan (formula at the top of this file).

    query [1, H, T, d], key [1, K, T, d], value [1, K, T, e] with H a multiple of K -> [1, T, H, e]
    in query's dtype; differentiable. On CUDA in half precision one flash-attention launch; else
    one SDPA call per sequence, K and V unrepeated; half precision is computed in float32 on the
    CPU.
    """
    check_options(query, scale, sliding_window, softcap)
    dtype, device = query.dtype, query.device
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = min(sliding_window or plan.max_length, plan.max_length)
    if softcap is None and _flash_takes(query, value):
        return _attend_flash(query, key, value, plan, scale, window)
    query, key, value = widen(query), widen(key), widen(value)
    # split, not slices: the backward of a split is one concatenation, that of S slices S zero fills
    lengths = [n for n in plan.lengths if n > 0]
    outs = []
    for q, k, v in zip(
        query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
    ):
        length = q.shape[2]
        if softcap is not None:
            out = attend_softcap(q, k, v, scale, softcap, _band(length, window, device))
        else:
            mask = _band(length, window, device) if window < length else None
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        outs.append(out.transpose(1, 2))
    if not outs:  # still a function of its inputs: a loss over no tokens has gradients, all empty
        nothing = query.new_zeros(1, 0, query.shape[1], value.shape[-1], dtype=dtype)
        return nothing + (query.sum() + key.sum() + value.sum()).to(dtype)
    return torch.cat(outs, 1).to(dtype)


def _softcap_without_boundaries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> tuple[Tensor, None]:
    """transformers' SDPA contract (mask None = causal) with a softcap, which its SDPA ignores."""
    length = query.shape[2]
    if mask is None and length > 1:
        key, value = key[:, :, :length], value[:, :, :length]
        mask = _band(length, length, query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend_softcap(query, key, value, scale, softcap, mask)
    return out.transpose(1, 2).contiguous(), None


def check_packed_call(
    name: str, module: nn.Module, query: Tensor, key: Tensor, dropout: float, kwargs: dict[str, Any]
) -> None:
    """What the attention function `name` refuses to do on a packed row; kwargs as transformers'."""
    for extra in ("s_aux", "position_bias"):
        if kwargs.get(extra) is not None:
            raise NotImplementedError(f"{name} attention has no {extra}")
    if dropout:
        raise NotImplementedError(f"{name} attention has no dropout (got {dropout})")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise NotImplementedError(f"{name} attention is causal only")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"packed attention takes one row without a cache: query {list(query.shape)}, "
            f"key {list(key.shape)}"
        )


def pyrl_varlen_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    varlen_plan: VarlenPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`varlen_attention` behind transformers' attention protocol, q [B, H, L, d] -> [B, L, H, d].

    With `varlen_plan` or `cu_seq_lens_q` the batch is one packed row; with neither, plain SDPA.
    Under autocast q, k and v are cast to its dtype, as SDPA does.
    Raises NotImplementedError for dropout, attention sinks, position biases and non-causal layers.
    """
    if varlen_plan is None and cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.numel() == 0 and query.shape[2] > 0:
            raise ValueError(
                "packed positions without boundaries: pass cu_seq_lens_q to the model (if you did "
                "pass tree_plan or cu_seq_lens_q, this architecture drops keyword arguments)"
            )
        if softcap is not None:
            return _softcap_without_boundaries(query, key, value, attention_mask, scaling, softcap)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    check_packed_call(ATTENTION_NAME, module, query, key, dropout, kwargs)
    if varlen_plan is None:
        assert cu_seq_lens_q is not None
        varlen_plan = VarlenPlan.build(cu_seq_lens_q, query.shape[2])
    (query, key, value), no_autocast = as_autocast(query, key, value)
    with no_autocast:
        out = varlen_attention(
            query, key, value, varlen_plan,
            scale=scaling, sliding_window=sliding_window or None, softcap=softcap,
        )  # fmt: skip
    return out, None


def packed_mask(*, device: torch.device, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
    """SDPA's mask; for packed positions (found by transformers) the empty marker of `no_mask`."""
    packed = not allow_is_causal_skip and kwargs.get("attention_mask") is None
    if packed and kwargs["q_length"] == kwargs["kv_length"] and not kwargs.get("use_vmap"):
        return no_mask(device)
    return sdpa_mask(device=device, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


def register() -> None:
    """Make `attn_implementation="pyrl_varlen"` known to transformers; idempotent."""
    AttentionInterface.register(ATTENTION_NAME, pyrl_varlen_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, packed_mask)


register()
