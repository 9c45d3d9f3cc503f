"""The decode-time KV cache and the attention that reads it, for any Hugging Face decoder.

The cache is what a model gets as `past_key_values`; the attention is registered under the name
`pyrl_decode` and is in force only inside `decoding(model, cache)`, so the trainer's own attention
is never disturbed. Letters: B live rows, Hk KV heads, G query heads per KV head, E head size,
L allocated slots, T packed prompt tokens.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "pyrl_decode"
#: The cache grows by this many slots at a time: growing copies it, and attention runs over every
#: allocated slot (contiguous batches of matrices are twice as fast as strided ones on a CPU).
GROWTH = 32

_active: contextvars.ContextVar[KVCache] = contextvars.ContextVar("pyrl_decode_cache")


class KVCache:
    """Keys and values [B, Hk, L, E] per layer, prompts right-aligned at slot `width`.

    A row's valid slots are [width - prompt length, next), so decoded tokens of all rows share a
    slot index and only the left edge is ragged. Two phases:
    `start_prefill(lengths, owners)`: one forward over packed prompts [1, T] fills, for prompt i,
    the rows `owners[i]` (a slice: its samples); then, for every token, `start_decode()` and one
    forward [B, 1].
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.rows, self.width, self.device = rows, width, device
        self.capacity = width + GROWTH
        self.next = width
        self.starts = torch.zeros(rows, dtype=torch.long, device=device)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.prefilling = False
        self.lengths: list[int] = []
        self._owners: list[slice] = []
        self._masks: dict[int | None, Tensor] = {}

    # -- phases ------------------------------------------------------------------------------
    def start_prefill(self, lengths: Sequence[int], owners: Sequence[slice]) -> None:
        """The next forward is over prompts of these lengths, end to end in one row."""
        self.prefilling = True
        self.lengths, self._owners = list(lengths), list(owners)
        for length, owner in zip(lengths, owners, strict=True):
            self.starts[owner] = self.width - length

    def start_decode(self) -> None:
        """Make room for one more token; the next forward writes it at slot `next`."""
        if self.prefilling:
            self.prefilling = False
        else:
            self.next += 1
        if self.next == self.capacity:
            self.capacity += GROWTH
            for store in (self.keys, self.values):
                for layer, old in store.items():
                    store[layer] = F.pad(old[: self.rows], (0, 0, 0, GROWTH))
        self._masks.clear()

    def drop(self, finished: Tensor) -> Tensor:
        """Remove the rows where `finished` [B]; returns the old index of every remaining row.

        Rows from the end move into the holes, so the cost is that of the rows moved.
        """
        keep = int((~finished).sum())
        order = torch.arange(self.rows, device=self.device)
        holes = finished[:keep].nonzero()[:, 0]
        movers = keep + (~finished[keep:]).nonzero()[:, 0]
        order[holes] = movers
        order = order[:keep]
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[holes] = tensor[movers]
        self.starts = self.starts[order]
        self.rows = keep
        self._masks.clear()
        return order

    # -- what models call --------------------------------------------------------------------
    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; returns what `pyrl_decode` attends over."""
        if self.prefilling:
            self._fill(self.keys, key, layer)
            self._fill(self.values, value, layer)
            return key, value
        keys, values = self.keys[layer][: self.rows], self.values[layer][: self.rows]
        keys[:, :, self.next] = key[:, :, 0]
        values[:, :, self.next] = value[:, :, 0]
        return keys, values

    def _fill(self, store: dict[int, Tensor], new: Tensor, layer: int) -> None:
        if layer not in store:
            # Zeros, not empty: unwritten slots get probability 0, and 0 * garbage may be NaN.
            store[layer] = new.new_zeros(self.rows, new.shape[1], self.capacity, new.shape[3])
        begin = 0
        for length, owner in zip(self.lengths, self._owners, strict=True):
            store[layer][owner, :, self.width - length : self.width] = new[
                :, :, begin : begin + length
            ]
            begin += length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots written, which is what transformers means by a cache's length."""
        return 0 if self.prefilling else self.next

    def mask(self, window: int | None) -> Tensor:
        """[B, 1, 1, L] fp32, 0 where a decoded token may look and -inf elsewhere."""
        if window not in self._masks:
            slot = torch.arange(self.capacity, device=self.device)
            seen = (slot >= self.starts[:, None]) & (slot <= self.next)
            if window is not None:
                seen &= slot > self.next - window
            zero = torch.zeros((), device=self.device)
            self._masks[window] = torch.where(seen, zero, -torch.inf)[:, None, None, :]
        return self._masks[window]


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(softcap(q k^T * scaling) + mask) v for the active `KVCache` -> [B, Q, H, E].

    query [B, H, Q, E]; key, value as `KVCache.update` returned them. Keys are causal and inside
    `sliding_window` where the model has one. Softmax in fp32.
    Raises ValueError for attention terms it does not know (sinks, position bias).
    """
    for term in ("s_aux", "position_bias"):
        if kwargs.get(term) is not None:
            raise ValueError(
                f"rollout attention: {term} is not supported ({type(module).__name__})"
            )
    cache = _active.get()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not cache.prefilling:
        return _attend_one(query, key, value, cache.mask(sliding_window), scale, softcap), None
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    out = torch.empty_like(query[..., : value.shape[-1]])
    begin = 0
    for length in cache.lengths:
        span = slice(begin, begin + length)
        out[:, :, span] = _attend_causal(
            query[:, :, span], key[:, :, span], value[:, :, span], scale, sliding_window, softcap
        )
        begin += length
    return out.transpose(1, 2).contiguous(), None


def _attend_one(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """One query a row: [B, H, 1, E] over [B, Hk, L, E] -> [B, 1, H, E], no repeated KV heads."""
    rows, heads, _, size = query.shape
    kv_heads, slots = key.shape[1:3]
    grouped = query.reshape(rows * kv_heads, heads // kv_heads, size)
    scores = torch.bmm(grouped, key.view(rows * kv_heads, slots, size).transpose(1, 2))
    scores = scores.view(rows, kv_heads, heads // kv_heads, slots).float().mul_(scale)
    if softcap:
        scores = (scores / softcap).tanh_().mul_(softcap)
    prob = scores.add_(mask).softmax(-1).to(value.dtype).view(rows * kv_heads, -1, slots)
    out = torch.bmm(prob, value.view(rows * kv_heads, slots, value.shape[-1]))
    return out.view(rows, 1, heads, -1)


def _attend_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One whole sequence: [1, H, n, E] over [1, H, n, E]."""
    length = query.shape[2]
    windowed = window is not None and length > window
    if not windowed and not softcap:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if windowed:
        seen &= ~seen.tril(-window)  # type: ignore[operator]
    if not softcap:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    scores = (scores / softcap).tanh() * softcap
    return torch.matmul(scores.masked_fill(~seen, -torch.inf).softmax(-1).to(value.dtype), value)


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Run `model` with `pyrl_decode`, in eval mode; its attention and modes are put back after."""
    # transformers' own registry; a name without a mask function gets no mask built for it.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        for m in training:
            m.training = True


@contextlib.contextmanager
def using(cache: KVCache) -> Iterator[None]:
    """Let `pyrl_decode` read `cache` in this thread, without gradients.

    `no_grad` and not `inference_mode`: some rotary embeddings keep buffers they computed in a
    forward, and the trainer's next backward must be able to use them.
    """
    token = _active.set(cache)
    try:
        with torch.no_grad():
            yield
    finally:
        _active.reset(token)
