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
from pyrl.packing.prefix_tree import TreeLayout, plan_tree

Ids = Sequence[int] | NDArray[Any] | Tensor
Floats = Sequence[float] | NDArray[Any] | Tensor
Int64 = NDArray[np.int64]


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


def _mask(value: Any, i: int, length: int) -> NDArray[np.bool_]:
    if value is None:
        return np.ones(length, dtype=bool)
    return _per_token(value, "mask", i, length, bool)


def _logprobs(samples: Sequence[Sample], name: str) -> NDArray[np.float32] | None:
    """The field of all completions end to end, NaN for samples without it; None if none has it."""
    if all(getattr(s, name) is None for s in samples):
        return None
    parts = [np.empty(0, np.float32)]
    for i, sample in enumerate(samples):
        value, length = getattr(sample, name), len(sample.completion)
        if value is None:
            parts.append(np.full(length, np.nan, dtype=np.float32))
        else:
            parts.append(_per_token(value, name, i, length, np.float32))
    return np.concatenate(parts)


def pack(
    samples: Sequence[Sample],
    capacity: int,
    *,
    share_prefix: bool = True,
    aligned: bool = True,
    segment_cost: float = 0.0,
) -> PackedBatch:
    """Lay S samples out in rows of at most `capacity` computed tokens, equal prefixes once a row.

    Samples of a row form a tree: what several begin with is computed once, and each goes on from
    there. A row holds the whole of every sample in it; a prompt whose samples need several rows is
    computed in each. Fewest tokens first, then fewest rows (best-fit decreasing); deterministic.
    No samples give an empty batch.

    `aligned`: the hidden state at token t predicts `target[t]`, as a loss over [T] wants it. Then
    a prompt's last token is computed once a sample, because every completion's first token is
    predicted from it, and nothing after it is shared. Without, `hidden_index` says which token
    predicts each target: all equal prefixes are shared, common beginnings of completions and
    identical samples too, at full length.

    `share_prefix=False` computes every sample on its own, prompt then completion. `segment_cost`:
    the tokens' worth of time that a further run of tokens costs; a prefix that saves less is not
    shared.

    Raises ValueError naming the sample and the value: capacity < 1, a sample longer than
    `capacity`, an empty prompt, a negative token id, a per-token field of another length than the
    completion, an advantage or weight that is not finite; a negative `segment_cost`.
    """
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

    # Where every token lies.
    prompt_sizes = np.array([p.size for p in prompts], dtype=np.int64)
    sizes = np.array([c.size for c in completions], dtype=np.int64)
    offsets = _edges(prompt_sizes + sizes)
    if offsets[-1] >= 2**31:
        raise ValueError(f"{offsets[-1]} tokens in one batch: cu_seqlens counts below 2^31")
    parts = [part for pair in zip(prompts, completions, strict=True) for part in pair]
    ids = np.concatenate([np.empty(0, np.int64), *parts])
    shareable = prompt_sizes - 1 if aligned else prompt_sizes + sizes
    layout = plan_tree(
        ids, offsets, shareable * bool(share_prefix), capacity, segment_cost=segment_cost
    )
    lengths = layout.end - layout.begin
    starts = _edges(lengths)
    tokens = ids[_ranges(offsets[layout.sequence] + layout.begin, lengths)]
    segments = np.arange(lengths.size)
    row_segments = np.searchsorted(layout.row, np.arange(layout.num_rows + 1))
    row_starts = starts[row_segments]  # the token each row starts at

    # Samples by the segment they end with, so that those of a row follow each other.
    order = np.lexsort((np.arange(sizes.size), layout.leaf))
    leaf = layout.leaf[order]
    bounds = np.append(0, starts[leaf + 1]) if aligned else _edges(sizes[order])
    predictors = _predictors(layout, starts, prompt_sizes, sizes, order)
    from_samples = _ranges(_edges(sizes)[order], sizes[order])

    def lay(values: NDArray[Any] | None, elsewhere: float) -> Tensor | None:
        """Values of all completions, in sample order, at the places of their targets."""
        if values is None:
            return None
        values = values[from_samples]
        if aligned:
            laid = np.full(tokens.size, elsewhere, dtype=values.dtype)
            laid[predictors] = values
            values = laid
        return torch.from_numpy(values)

    if aligned:
        hidden_index = None
        target = np.append(tokens[1:], 0)[: tokens.size]
        target[bounds[1:] - 1] = 0
    else:
        rows_of_targets = np.repeat(layout.row[leaf], sizes[order])
        hidden_index = torch.from_numpy(predictors - row_starts[rows_of_targets])
        target = np.concatenate([np.empty(0, np.int64), *completions])[from_samples]
    masks = [
        _mask(s.mask, i, c.size) for i, (s, c) in enumerate(zip(samples, completions, strict=True))
    ]
    advantages = [
        _advantage(s.advantage, i, c.size)
        for i, (s, c) in enumerate(zip(samples, completions, strict=True))
    ]
    loss_mask = lay(np.concatenate([np.empty(0, bool), *masks]), False)
    advantage = lay(np.concatenate([np.empty(0, np.float32), *advantages]), 0.0)
    assert loss_mask is not None and advantage is not None
    weights = np.array([s.weight for s in samples], dtype=np.float32)[order]
    parents = np.where(layout.parent < 0, segments, layout.parent)
    last = starts[layout.subtree] - row_starts[layout.row]
    sample_edges = np.searchsorted(layout.row[leaf], np.arange(layout.num_rows + 1))
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(_ranges(layout.begin, lengths)),
        group_ids=torch.from_numpy(np.repeat(segments, lengths)),
        parent_ids=torch.from_numpy(np.repeat(parents, lengths)),
        last=torch.from_numpy(np.repeat(last, lengths).astype(np.int32)),
        hidden_index=hidden_index,
        target=torch.from_numpy(target),
        loss_mask=loss_mask,
        advantages=advantage,
        weights=torch.from_numpy(np.repeat(weights, np.diff(bounds))),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        bounds=torch.from_numpy(bounds),
        sequence_ids=torch.from_numpy(order),
        sequence_segments=torch.from_numpy(leaf),
        prompt_lengths=torch.from_numpy(prompt_sizes[order]),
        completion_lengths=torch.from_numpy(sizes[order]),
        segment_starts=torch.from_numpy(starts),
        segment_parents=torch.from_numpy(layout.parent),
        rows=tuple(itertools.pairwise(sample_edges.tolist())),
        row_segments=tuple(itertools.pairwise(row_segments.tolist())),
        capacity=capacity,
        **{name: lay(_logprobs(samples, name), np.nan) for name in _LOGPROBS},
    )


