"""Exact attention over packed rows with shared prefixes, registered with transformers.

    out_t = sum_{u on the path of t} softmax_u(scale * q_t . k_u) v_u

The path of t: its own segment up to t and all ancestor segments (`TreePlan`). Every prefix is
computed once, and its keys and values receive the gradients of all branches; cost grows with the
attended pairs (`plan.area`), not with T^2. The plan travels as the keyword argument `tree_plan` of
the model call, with `attention_mask=no_mask(device)` and path positions as `position_ids`; without
it `pyrl_tree` is `pyrl_varlen` (boundaries, or plain SDPA with a KV cache).

On the CPU each run of tokens is one causal flash call plus, if it has descendants, one dense flash
call of their queries against its keys. Partial softmaxes merge by their log-sum-exp; given the
merged output and log-sum-exp, each call's own backward is its exact share of the gradient (as in
ring attention). On CUDA one FlexAttention kernel (`flex`; it has not run on a device yet). What
neither takes (CPU: softcap, active sliding windows, value dimension e != d; CUDA: float64, head
dimensions below 16) gathers each run's path and calls SDPA.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface

from pyrl.packing.attention import (
    VarlenPlan,
    as_autocast,
    attend_softcap,
    check_options,
    check_packed_call,
    packed_mask,
    pyrl_varlen_forward,
    varlen_attention,
    widen,
)
from pyrl.packing.flex import attend_flex, flex_takes
from pyrl.packing.tree_plan import TreePlan, tree_mask

__all__ = [
    "TREE_ATTENTION_NAME",
    "TreePlan",
    "pyrl_tree_forward",
    "register",
    "tree_attention",
    "tree_attention_dense",
    "tree_mask",
]

TREE_ATTENTION_NAME = "pyrl_tree"


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """torch's CPU flash attention -> out [1, H, L, d], natural log-sum-exp [1, H, L].

    The operator under SDPA, which does not return the log-sum-exp. Its kernels divide by the
    lengths and by H / K and read rows as dense: callers pass neither 0 tokens nor odd strides.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, scale=scale
    )


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )


def _dense_rows(x: Tensor) -> Tensor:
    """x [1, H, T, d] with rows that `_flash` can read: no copy for a transposed projection."""
    return x if x.stride(3) == 1 and x.stride(2) >= x.shape[3] else x.contiguous()


class _TreeFlash(torch.autograd.Function):
    """query [1, H, T, d], key and value [1, K, T, d] -> [1, T, H, d]; on the CPU."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float
    ) -> Tensor:
        query, key, value = (_dense_rows(x) for x in (query, key, value))
        _, heads, tokens, dim = query.shape
        out = query.new_empty(1, tokens, heads, dim)
        rows, lse = out.transpose(1, 2), query.new_empty(1, heads, tokens)
        for run in plan.runs:
            own = slice(run.start, run.stop)
            rows[:, :, own], lse[:, :, own] = _flash(
                query[:, :, own], key[:, :, own], value[:, :, own], True, scale
            )
        for run in plan.runs:
            if run.stop == run.end:
                continue
            own, below = slice(run.start, run.stop), slice(run.stop, run.end)
            part, part_lse = _flash(
                query[:, :, below], key[:, :, own], value[:, :, own], False, scale
            )
            total = torch.logaddexp(lse[:, :, below], part_lse)
            rows[:, :, below].lerp_(part, (part_lse - total).exp_().unsqueeze(-1))
            lse[:, :, below] = total
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad, rows = grad.contiguous().transpose(1, 2), out.transpose(1, 2)
        grads = [torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value)]

        def partial(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            return _flash_backward(
                grad[:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys],
                rows[:, :, queries], lse[:, :, queries], causal, ctx.scale,
            )  # fmt: skip

        for run in ctx.plan.runs:
            own = slice(run.start, run.stop)
            for total, share in zip(grads, partial(own, own, True), strict=True):
                total[:, :, own] = share
        for run in ctx.plan.runs:
            if run.stop == run.end:
                continue
            own, below = slice(run.start, run.stop), slice(run.stop, run.end)
            shares = partial(below, own, False)
            for total, share, at in zip(grads, shares, (below, own, own), strict=True):
                total[:, :, at] += share
        return *grads, None, None


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One masked attention a run over the keys of its path (those within the window's reach).

    Copies each path's keys and values once for each run below it.
    """
    # split, not slices: its backward is one concatenation (see varlen_attention)
    lengths = [run.stop - run.start for run in plan.runs]
    keys, values = key.split(lengths, 2), value.split(lengths, 2)
    outs = []
    for at, (run, q) in enumerate(zip(plan.runs, query.split(lengths, 2), strict=True)):
        positions = torch.arange(run.offset, run.offset + lengths[at], device=query.device)
        first = 0 if window is None else max(0, run.offset - window + 1)
        path = [*(p for p in plan.path(at) if plan.runs[p].offset + lengths[p] > first), at]
        skip = max(0, first - plan.runs[path[0]].offset)  # of the first run that is in reach
        k = torch.cat([keys[p] for p in path], 2)[:, :, skip:]
        v = torch.cat([values[p] for p in path], 2)[:, :, skip:]
        distance = positions[:, None] - torch.arange(
            run.offset + lengths[at] - k.shape[2], run.offset + lengths[at], device=query.device
        )
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        if softcap is not None:
            out = attend_softcap(q, k, v, scale, softcap, mask)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, 1)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> None:
    if not isinstance(plan, TreePlan):
        raise ValueError(f"plan={plan!r}: expected a TreePlan")
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or len(query) != 1:
        raise ValueError(f"{shapes}: expected [1, H, T, d], [1, K, T, d], [1, K, T, e]")
    if key.shape[:3] != value.shape[:3] or len(key) != 1 or query.shape[3] != key.shape[3]:
        raise ValueError(f"{shapes}: expected [1, H, T, d], [1, K, T, d], [1, K, T, e]")
    if key.shape[1] == 0 or query.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"{shapes}: {query.shape[1]} heads are no multiple of {key.shape[1]}")
    if not query.shape[2] == key.shape[2] == plan.num_tokens:
        raise ValueError(f"{shapes}: the plan has {plan.num_tokens} tokens")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"dtypes {query.dtype}, {key.dtype}, {value.dtype}: expected one")
    if query.shape[3] == 0 or value.shape[3] == 0:
        raise ValueError(f"{shapes}: expected d, e >= 1")
    check_options(query, scale, window, softcap)


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention along the paths of the plan (formula at the top of this file).

    query [1, H, T, d], key [1, K, T, d], value [1, K, T, e] with H a multiple of K -> [1, T, H, e]
    in query's dtype; differentiable once. scale defaults to d^-1/2; a window counts along the path
    (the last `sliding_window` tokens of it); scores become softcap * tanh(scores / softcap). Half
    precision is computed in float32 on the CPU. Raises ValueError for other shapes, a dtype that
    is no floating point of 2 to 8 bytes, a scale or softcap <= 0, a window < 1.
    """
    _check(query, key, value, plan, scale, sliding_window, softcap)
    if plan.is_flat:
        return varlen_attention(
            query, key, value, plan.varlen,
            scale=scale, sliding_window=sliding_window, softcap=softcap,
        )  # fmt: skip
    dtype = query.dtype
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    active = sliding_window is not None and sliding_window < plan.max_length
    window = sliding_window if active else None
    if flex_takes(query, key, value):
        return attend_flex(query, key, value, plan, scale, window, softcap)
    query, key, value = (widen(x) for x in (query, key, value))
    same = query.shape[3] == value.shape[3]
    if query.device.type == "cpu" and window is None and softcap is None and same:
        return _TreeFlash.apply(query, key, value, plan, scale).to(dtype)
    return _gathered(query, key, value, plan, scale, window, softcap).to(dtype)


def tree_attention_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(where(tree_mask, scale * q k^T, -inf)) v in the inputs' dtype: the oracle, O(T^2)."""
    _check(query, key, value, plan, scale, sliding_window, softcap)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~tree_mask(plan, sliding_window), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


