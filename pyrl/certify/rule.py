"""One certified row: every backend's errors beside plain torch's, against float64."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyrl.parity import DEVICE, MARGIN, serving

#: Quantity (loss, dhidden, …) → value.
Values = dict[str, Tensor]
Errors = dict[str, float]
Compute = Callable[[str], Values]

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclasses.dataclass(kw_only=True)
class Row:
    """Relative errors of one case with one option on one shape in one dtype."""

    section: str
    case: str
    option: str
    shape: str
    dtype: torch.dtype
    plain: Errors | None
    """Quantity → error of plain torch in the same dtype; None: the bound is the margin alone."""
    errors: dict[str, Errors] = dataclasses.field(default_factory=dict)
    """Backend → quantity → error."""
    refused: list[str] = dataclasses.field(default_factory=list)
    """Backends that have no such op, and say so."""
    failures: list[str] = dataclasses.field(default_factory=list)
    """What broke the rule, in words."""

    @property
    def name(self) -> str:
        """Section, case, option, shape and dtype."""
        parts = (self.section, self.case, self.option, self.shape, DTYPES[self.dtype])
        return " · ".join(part for part in parts if part)

    def allowed(self, quantity: str) -> float:
        """Plain torch's error, where it is one, plus the margin."""
        plain = self.plain[quantity] if self.plain else 0.0
        return (plain if math.isfinite(plain) else 0.0) + MARGIN[self.dtype]

    def used(self, backend: str) -> float:
        """The largest error as a share of what is allowed; above 1 fails."""
        return max(error / self.allowed(q) for q, error in self.errors[backend].items())


def distance(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in float64 (absolute where truth is 0); inf if not finite."""
    value, truth = value.detach().double().flatten(), truth.detach().double().flatten()
    if value.shape != truth.shape or not bool(value.isfinite().all()):
        return float("inf")
    norm = truth.norm().item()
    return (value - truth).norm().item() / (norm if norm > 0 else 1.0)


class Sample(NamedTuple):
    """One batch of a row."""

    truth: Values
    plain: Values | None
    """None: the bound is the margin alone."""
    compute: Compute


def judge(
    row: Row, backends: Collection[str], samples: Sequence[Sample], refuse: Collection[str] = ()
) -> Row:
    """Fills the row: error(backend) <= error(plain torch) + margin for every quantity.

    Errors are root mean squares over the samples. Backends in `refuse` must raise
    NotImplementedError with their own name in it.
    """
    if all(s.plain is not None for s in samples):
        row.plain = _mean([_errors(s.plain, s.truth) for s in samples if s.plain is not None])
    for backend in backends:
        try:
            found = _mean([_errors(s.compute(backend), s.truth) for s in samples])
        except NotImplementedError as error:
            if backend in refuse and backend in str(error):
                row.refused.append(backend)
            else:
                row.failures.append(f"{row.name} · {backend}: refused: {error}")
            continue
        if backend in refuse:
            row.failures.append(f"{row.name} · {backend}: expected NotImplementedError")
            continue
        row.errors[backend] = found
        for quantity, off in found.items():
            if not off <= row.allowed(quantity):
                row.failures.append(
                    f"{row.name} · {backend}: {quantity} is off by {off:.2e}, "
                    f"allowed {row.allowed(quantity):.2e}"
                )
    return row


def _errors(values: Values, truth: Values) -> Errors:
    return {quantity: distance(values[quantity], truth[quantity]) for quantity in truth}


def _mean(errors: Sequence[Errors]) -> Errors:
    """Root mean squares."""
    return {q: math.sqrt(sum(e[q] ** 2 for e in errors) / len(errors)) for q in errors[0]}


def gradients(leaves: Values) -> Values:
    """d<name> of every leaf after a backward; zeros where none came."""
    return {
        f"d{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }


def leaves_of(values: Values, dtype: torch.dtype | None = None) -> Values:
    """Detached copies that take a gradient, in `dtype` where given."""
    return {k: v.detach().to(dtype or v.dtype, copy=True).requires_grad_()
            for k, v in values.items()}  # fmt: skip


def interpreted() -> list[str]:
    """Backends of this machine whose kernels run in an interpreter."""
    slow = DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return [name for name in serving() if name == "triton" and slow]