_LOGPROBS = ("old_logprob", "ref_logprob", "rollout_logprob")


def _edges(sizes: Int64) -> Int64:
    """0 and the cumulative sums: n sizes -> n + 1 edges."""
    return np.concatenate([np.zeros(1, np.int64), sizes.cumsum()])


def _ranges(starts: Int64, sizes: Int64) -> Int64:
    """starts[0], starts[0] + 1, ... (sizes[0] of them), starts[1], ..."""
    return np.arange(sizes.sum()) + np.repeat(starts - _edges(sizes)[:-1], sizes)


def _predictors(
    layout: TreeLayout, starts: Int64, prompt_sizes: Int64, sizes: Int64, order: Int64
) -> Int64:
    """The tokens that predict the completions of the samples in `order`, end to end.

    Of a sample with P prompt and C completion tokens those at P-1 ... P+C-2 on its path, which is
    followed from its last segment up, for all samples at once.
    """
    begin, stop = prompt_sizes[order] - 1, prompt_sizes[order] + sizes[order] - 1
    edges = _edges(sizes[order])
    found = np.empty(edges[-1], np.int64)
    at, segment = np.arange(order.size), layout.leaf[order]
    while at.size:
        first = np.maximum(begin[at], layout.begin[segment])
        count = np.maximum(np.minimum(stop[at], layout.end[segment]) - first, 0)
        places = _ranges(edges[at] + first - begin[at], count)
        found[places] = _ranges(starts[segment] + first - layout.begin[segment], count)
        above = layout.begin[segment] > begin[at]
        at, segment = at[above], layout.parent[segment[above]]
    return found