#: Plan -> the position_ids that were found equal to its positions.
_FITTING: weakref.WeakKeyDictionary[TreePlan, weakref.ref[Tensor]] = weakref.WeakKeyDictionary()


def _check_positions(position_ids: Tensor | None, plan: TreePlan) -> None:
    """ValueError unless position_ids [T] or [1, T] are the plan's path positions.

    Without any, transformers counts along the row and every branch after the first is wrong. All
    layers of a model call get the same tensor, so the comparison, which waits for the device, is
    made once a call.
    """
    if position_ids is None or torch.compiler.is_compiling():
        return
    if (known := _FITTING.get(plan)) is not None and known() is position_ids:
        return
    if position_ids.shape not in ((plan.num_tokens,), (1, plan.num_tokens)):
        return  # several axes, or none of the row's: the model's own business
    wrong = (position_ids.detach().flatten() != plan.positions.to(position_ids.device)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"position_ids[{at}]={position_ids.flatten()[at].item()}: expected "
            f"{int(plan.positions[at])}, the tokens above it on its path; call the model with "
            "position_ids=tree_plan.positions[None]"
        )
    _FITTING[plan] = weakref.ref(position_ids)


def pyrl_tree_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree_plan: TreePlan | None = None,
    cu_seq_lens_q: Tensor | None = None,
    varlen_plan: VarlenPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`tree_attention` behind transformers' attention protocol, q [B, H, L, d] -> [B, L, H, d].

    Without `tree_plan` this is `pyrl_varlen_forward`. Raises NotImplementedError for dropout,
    attention sinks, position biases and non-causal layers, ValueError for more than one row, a
    cache, a plan beside other boundaries or a mask, or position_ids that are not the plan's. Under
    autocast q, k and v are cast to its dtype, as SDPA does.
    """
    packed = not (tree_plan is None and cu_seq_lens_q is None and varlen_plan is None)
    if packed:
        check_packed_call(TREE_ATTENTION_NAME, module, query, key, dropout, kwargs)
    if tree_plan is None:
        return pyrl_varlen_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window, softcap,
            cu_seq_lens_q, varlen_plan, **kwargs,
        )  # fmt: skip
    if varlen_plan is not None or cu_seq_lens_q is not None:
        raise ValueError("tree_plan beside varlen_plan or cu_seq_lens_q: give one of them")
    if attention_mask is not None and attention_mask.numel() > 0:  # perhaps a sparse layer's own
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)} beside tree_plan: the plan is "
            "the mask; call the model with attention_mask=no_mask(device)"
        )
    if isinstance(tree_plan, TreePlan):  # `tree_attention` refuses what is none
        _check_positions(kwargs.get("position_ids"), tree_plan)
    (query, key, value), no_autocast = as_autocast(query, key, value)
    with no_autocast:
        out = tree_attention(
            query, key, value, tree_plan,
            scale=scaling, sliding_window=sliding_window or None, softcap=softcap,
        )  # fmt: skip
    return out, None


def register() -> None:
    """Make `attn_implementation="pyrl_tree"` known to transformers; idempotent."""
    AttentionInterface.register(TREE_ATTENTION_NAME, pyrl_tree_forward)
    AttentionMaskInterface.register(TREE_ATTENTION_NAME, packed_mask)


register()
