"""What a rollout engine is: token ids in; token ids, sampled log-probs and a finish reason out.

Text never passes through an engine, so nothing is tokenised twice.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


class RolloutError(RuntimeError):
    """An engine could not do what was asked (missing engine, deadline passed, failed sync)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn: softmax(logits / temperature), cut to top-k, then to top-p.

    `temperature=0` is greedy. The `top_k` most likely tokens stay (0: all); of these, renormalised,
    the smallest set of the most likely whose probabilities sum to at least `top_p` stays (1: all).
    Tokens tied with the last one of the top-k set stay too.
    """

    #: completions per prompt
    n: int = 1
    #: a completion ends after this many tokens with reason "length"
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    #: a completion ends with any of these, which it includes, with reason "stop"
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("n", "max_new_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"SamplingParams.{name}={value!r}: expected an integer >= 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"SamplingParams.temperature={self.temperature!r}: expected a finite number >= 0"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingParams.top_p={self.top_p!r}: expected 0 < top_p <= 1")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ValueError(f"SamplingParams.top_k={self.top_k!r}: expected an integer >= 0")
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in self.stop_token_ids))
        for i, token in enumerate(self.stop_token_ids):
            if token < 0:
                raise ValueError(f"SamplingParams.stop_token_ids[{i}]={token}: expected >= 0")


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled completion; the stop token, when there is one, is its last token."""

    tokens: list[int]
    #: log-prob of each token under the distribution it was *drawn* from: temperature and
    #: truncation applied, in fp32. Greedy draws (temperature 0) report temperature 1 instead.
    logprobs: list[float]
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.logprobs):
            raise ValueError(
                f"Completion: {len(self.tokens)} tokens but {len(self.logprobs)} logprobs"
            )


#: (prompt index, sample index, completion): called once for each, from any thread, one at a time.
OnCompletion = Callable[[int, int, Completion], None]


@runtime_checkable
class Rollout(Protocol):
    """A sampler whose weights follow the trainer's."""

    @property
    def name(self) -> str:
        """As `make_rollout` knows it."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the engine's weights, which sets the canary's tolerance."""

    @property
    def shares_weights(self) -> bool:
        """True: the engine runs the trainer's own module and `sync` has nothing to move."""

    @property
    def version(self) -> int:
        """The version given to the last `sync`; 0 before the first."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        seed: int,
        counts: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[list[Completion]]:
        """`counts[i]` (default `params.n`) completions of prompt i, in order; 0 gives [].

        on_completion hears of each when it is finished, while others are still being sampled.

        The same seed draws the same noise: a function of (seed, prompt index, sample index),
        whatever the counts.
        Raises ValueError for an empty prompt or one that leaves no room in the model's context, and
        for counts of another length or with a negative one.
        """

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the trainer's weights (Hugging Face names) and forget cached keys and values."""

    def score(self, prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        """log p(completion[t] | prompt, completion[:t]), temperature 1, the engine's weights."""

    def close(self) -> None:
        """Release what the engine holds; nothing else may be called afterwards."""


def check_prompts(prompts: Sequence[Sequence[int]], max_length: int) -> None:
    """Raise ValueError naming the first prompt that is empty or leaves no room for a new token."""
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{i}] is empty: expected at least one token")
        if len(prompt) >= max_length:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens; the context holds {max_length}, "
                "of which at least one must be left to sample"
            )


def check_counts(counts: Sequence[int] | None, prompts: int, n: int) -> list[int]:
    """Completions of each of `prompts` prompts, `n` without counts. ValueError for a bad one."""
    if counts is None:
        return [n] * prompts
    if len(counts) != prompts:
        raise ValueError(f"counts: {len(counts)} numbers for {prompts} prompts")
    for i, count in enumerate(counts):
        try:
            whole = operator.index(count)  # numpy's integers too
        except TypeError:
            whole = -1
        if isinstance(count, bool) or whole < 0:
            raise ValueError(f"counts[{i}]={count!r}: expected an integer >= 0")
    return [int(count) for count in counts]
