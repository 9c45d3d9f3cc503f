"""A case of a peer: its code, our oracle, and where they differ the formula it really uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pyrl
from pyrl import LossSpec
from pyrl.certify.batches import Shape, numbers, pad
from pyrl.certify.rule import Values, distance, gradients, leaves_of

#: fp32 formulas evaluated in another order: what two right implementations may differ by.
AGREES = 1e-4
#: Prefix masks, every completion with a token: what every peer is written for.
SHAPE = Shape(name="peers", lengths=(7, 3, 12, 5), kept=1.0)
B, L = len(SHAPE.lengths), max(SHAPE.lengths)

#: Loss, then gradients.
Result = list[Tensor]
Batch = dict[str, Tensor]
FIELDS = ("old_logprob", "ref_logprob", "rollout_logprob", "mask")


@dataclasses.dataclass
class Comparison:
    """One peer on one case."""

    peer: str
    case: str
    theirs: str = ""
    ours: str = ""
    loss: float = 0.0
    gradient: float | None = None
    verdict: str = "agrees"
    ran: bool = True
    failures: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Their code beside our oracle, in fp32 against float64.

    `differs` says which formula theirs is and why ours is not; `formula` then computes theirs by
    our means, and None expects NaN of them.
    """

    name: str
    theirs: str
    """Their options, in their words."""
    ours: str
    run: Callable[[], Result]
    oracle: Callable[[], Result]
    differs: str = ""
    formula: Callable[[], Result] | None = None


def judge(peer: str, case: Case) -> Comparison:
    """Same formula: within AGREES. Said to differ: it must, and by the formula that is named."""
    theirs, ours = case.run(), case.oracle()
    errors = [distance(a, b) for a, b in zip(theirs, ours, strict=True)]
    row = Comparison(
        peer, case.name, case.theirs, case.ours, errors[0], max(errors[1:], default=None),
        case.differs or "agrees",
    )  # fmt: skip
    label = f"{peer} · {case.name}"
    if not all(bool(value.isfinite().all()) for value in ours):
        row.failures.append(f"{label}: our own result is not finite")
    if not case.differs:
        if not max(errors) <= AGREES:
            row.failures.append(f"{label}: off by {max(errors):.2e}, allowed {AGREES:.0e}")
    elif max(errors) <= AGREES:
        row.failures.append(f"{label}: said to differ, but agrees")
    elif case.formula is None:
        if all(bool(value.isfinite().all()) for value in theirs):
            row.failures.append(f"{label}: said to be NaN, but is finite")
    else:
        off = max(distance(a, b) for a, b in zip(theirs, case.formula(), strict=True))
        if not off <= AGREES:
            row.failures.append(f"{label}: is off by {off:.2e} from the formula that is named")
    if row.failures:
        row.verdict = f"**{row.failures[0].split(': ', 1)[1]}**"
    return row


def batch(behind: float = 0.0) -> Batch:
    """`numbers` as [B, L]; log-probs behind the mask are `behind`, the policy's own -1."""
    values = numbers(SHAPE)
    out = {"advantages": values.pop("advantages")}
    del values["cu_seqlens"]
    for name, value in values.items():
        fill = behind if name in FIELDS[:3] else -1.0 if name == "logprob" else 0.0
        out[name] = pad(value, SHAPE, fill)
    return out


def objective(given: Batch, spec: LossSpec, *names: str, **more: Any) -> Result:
    """Loss and gradients by `names` (default log-prob and entropy) of the float64 oracle."""
    names = names or ("logprob", "entropy")
    leaves = leaves_of({name: given[name] for name in ("logprob", "entropy")})
    fields = {name: given[name] for name in FIELDS}
    out = pyrl.policy_objective(
        leaves["logprob"], given["advantages"], spec, entropy=leaves["entropy"],
        backend="reference", **{**fields, **more},
    )  # fmt: skip
    out.loss.backward()
    return result(out.loss, {name: leaves[name] for name in names})


def result(loss: Tensor, leaves: Values) -> Result:
    """Loss and the gradients that its backward left."""
    return [loss.detach(), *gradients(leaves).values()]


def mix(parts: list[Result], *factors: float) -> Result:
    """The weighted sum of results."""
    return [sum(f * v for f, v in zip(factors, values, strict=True))
            for values in zip(*parts, strict=True)]  # fmt: skip


def options(values: dict[str, Any]) -> str:
    """name=value, … as a table's cell."""
    return ", ".join(f"{name}={value}" for name, value in values.items())


def rows_of(given: Batch, rows: slice) -> Batch:
    """Some sequences of a batch."""
    return {name: value[rows] for name, value in given.items()}


def weight_of(given: Batch, spec: LossSpec) -> Tensor:
    """The truncated correction ratio that a peer's sampler prepares: 1 outside the mask."""
    ratio = torch.where(given["mask"], given["old_logprob"] - given["rollout_logprob"], 0.0).exp()
    return ratio.clamp(spec.correction_low, spec.correction_high)
