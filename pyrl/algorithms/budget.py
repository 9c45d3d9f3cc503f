"""Sampling budgets: which prompts a step samples, and how often. They know no engine, no tokenizer.

A step asks `plan` for its draws, samples and scores them, and tells `observe` how they went.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from pyrl.algorithms.allocate import METHODS, allocate_budget
from pyrl.algorithms.draws import (
    Draw,
    Place,
    PromptWeight,
    Share,
    check_kind,
    check_weight,
    check_whole,
    cut_into_steps,
    draws_of,
    step_metrics,
)

Take = Callable[[int], list[Place]]
Pilot = Callable[[list[Place], int], "list[PilotResult]"]


@dataclasses.dataclass(frozen=True)
class PilotResult:
    """How the samples of one prompt went. ValueError for numbers that cannot be."""

    accepted: int
    scored: int
    """Samples whose scoring did not fail; acceptance is accepted / scored."""
    gradient_norm: float
    """Over the accepted samples, 0 without any: the mean of |∇ log p(sample)| for "gvm" and
    `Online`; |mean of ∇| for "neyman"."""
    second_moment: float | None = None
    """For "neyman": the mean of |∇ log p(sample)|² over the accepted samples."""

    def __post_init__(self) -> None:
        if not 0 <= self.accepted <= self.scored:
            raise ValueError(f"PilotResult: {self.accepted} accepted of {self.scored} scored")
        for name in ("gradient_norm", "second_moment"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"PilotResult.{name}={value!r}: expected a finite number >= 0")

    @property
    def rate(self) -> float:
        """accepted / scored, 0 where nothing was scored."""
        return self.accepted / self.scored if self.scored else 0.0


class Budget(Protocol):
    """Says what a step samples. All state is in `state_dict`, plain enough for JSON."""

    @property
    def needs_norms(self) -> bool:
        """Whether `observe` wants gradient norms; without, their `gradient_norm` may be 0."""

    def plan(self, step: int, take: Take, pilot: Pilot) -> list[Draw]:
        """The draws of step `step`. take(k): the next k places of the data, for good. pilot(places,
        m): m samples of each, scored, with gradient norms; they are not learned from."""

    def observe(self, results: Mapping[Place, PilotResult]) -> None:
        """What came of the step's draws, all groups of a prompt together."""

    def metrics(self) -> dict[str, float]:
        """About the last plan, named budget_*."""

    def state_dict(self) -> dict[str, Any]:
        """Of numbers, strings and lists."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. ValueError for another budget's."""


class Uniform:
    """`n` samples for each of the next `prompts` prompts."""

    needs_norms = False

    def __init__(self, prompts: int, n: int) -> None:
        check_whole(prompts=(prompts, 1), n=(n, 1))
        self.prompts, self.n = prompts, n

    def plan(self, step: int, take: Take, pilot: Pilot) -> list[Draw]:
        """See `Budget.plan`; there is no pilot."""
        return [Draw(place, self.n) for place in take(self.prompts)]

    def observe(self, results: Mapping[Place, PilotResult]) -> None:
        """Nothing is learned."""

    def metrics(self) -> dict[str, float]:
        """None: every step is the same."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """There is no state."""
        return {"kind": "uniform"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Budget.load_state_dict`."""
        check_kind(state, "uniform")


