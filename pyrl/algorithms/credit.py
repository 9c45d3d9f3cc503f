"""`Credit`: from the rewards of a step's batch to what each of its tokens is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pyrl.algorithms.advantages import assign_advantages
from pyrl.algorithms.experience import Group
from pyrl.packing import PackedBatch


class DivergedError(RuntimeError):
    """What a credit computes is no longer finite; the message says what to lower."""


class Credit:
    """From rewards to what every token of a step's batch is worth. This one does nothing.

    A step calls, in this order: `assign` once; `begin` once, when the minibatches are packed and
    the old log-probs known; for each update `reweigh`, then `learn`; `metrics` once. Rows are
    single rows of a `PackedBatch`, R targets each; in a minibatch their `sequence_ids` together
    name each of its samples once.
    """

    needs_old: bool = False
    """Log-probs from before the first update are needed even when on-policy."""
    needs_ref: bool = False
    """Reference log-probs are needed whatever the LossSpec says."""
    whole_groups: bool = False
    """A group may not be split over minibatches: `minibatches(whole_groups=)`."""
    dense: bool = False
    """Kept completions with advantage 0 are computed all the same: `minibatches(dense=)`."""

    def assign(self, groups: Sequence[Group]) -> dict[str, float]:
        """Sets `advantage` and `keep` of every attempt, before packing; returns metrics."""
        return {}

    def begin(self, parts: list[list[PackedBatch]]) -> list[list[PackedBatch]]:
        """The rows of each minibatch with their per-token advantages, before the first update."""
        return parts

    def reweigh(
        self,
        rows: list[PackedBatch],
        ref: list[Tensor | None],
        logprob: Callable[[PackedBatch], Tensor],
    ) -> list[PackedBatch]:
        """The rows of one minibatch as its next update takes them.

        `rows` are those that `begin` returned, in every pass; ref: a row's reference log-probs [R];
        logprob: a row -> the present policy's [R], without gradient. Both are 0 outside the mask.
        """
        return rows

    def learn(self, rows: list[PackedBatch], lr_scale: float = 1.0) -> None:
        """The credit's own update, after the policy's of this minibatch; `rows` are `begin`'s."""

    def metrics(self) -> dict[str, float]:
        """Those of the step; starts the next."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; {} without state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bit-exact restoration."""


class GroupCredit(Credit):
    """A = weight_g * group_advantage(rewards): one number for all tokens of a completion.

    `options` are those of `assign_advantages`. weight_g is `Group.weight`: who sets it (a sampling
    budget) has normalised it.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def assign(self, groups: Sequence[Group]) -> dict[str, float]:
        """See `assign_advantages`, whose metrics these are."""
        metrics = assign_advantages(groups, **self.options)
        for group in groups:
            for attempt in group.attempts:
                attempt.advantage *= group.weight
        return metrics


def with_advantages(row: PackedBatch, advantages: Tensor) -> PackedBatch:
    """The row with `advantages` [R] instead of its own, as float32, 0 outside the mask."""
    new = dataclasses.replace(row, advantages=advantages.float().where(row.loss_mask, 0.0))
    if "plan" in vars(row):  # cached, and `replace` would lose it
        vars(new)["plan"] = row.plan
    return new
