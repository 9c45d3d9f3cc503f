"""`Sample` and `pack`: sampled completions to a `PackedBatch`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
import sys
from collections.abc import Iterable, Sequence
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

_LOGPROBS = ("old_logprob", "ref_logprob", "rollout_logprob")


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
    """Log-probs under the policy that ratios are taken against; NaN or None = missing."""
    ref_logprob: Floats | None = None
    """Log-probs under the frozen reference; NaN or None = missing."""
    rollout_logprob: Floats | None = None
    """Log-probs that the sampler reported; NaN or None = missing."""
    advantage: float | Floats = 0.0
    """One finite number, or one per completion token."""
    mask: Sequence[bool] | NDArray[Any] | Tensor | None = None
    """True or 1 = the completion token carries loss, False or 0 = not; None = all do."""
    weight: float = 1.0
    """Weight of the sample under `aggregation="weighted"`."""


@dataclasses.dataclass(frozen=True)
class _Columns:
    """S checked samples, each field end to end in sample order; N tokens, M of completions."""

    ids: Int64
    """[N] prompt and completion of each sample"""
    prompt_sizes: Int64
    """[S]"""
    sizes: Int64
    """[S] completion tokens"""
    loss_mask: NDArray[np.bool_]
    """[M]"""
    advantages: NDArray[np.float32]
    """[M]"""
    weights: NDArray[np.float32]
    """[S]"""
    logprobs: dict[str, NDArray[np.float32] | None]
    """[M] each, NaN where missing; None for a field that no sample has"""


@np.errstate(over="ignore")  # what is infinite in float32 is refused, or a log-prob of -inf
def _columns(samples: list[Sample], capacity: int) -> _Columns:
    """The fields of all samples, or the ValueError that `pack` promises."""
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
    sizes = [c.size for c in completions]
    masks = [_mask(s.mask, i, sizes[i]) for i, s in enumerate(samples)]
    advantages = [_advantage(s.advantage, i, sizes[i]) for i, s in enumerate(samples)]
    parts = [part for pair in zip(prompts, completions, strict=True) for part in pair]
    return _Columns(
        ids=np.concatenate([np.empty(0, np.int64), *parts]),
        prompt_sizes=np.array([p.size for p in prompts], dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64),
        loss_mask=np.concatenate([np.empty(0, bool), *masks]),
        advantages=np.concatenate([np.empty(0, np.float32), *advantages]),
        weights=np.array(
            [_number(s.weight, "weight", i) for i, s in enumerate(samples)], dtype=np.float32
        ),
        logprobs={name: _logprobs(samples, name, sizes) for name in _LOGPROBS},
    )


def _array(value: Any, name: str, i: int) -> NDArray[Any]:
    try:
        if not isinstance(value, Tensor):
            return np.asarray(value)
        value = value.detach().cpu()
        # NumPy has no bfloat16 and no float8.
        if value.is_floating_point() and value.dtype != torch.float64:
            value = value.float()
        return value.numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"sample {i}: {name} cannot be read as an array: {error}") from error


def _vector(value: Any, name: str, i: int) -> NDArray[Any]:
    array = _array(value, name, i)
    if array.ndim != 1:
        raise ValueError(f"sample {i}: {name} of shape {list(array.shape)}, expected one dimension")
    return array


def _ids(value: Ids, name: str, i: int) -> Int64:
    array = _vector(value, name, i)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    # Cast to int64, ids of 2^63 and more are negative too.
    if array.dtype.kind in "iu" and (found := array.astype(np.int64, copy=False)).min() >= 0:
        return found
    for at, x in enumerate(_elements(value, array)):
        if isinstance(x, int | np.integer) and not 0 <= x < 2**63:
            raise ValueError(f"sample {i}: {name}[{at}]={x}, expected a token id >= 0 and < 2^63")
    raise ValueError(f"sample {i}: {name} of dtype {array.dtype}, expected integer token ids")


def _elements(value: Any, array: NDArray[Any]) -> Sequence[Any]:
    """A list as it was given: NumPy makes floats of [1, 2**63] and strings of [True, "a"]."""
    given = isinstance(value, list | tuple) and array.dtype.kind not in "biu"
    return value if given else array.tolist()


def _per_token(value: Any, name: str, i: int, length: int) -> NDArray[Any]:
    array = _vector(value, name, i)
    if array.shape[0] != length:
        raise ValueError(
            f"sample {i}: {name} has {array.shape[0]} values for {length} completion tokens"
        )
    return array


def _float32(array: NDArray[Any], name: str, i: int) -> NDArray[np.float32]:
    """Numbers beyond float32 become infinite, None becomes NaN."""
    if array.dtype.kind not in "biufO":
        raise ValueError(f"sample {i}: {name} of dtype {array.dtype}, expected numbers")
    if array.dtype.kind == "O":
        for at, x in enumerate(array.tolist()):
            # Infinity and NaN are floats; float() of a larger integer raises.
            if x is not None and (not _real(x) or sys.float_info.max < abs(x) < math.inf):
                raise ValueError(f"sample {i}: {name}[{at}]={x!r}, expected a number")
    return array.astype(np.float32, copy=False)


def _number(value: Any, name: str, i: int) -> np.float32:
    array = _array(value, name, i)
    if array.ndim or array.dtype.kind not in "biuf":
        raise ValueError(f"sample {i}: {name}={value!r}, expected a finite number")
    number = np.float32(array[()])
    if not math.isfinite(number):
        raise ValueError(f"sample {i}: {name}={value}, not finite in float32")
    return number


def _advantage(value: Any, i: int, length: int) -> NDArray[np.float32]:
    array = _array(value, "advantage", i)
    if array.ndim == 0:
        return np.full(length, _number(value, "advantage", i))
    array = _float32(_per_token(array, "advantage", i, length), "advantage", i)
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"sample {i}: advantage={array[at]} at completion token {at}, not finite")
    return array


def _mask(value: Any, i: int, length: int) -> NDArray[np.bool_]:
    if value is None:
        return np.ones(length, dtype=bool)
    array = _per_token(value, "mask", i, length)
    kind = array.dtype.kind
    if kind not in "biu" or (kind != "b" and ((array != 0) & (array != 1)).any()):
        for at, x in enumerate(_elements(value, array)):
            if not (isinstance(x, bool | np.bool_ | int | np.integer) and x in (0, 1)):
                raise ValueError(f"sample {i}: mask[{at}]={x!r}, expected True, False, 1 or 0")
    return array.astype(bool, copy=False)


def _logprobs(samples: list[Sample], name: str, sizes: list[int]) -> NDArray[np.float32] | None:
    """The field of all completions end to end, NaN for samples without it; None if none has it."""
    if all(getattr(s, name) is None for s in samples):
        return None
    parts = [np.empty(0, np.float32)]
    for i, (sample, length) in enumerate(zip(samples, sizes, strict=True)):
        value = getattr(sample, name)
        if value is None:
            parts.append(np.full(length, np.nan, dtype=np.float32))
            continue
        array = _float32(_per_token(value, name, i, length), name, i)
        if (infinite := array == np.inf).any():
            at = int(infinite.argmax())
            raise ValueError(f"sample {i}: {name}[{at}]=inf in float32, expected a log-prob")
        parts.append(array)
    return np.concatenate(parts)


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def _check_capacity(capacity: Any) -> int:
    if _real(capacity) and 1 <= capacity < 2**63 and capacity % 1 == 0:
        return int(capacity)
    raise ValueError(f"capacity={capacity!r}: expected a whole number of tokens >= 1 and < 2^63")


def _check_cost(name: str, cost: Any) -> float:
    if _real(cost) and 0 <= cost <= sys.float_info.max:
        return float(cost)
    raise ValueError(f"{name}={cost!r}: expected a finite number >= 0")


def pack(
    samples: Iterable[Sample],
    capacity: int,
    *,
    share_prefix: bool = True,
    aligned: bool = True,
    segment_cost: float = 0.0,
    area_cost: float = 0.0,
) -> PackedBatch:
    """Lay S samples out in rows of at most `capacity` computed tokens, equal prefixes once a row.

    Samples of a row form a tree: what several begin with is computed once, and each goes on from
    there. A row holds the whole of every sample in it; a prompt whose samples need several rows is
    computed in each. Fewest tokens come before fewest rows; deterministic.
    No samples give an empty batch.

    `aligned`: the hidden state at token t predicts `target[t]`, as a loss over [T] wants it. Then
    a prompt's last token is computed once a sample, because every completion's first token is
    predicted from it, and nothing after it is shared. Without, `hidden_index` says which token
    predicts each target: all equal prefixes are shared, common beginnings of completions and
    identical samples too, at full length.

    `share_prefix=False` computes every sample on its own, prompt then completion. What else takes
    time, in computed tokens: `segment_cost` a further segment, `area_cost` an attended (query, key)
    pair; a prefix is shared where that lowers the total.

    Raises ValueError naming the sample, the field and the value: a capacity that is no whole number
    of tokens in [1, 2^63), a cost that is no finite number >= 0; a sample longer than
    `capacity`, an empty prompt, a token id outside [0, 2^63), a per-token field of another length
    than the completion, a mask of other values than True, False, 1 and 0, a log-prob of +inf, an
    advantage or weight that is not finite; all but token ids in float32.
    """
    capacity = _check_capacity(capacity)
    costs = {
        "segment_cost": _check_cost("segment_cost", segment_cost),
        "area_cost": _check_cost("area_cost", area_cost),
    }
    columns = _columns(list(samples), capacity)

    # Where every token lies.
    ids, prompt_sizes, sizes = columns.ids, columns.prompt_sizes, columns.sizes
    offsets = _edges(prompt_sizes + sizes)
    if offsets[-1] >= 2**31:
        raise ValueError(f"{offsets[-1]} tokens in one batch: cu_seqlens counts below 2^31")
    shareable = prompt_sizes - 1 if aligned else prompt_sizes + sizes
    layout = plan_tree(ids, offsets, shareable * bool(share_prefix), capacity, **costs)
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
        target = ids[_ranges((offsets[:-1] + prompt_sizes)[order], sizes[order])]
    loss_mask, advantages = lay(columns.loss_mask, False), lay(columns.advantages, 0.0)
    assert loss_mask is not None and advantages is not None
    weights = columns.weights[order]
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
        advantages=advantages,
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
        **{name: lay(values, np.nan) for name, values in columns.logprobs.items()},
    )


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
