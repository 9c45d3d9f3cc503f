"""Rows of `value_loss` and `preference_loss`: torch formulas under autograd, no other backend.

Each is written out here once more, a sequence or a pair at a time: in float64 it is the truth, in
fp32 plain torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import pyrl
from pyrl.certify.batches import MISSING, PADDED, RAGGED, SHAPES, Shape, laid_out, numbers, pad
from pyrl.certify.rule import Row, Sample, Values, gradients, judge, leaves_of
from pyrl.ops.spec import Aggregation

AGGREGATIONS: tuple[Aggregation, ...] = (
    "token_mean", "sequence_mean", "sequence_sum", "constant", "weighted",
)  # fmt: skip
_EMPTY = tuple(s for s in SHAPES if s.name in ("all masked", "no token", "one token"))


def value(columns: Sequence[str], quick: bool) -> Iterator[Row]:
    """Clipped and not, every aggregation, in every dtype of the values."""
    for clip in (None, 0.2):
        for aggregation in AGGREGATIONS[: 1 if quick else None]:
            for shape in (RAGGED, PADDED, *_EMPTY):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    yield _value_row(clip, aggregation, shape, dtype, columns)


def _value_row(
    clip: float | None, aggregation: Aggregation, shape: Shape, dtype: torch.dtype,
    columns: Sequence[str],
) -> Row:  # fmt: skip
    batch = numbers(shape, seed=4)
    tensors = {"values": batch["logprob"].to(dtype)}
    returns, old = batch["rollout_logprob"], batch["old_logprob"]
    mask, weights, bounds = batch["mask"], batch["weights"], batch["cu_seqlens"]

    def formula(dtype: torch.dtype) -> Values:
        leaves = leaves_of(tensors, dtype)
        v, r, o = leaves["values"], returns.to(dtype), old.to(dtype)
        square = (v - r) ** 2
        if clip is not None:
            near = torch.minimum(torch.maximum(v, o - clip), o + clip)
            square = torch.maximum(square, (near - r) ** 2)
        loss = _aggregate(square / 2, mask, bounds, weights.to(dtype), aggregation)
        loss.backward()
        grads = gradients(leaves)
        return {"loss": loss, **{k: pad(g, shape, 0.0) if shape.padded else g
                                 for k, g in grads.items()}}  # fmt: skip

    def compute(backend: str) -> Values:
        leaves = leaves_of(laid_out(tensors, shape))
        given = {"returns": returns, "mask": mask, "weights": weights, "cu_seqlens": bounds}
        if clip is not None:
            given["old_values"] = old
        out = pyrl.value_loss(
            leaves["values"], clip=clip, aggregation=aggregation, max_length=16, backend=backend,
            **laid_out(given, shape),
        )  # fmt: skip
        out.loss.backward()
        return {"loss": out.loss, **gradients(leaves)}

    row = Row(
        section="value_loss", case="squared error" if clip is None else f"clip {clip:g}",
        option=aggregation, shape=shape.name, dtype=dtype, plain=None,
    )  # fmt: skip
    # The values themselves may be half precision; their arithmetic is fp32 in plain torch too.
    plain = {k: v.to(dtype) if k != "loss" else v for k, v in formula(torch.float32).items()}
    sample = Sample(formula(torch.float64), plain, compute)
    return judge(row, columns, [sample], _others(columns))


def _aggregate(
    each: Tensor, mask: Tensor, bounds: Tensor, weights: Tensor, aggregation: str
) -> Tensor:
    ends, nothing = bounds.tolist(), (each * 0).sum()
    if aggregation == "token_mean":
        return each[mask].mean() if bool(mask.any()) else nothing
    if aggregation == "weighted":
        w = weights[mask]
        return (w * each[mask]).sum() / w.sum() if bool(mask.any()) else nothing
    kept = [each[b:e][mask[b:e]] for b, e in itertools.pairwise(ends)]
    parts = [x.mean() if aggregation == "sequence_mean" else x.sum() for x in kept if len(x)]
    total = torch.stack([*parts, nothing]).sum() / len(kept)
    return total / 16 if aggregation == "constant" else total


def preference(columns: Sequence[str], quick: bool) -> Iterator[Row]:
    """Pairs that share sequences and hold an empty one; missing reference log-probs."""
    options: dict[str, dict[str, Any]] = {
        "": {},
        "no reference": {"ref": False},
        "label smoothing 0.1": {"label_smoothing": 0.1},
        "weighted": {"weighted": True},
        "denominator 7": {"denominator": 7.0},
    }
    for beta in (0.1, 2.0):
        for option in list(options)[: 1 if quick else None]:
            for shape in (RAGGED, PADDED, MISSING, Shape(name="all masked", kept=0.0)):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    yield _preference_row(beta, option, dict(options[option]), shape, dtype,
                                          columns)  # fmt: skip


def _preference_row(
    beta: float, option: str, options: dict[str, Any], shape: Shape, dtype: torch.dtype,
    columns: Sequence[str],
) -> Row:  # fmt: skip
    batch = numbers(shape, seed=6)
    tensors, mask, bounds = (
        {"logprob": batch["logprob"].to(dtype)},
        batch["mask"],
        batch["cu_seqlens"],
    )
    device = mask.device
    chosen = torch.tensor([0, 3, 2, 1, 0], device=device)
    rejected = torch.tensor([3, 2, 0, 4, 2], device=device)
    ref = batch["ref_logprob"] if options.pop("ref", True) else None
    if options.pop("weighted", False):
        options["weights"] = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5], device=device)
    smoothing = options.get("label_smoothing", 0.0)
    weights = options.get("weights", torch.ones(5, device=device))

    def formula(dtype: torch.dtype) -> Values:
        leaves = leaves_of(tensors, dtype)
        kept = mask if ref is None else mask & ~ref.isnan()
        gap = leaves["logprob"] if ref is None else leaves["logprob"] - ref.to(dtype)
        ends = bounds.tolist()
        score = [gap[b:e][kept[b:e]].sum() for b, e in itertools.pairwise(ends)]
        loss = torch.zeros((), dtype=dtype, device=device)
        for w, i, j in zip(weights.tolist(), chosen.tolist(), rejected.tolist(), strict=True):
            margin = beta * (score[i] - score[j])
            right, wrong = (torch.nn.functional.logsigmoid(m) for m in (margin, -margin))
            loss = loss - w * ((1 - smoothing) * right + smoothing * wrong)
        loss = loss / options.get("denominator", weights.sum().item())
        loss.backward()
        grads = gradients(leaves)
        return {"loss": loss, **{k: pad(g, shape, 0.0) if shape.padded else g
                                 for k, g in grads.items()}}  # fmt: skip

    def compute(backend: str) -> Values:
        leaves = leaves_of(laid_out(tensors, shape))
        given = {"mask": mask, "cu_seqlens": bounds}
        if ref is not None:
            given["ref_logprob"] = ref
        out = pyrl.preference_loss(
            leaves["logprob"], chosen, rejected, beta=beta, backend=backend,
            **laid_out(given, shape), **options,
        )  # fmt: skip
        out.loss.backward()
        return {"loss": out.loss, **gradients(leaves)}

    row = Row(section="preference_loss", case=f"beta {beta:g}", option=option, shape=shape.name,
              dtype=dtype, plain=None)  # fmt: skip
    plain = {k: v.to(dtype) if k != "loss" else v for k, v in formula(torch.float32).items()}
    sample = Sample(formula(torch.float64), plain, compute)
    return judge(row, columns, [sample], _others(columns))


def _others(columns: Sequence[str]) -> list[str]:
    return [name for name in columns if name != "torch"]