class GVM:
    """Budgets by gradient variance (`allocate_budget`) from a pilot, for a shard of steps at once.

    A shard is `steps` * `prompts` prompts. Each gets `pilot_samples` samples, which say p_i and
    G_i; then n per prompt of the shard, less the pilot's samples with `count_pilot`, are allocated,
    and the shard's steps draw the prompts in order, equally many samples each (to one prompt's
    number): as many updates as a uniform budget has.

    drop_easy: prompts with p_i above it get nothing. drop_hard: nor do those with p_i * n below it,
    the acceptances that a uniform budget would expect. Where no prompt has a weight (all failed,
    all dropped) the whole shard is drawn uniformly. minimum: samples of a prompt with a weight at
    least (a group's baseline needs two); where they do not suffice, some prompts get none. maximum:
    samples of one prompt at most; what the prompts with a weight then cannot take is spread over
    the others.
    group_size: 0 draws one group of n_i, k draws n_i // k groups of k, the last with the remainder.
    prompt_weight: "inverse_np" weighs with 1 / (n_i p_i), mean 1 over the step's prompts, n_i of
    this step; a p_i below half an acceptance of the pilot counts as that. "inverse_accepted" is
    known after sampling only: the draws' weights are 1, and the caller takes `accepted_weights`.

    ValueError for settings that cannot work. Source: arXiv 2505.02391.
    """

    needs_norms = False  # the pilot has them

    def __init__(
        self,
        prompts: int,
        n: int,
        *,
        pilot_samples: int = 8,
        steps: int = 9,
        alpha: float = 1e-3,
        beta: float = 2.0,
        method: Literal["gvm", "neyman"] = "gvm",
        drop_easy: float | None = None,
        drop_hard: float | None = None,
        prompt_weight: PromptWeight = "none",
        group_size: int = 0,
        count_pilot: bool = True,
        minimum: int = 1,
        maximum: int | None = None,
    ) -> None:
        check_whole(
            prompts=(prompts, 1),
            n=(n, 1),
            pilot_samples=(pilot_samples, 1),
            steps=(steps, 1),
            group_size=(group_size, 0),
            minimum=(minimum, 1),
            maximum=(max(n, minimum) if maximum is None else maximum, max(n, minimum)),
        )
        if count_pilot and pilot_samples >= n:
            raise ValueError(
                f"pilot_samples={pilot_samples}: with count_pilot they come out of the n={n} "
                "samples per prompt, and some must be left"
            )
        for name, limit, most in (("drop_easy", drop_easy, 1.0), ("drop_hard", drop_hard, n)):
            if limit is not None and not 0 <= limit <= most:
                raise ValueError(f"{name}={limit!r}: expected a number in [0, {most:g}]")
        check_weight(prompt_weight)
        allocate_budget([], [], 0, alpha=alpha, beta=beta)  # checks these two
        if method not in METHODS:
            raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
        self.prompts, self.n, self.steps, self.pilot_samples = prompts, n, steps, pilot_samples
        self.drop_easy, self.drop_hard = drop_easy, drop_hard
        self.prompt_weight, self.group_size = prompt_weight, group_size
        self.count_pilot, self.minimum = count_pilot, minimum
        self._options: dict[str, Any] = {
            "alpha": alpha,
            "beta": beta,
            "method": method,
            "maximum": maximum,
        }
        self._queue: list[list[Draw]] = []
        self._shard: dict[str, float] = {}
        self._metrics: dict[str, float] = {}

    def plan(self, step: int, take: Take, pilot: Pilot) -> list[Draw]:
        """See `Budget.plan`; every `steps` steps there is a pilot."""
        samples = 0
        if not self._queue:
            samples = self._begin_shard(take, pilot)
        draws = self._queue.pop(0)
        self._metrics = {
            "budget_pilot_samples": float(samples),
            **self._shard,
            **step_metrics(draws),
        }
        return draws

    def _begin_shard(self, take: Take, pilot: Pilot) -> int:
        places = take(self.prompts * self.steps)
        results = pilot(places, self.pilot_samples)
        if len(results) != len(places):
            raise ValueError(f"pilot: {len(results)} results for {len(places)} prompts")
        rates = [result.rate for result in results]
        easy, hard = self.drop_easy, self.drop_hard
        dropped = [
            (easy is not None and p > easy) or (hard is not None and p * self.n < hard)
            for p in rates
        ]
        total = self.n * len(places)
        if self.count_pilot:
            total -= self.pilot_samples * len(places)
        weightless = [d or not r.accepted for d, r in zip(dropped, results, strict=True)]
        options = dict(self._options)
        if options["method"] == "neyman":
            options["second_moment"] = [
                0.0 if gone else _second_moment(place, result)
                for gone, place, result in zip(weightless, places, results, strict=True)
            ]
        norms = [0.0 if g else r.gradient_norm for g, r in zip(weightless, results, strict=True)]
        counts = self._at_least(rates, norms, total, options)
        least = 0.5 / self.pilot_samples
        shares = [
            Share(place, count, max(p, least))
            for place, count, p in zip(places, counts, rates, strict=True)
        ]
        self._queue = [
            draws_of(part, self.prompt_weight, self.group_size)
            for part in cut_into_steps(shares, self.steps)
        ]
        self._shard = {
            "budget_prompts_dropped": float(sum(dropped)),
            "budget_zero_share": counts.count(0) / len(counts),
            "budget_max": float(max(counts)),
        }
        return self.pilot_samples * len(places)

    def _at_least(
        self, rates: list[float], norms: list[float], total: int, options: dict[str, Any]
    ) -> list[int]:
        """The allocation in which a prompt with a weight gets at least `minimum` samples. Where
        they do not suffice for all, those that it would give the most are kept."""
        counts = allocate_budget(rates, norms, total, **options).tolist()
        weighted = [i for i, norm in enumerate(norms) if norm > 0]
        if self.minimum == 1 or all(counts[i] >= self.minimum for i in weighted):
            return counts
        kept = sorted(weighted, key=lambda i: (-counts[i], i))[: max(1, total // self.minimum)]
        second = options.pop("second_moment", None)
        if second is not None:
            options["second_moment"] = [second[i] for i in kept]
        least = min(self.minimum, total)
        own = allocate_budget(
            [rates[i] for i in kept], [norms[i] for i in kept], total, minimum=least, **options
        ).tolist()
        found = dict(zip(kept, own, strict=True))
        return [found.get(i, 0) for i in range(len(rates))]

    def observe(self, results: Mapping[Place, PilotResult]) -> None:
        """Nothing: the next shard has a pilot of its own."""

    def metrics(self) -> dict[str, float]:
        """budget_pilot_samples (0 but in a shard's first step), of the shard: prompts_dropped,
        zero_share (of prompts without a sample), max; of the step: prompts, samples."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """What is left of the shard."""
        return {
            "kind": "gvm",
            "queue": [
                [[*d.place, d.count, d.weight, d.group] for d in draws] for draws in self._queue
            ],
            "shard": dict(self._shard),
            "metrics": dict(self._metrics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Budget.load_state_dict`."""
        check_kind(state, "gvm")
        self._queue = [
            [Draw((domain, at), count, weight, group) for domain, at, count, weight, group in draws]
            for draws in state["queue"]
        ]
        self._shard, self._metrics = dict(state["shard"]), dict(state["metrics"])


def _second_moment(place: Place, result: PilotResult) -> float:
    if result.second_moment is None:
        raise ValueError(f"method='neyman' needs second_moment; the pilot of {place} has none")
    return result.second_moment
