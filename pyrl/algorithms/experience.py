"""Scored completions, and how a step's batch becomes the minibatches of its updates."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

from pyrl.ops.spec import LossSpec
from pyrl.packing import Sample

RewardMap = Literal["identity", "signed"]


@dataclasses.dataclass
class Attempt:
    """One completion of a prompt, and what is known about it."""

    tokens: list[int]
    """Completion tokens, the stop token included."""
    logprobs: list[float]
    """Under the sampling distribution, one a token."""
    finish_reason: Literal["stop", "length"]
    text: str
    reward: float
    """NaN = lost: scoring failed. Carries no loss and counts in no denominator."""
    error: str | None = None
    """Why the reward is NaN."""
    bonus: float = 0.0
    """What the recipe's reward terms add to the task's reward; advantages come from the sum."""
    advantage: float = 0.0
    keep: bool = True
    """False: outside loss and denominators (lost, or dropped by a filter)."""

    def total(self, reward_map: RewardMap = "identity") -> float:
        """map(reward) + bonus, what is learned from; signed: 2 reward - 1."""
        return (2 * self.reward - 1 if reward_map == "signed" else self.reward) + self.bonus


@dataclasses.dataclass
class Group:
    """The completions of one prompt."""

    prompt_id: str
    prompt_text: str
    prompt: list[int]
    attempts: list[Attempt]
    domain: str = ""
    """The part of a task mixture that the prompt is from."""
    place: tuple[str, int] = ("", 0)
    """(domain, position): where in the stream of prompts it was drawn."""
    weight: float = 1.0
    """Of the group's advantages, where a sampling budget weighs prompts."""

    @property
    def zero_variance(self) -> bool:
        """No two scored completions differ in reward, so nothing can be told from comparing them.

        A group made of one completion is not meant to be compared, and is never zero-variance.
        """
        rewards = {a.reward for a in self.attempts if not math.isnan(a.reward)}
        return len(rewards) < 2 and len(self.attempts) > 1


@dataclasses.dataclass(frozen=True)
class Minibatch:
    """What one optimizer update is made of."""

    samples: list[Sample]
    """Only those with a gradient."""
    denominator: float
    """Tokens or sequences of the update, as the aggregation counts them; every kept completion
    counts, with a gradient or without."""
    skipped_tokens: int
    """Prompt and completion tokens that need not be computed."""


def minibatches(
    groups: Sequence[Group],
    spec: LossSpec,
    *,
    parts: int = 1,
    order: Sequence[int] | None = None,
    mask_truncated: bool = False,
    whole_groups: bool = False,
    dense: bool = False,
) -> list[Minibatch]:
    """The batch in `parts` minibatches whose sizes differ by at most one completion.

    Kept: not lost, not dropped by a filter and, with `mask_truncated`, ended by a stop token.
    The denominator of a part is its number of kept tokens (token_mean, weighted) or of kept
    completions (sequence_mean, sequence_sum, constant), at least 1. A kept completion is computed
    only if it can have a gradient: its advantage is not 0, the loss has a KL or entropy term, or
    with `dense`, where advantages are settled after packing.
    `order` permutes the groups before the split; a group stays together, so that its prompt is
    shared, except where a part ends inside it. With `whole_groups` no part does: a group belongs
    to the part in which its first completion falls.
    """
    if order is not None:
        groups = [groups[i] for i in order]
    flat = [(group, attempt) for group in groups for attempt in group.attempts]
    dense = dense or spec.needs_ref or spec.needs_entropy
    by_tokens = spec.aggregation in ("token_mean", "weighted")
    result = []
    edges = [len(flat) * part // parts for part in range(parts + 1)]
    if whole_groups:
        starts = [i for i, (group, a) in enumerate(flat) if a is group.attempts[0]] + [len(flat)]
        edges = [next(start for start in starts if start >= edge) for edge in edges]
    for first, last in itertools.pairwise(edges):
        samples, tokens, sequences, skipped = [], 0, 0, 0
        for group, a in flat[first:last]:
            kept = a.keep and not (mask_truncated and a.finish_reason == "length")
            if kept:
                tokens += len(a.tokens)
                sequences += 1
            if kept and (a.advantage != 0 or dense):
                samples.append(
                    Sample(
                        prompt=group.prompt,
                        completion=a.tokens,
                        rollout_logprob=a.logprobs,
                        advantage=a.advantage,
                    )
                )
            else:
                skipped += len(group.prompt) + len(a.tokens)
        result.append(Minibatch(samples, max(1.0, tokens if by_tokens else sequences), skipped))
    return result
