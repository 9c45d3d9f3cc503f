"""`Sample` and `pack`: sampled completions to a `PackedBatch`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrl.packing.batch import PackedBatch
from pyrl.packing.planner import best_fit

Ids = Sequence[int] | NDArray[Any] | Tensor
Floats = Sequence[float] | NDArray[Any] | Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One completion of one prompt; all fields per completion token have the completion's length.

    Token ids and per-token fields are lists, 1-D arrays or 1-D tensors.
    """

    prompt: Ids
    """At least one token id: the first completion token is predicted from the last of these."""
    completion: Ids
    """Token ids, the stop token included; may be empty."""
    old_logprob: Floats | None = None
    """Log-probs under the policy that ratios are taken against; NaN = missing."""
    ref_logprob: Floats | None = None
    """Log-probs under the frozen reference; NaN = missing."""
    rollout_logprob: Floats | None = None
    """Log-probs that the sampler reported; NaN = missing."""
    advantage: float | Floats = 0.0
    """One finite number, or one per completion token."""
    mask: Sequence[bool] | NDArray[Any] | Tensor | None = None
    """True = the completion token carries loss; None = all do."""
    weight: float = 1.0
    """Weight of the sample under `aggregation="weighted"`."""


def _array(value: Any, name: str, i: int) -> NDArray[Any]:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.ndim != 1:
        raise ValueError(f"sample {i}: {name} of shape {list(array.shape)}, expected one dimension")
    return array


def _ids(value: Ids, name: str, i: int) -> NDArray[np.int64]:
    array = _array(value, name, i)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"sample {i}: {name} of dtype {array.dtype}, expected integer token ids")
    if array.min() < 0:
        at = int(np.flatnonzero(array < 0)[0])
        raise ValueError(f"sample {i}: {name}[{at}]={array[at]}, expected a token id >= 0")
    return array.astype(np.int64, copy=False)


def _per_token(value: Any, name: str, i: int, length: int, dtype: Any) -> NDArray[Any]:
    array = _array(value, name, i)
    if array.shape[0] != length:
        raise ValueError(
            f"sample {i}: {name} has {array.shape[0]} values for {length} completion tokens"
        )
    return array.astype(dtype, copy=False)


def _advantage(value: Any, i: int, length: int) -> NDArray[np.float32]:
    if np.ndim(value) == 0:
        array = np.full(max(length, 1), float(value), dtype=np.float32)
    else:
        array = _per_token(value, "advantage", i, length, np.float32)
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"sample {i}: advantage={array[at]} at completion token {at}, not finite")
    return array[:length]


def _logprobs(
    samples: Sequence[Sample], name: str, lengths: list[int], order: list[int]
) -> NDArray[np.float32] | None:
    """The field of all completions end to end in packed order, NaN for samples without it."""
    if all(getattr(s, name) is None for s in samples):
        return None
    parts = []
    for i in order:
        value = getattr(samples[i], name)
        if value is None:
            parts.append(np.full(lengths[i], np.nan, dtype=np.float32))
        else:
            parts.append(_per_token(value, name, i, lengths[i], np.float32))
    return np.concatenate(parts)


def pack(samples: Sequence[Sample], capacity: int, *, share_prefix: bool = False) -> PackedBatch:
    """Lay S samples end to end in rows of at most `capacity` tokens, by best-fit decreasing.

    Every sample is one sequence, prompt then completion, and lies whole in one row; within a row
    samples keep their order. Deterministic. No samples give an empty batch.

    Raises ValueError naming the sample and the value: capacity < 1, a sample longer than
    `capacity`, an empty prompt, a negative token id, a per-token field of another length than the
    completion, an advantage or weight that is not finite. NotImplementedError for `share_prefix`.
    """
    if share_prefix:
        raise NotImplementedError("pack(share_prefix=True): shared prefixes are not there yet")
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: expected a number of tokens >= 1")
    prompts = [_ids(s.prompt, "prompt", i) for i, s in enumerate(samples)]
    completions = [_ids(s.completion, "completion", i) for i, s in enumerate(samples)]
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if prompt.size == 0:
            raise ValueError(f"sample {i}: prompt has 0 tokens, expected at least one")
        if prompt.size + completion.size > capacity:
            raise ValueError(
                f"sample {i}: {prompt.size + completion.size} tokens ({prompt.size} prompt + "
                f"{completion.size} completion) exceed capacity={capacity}"
            )
        if not np.isfinite(samples[i].weight):
            raise ValueError(f"sample {i}: weight={samples[i].weight}, not finite")

    prompt_lengths = np.array([p.size for p in prompts], dtype=np.int64)
    completion_lengths = np.array([c.size for c in completions], dtype=np.int64)
    lengths = prompt_lengths + completion_lengths
    if lengths.sum() >= 2**31:
        raise ValueError(f"{lengths.sum()} tokens in one batch: cu_seqlens counts below 2^31")
    bins = best_fit(lengths, capacity)
    packed = np.argsort(bins, kind="stable")
    order = packed.tolist()

    # Everything below is in packed order.
    prompt_lengths, lengths = prompt_lengths[packed], lengths[packed]
    cu_seqlens = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    empty = np.empty(0, np.int64)
    tokens = np.concatenate(
        [empty, *(part for i in order for part in (prompts[i], completions[i]))]
    )
    within = np.arange(tokens.size) - np.repeat(cu_seqlens[:-1], lengths)
    target = np.append(tokens[1:], 0)[: tokens.size]
    target[cu_seqlens[1:] - 1] = 0
    # Where the hidden state predicts a completion token; in order, so that completions laid end
    # to end drop into place.
    predicts = (within >= np.repeat(prompt_lengths - 1, lengths)) & (
        within < np.repeat(lengths - 1, lengths)
    )
    sizes = completion_lengths.tolist()

    def place(values: NDArray[Any] | None, elsewhere: float) -> Tensor | None:
        if values is None:
            return None
        placed = np.full(tokens.size, elsewhere, dtype=values.dtype)
        placed[predicts] = values
        return torch.from_numpy(placed)

    masks = [
        np.ones(sizes[i], dtype=bool)
        if samples[i].mask is None
        else _per_token(samples[i].mask, "mask", i, sizes[i], bool)
        for i in order
    ]
    advantages = [_advantage(samples[i].advantage, i, sizes[i]) for i in order]
    loss_mask = place(np.concatenate([np.empty(0, bool), *masks]), False)
    advantage = place(np.concatenate([np.empty(0, np.float32), *advantages]), 0.0)
    assert loss_mask is not None and advantage is not None
    weights = np.array([samples[i].weight for i in order], dtype=np.float32)
    ids = torch.from_numpy(np.repeat(packed, lengths))
    logprobs = {
        name: place(_logprobs(samples, name, sizes, order), np.nan)
        for name in ("old_logprob", "ref_logprob", "rollout_logprob")
    }
    edges = [*np.flatnonzero(np.diff(bins[packed], prepend=-1)).tolist(), len(order)]
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(within),
        group_ids=ids,
        parent_ids=ids,
        target=torch.from_numpy(target),
        loss_mask=loss_mask,
        advantages=advantage,
        weights=torch.from_numpy(np.repeat(weights, lengths)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        sequence_ids=torch.from_numpy(packed),
        prompt_lengths=torch.from_numpy(prompt_lengths),
        completion_lengths=torch.from_numpy(completion_lengths[packed]),
        rows=tuple(itertools.pairwise(edges)),
        capacity=capacity,
        **logprobs,
    )
