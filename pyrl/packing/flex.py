"""Tree attention on CUDA: one FlexAttention kernel over the blocks that the tree mask touches.

    out = flex_attention(q, k, v, mask = (key <= query) & (query < last[key]))

The block mask comes from the least and greatest `last` of each block of keys, in O((T / 128)^2)
without a [T, T] mask. No CUDA device has run this path yet: the tests compare the block mask with
the dense mask, and FlexAttention's CPU forward (torch 2.13 has no CPU backward) with the oracle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pyrl.packing.tree_plan import TreePlan

BLOCK = 128


def flex_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """A CUDA tensor with a dtype and head dimensions that FlexAttention's kernels have."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    fits = min(query.shape[-1], value.shape[-1]) >= 16
    return query.is_cuda and query.dtype in dtypes and fits


def _extremes(values: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each block of 128 of values int32 [T] -> two [blocks].

    int32, because `F.pad` takes its value as a double, which has no greatest int64.
    """
    fill = torch.iinfo(values.dtype)
    tail = blocks * BLOCK - len(values)
    least = F.pad(values, (0, tail), value=fill.max).view(blocks, BLOCK).amin(1)
    return least, F.pad(values, (0, tail), value=fill.min).view(blocks, BLOCK).amax(1)


def touched_blocks(plan: TreePlan, window: int | None = None) -> tuple[Tensor, Tensor]:
    """bool [N, N] twice, query block by key block: the mask is partial there; it is full there.

    Exact without a window, but for diagonal blocks, which always count as partial. With one, a
    block may be called partial though it is full or empty; the mask function decides then.
    """
    tokens, device = plan.num_tokens, plan.last.device
    blocks = -(-tokens // BLOCK)
    first = torch.arange(blocks, device=device)[:, None] * BLOCK  # of the queries
    least, greatest = _extremes(plan.last, blocks)
    below = first > first.T
    touched = below & (greatest > first)
    full = below & (least >= (first + BLOCK).clamp_max(tokens))
    if window is not None:
        nearest, farthest = _extremes(plan.positions.to(torch.int32), blocks)
        touched &= nearest[:, None] - farthest < window
        full &= farthest[:, None] - nearest < window
    diagonal = torch.eye(blocks, dtype=torch.bool, device=device)
    return touched & ~full | diagonal, full


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [N, N] -> how many a row [1, 1, N], and their columns first [1, 1, N, N], int32."""
    columns = blocks.to(torch.uint8).argsort(stable=True, dim=1, descending=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


def mask_function(plan: TreePlan, window: int | None = None) -> Callable[..., Tensor]:
    """FlexAttention's mask_mod(batch, head, query, key) -> bool; see `tree_mask`."""
    last = plan.last
    if window is None:
        return lambda b, h, query, key: (key <= query) & (query < last[key])
    positions = plan.positions.to(torch.int32)
    return lambda b, h, query, key: (
        (key <= query) & (query < last[key]) & (positions[query] - positions[key] < window)
    )


def block_mask(plan: TreePlan, window: int | None = None) -> BlockMask:
    """The tree mask in blocks of 128, made once for a plan and window.

    FlexAttention takes lengths that are no multiple of the block: nothing is padded.
    """
    if window not in plan.block_masks:
        partial, full = touched_blocks(plan, window)
        plan.block_masks[window] = BlockMask.from_kv_blocks(
            *_ordered(partial), *_ordered(full),
            BLOCK_SIZE=BLOCK, mask_mod=mask_function(plan, window),
            seq_lengths=(plan.num_tokens, plan.num_tokens),
        )  # fmt: skip
    return plan.block_masks[window]


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    scale: float,
    window: int | None,
    softcap: float | None,
    kernel: Callable[..., Any] | None = None,
) -> Tensor:
    """query [1, H, T, d], key [1, K, T, d], value [1, K, T, e] -> [1, T, H, e].

    kernel: in place of the compiled `flex_attention`, for tests without a CUDA device.
    """
    capped = None
    if softcap is not None:

        def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

    out = (kernel or _compiled())(
        query, key, value, score_mod=capped, block_mask=block_mask(plan, window), scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2)
