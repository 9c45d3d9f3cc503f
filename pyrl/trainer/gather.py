"""A step's samples: which prompts, how many completions each, and their rewards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyrl.algorithms import Attempt, Draw, Group, PilotResult, Place, accepted_weights
from pyrl.packing import Sample
from pyrl.trainer.data import derive_seed
from pyrl.trainer.evaluate import Scoring
from pyrl.trainer.gradient_norms import gradient_norms

if TYPE_CHECKING:
    from pyrl.trainer.config import Config
    from pyrl.trainer.session import Session


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What a step has sampled."""

    batch: list[Group]
    """What it learns from."""
    sampled: list[Group]
    """All of it but the pilot."""
    pilot_samples: int
    """Completions that only served to estimate."""
    pilot_tokens: int


def gather(session: Session, step: int) -> Gathered:
    """The budget's draws, sampled and scored; then the extra rounds of dynamic sampling, in which
    new prompts replace the groups whose completions all got the same reward: those say nothing."""
    rollout, budget = session.setting.config.rollout, session.budget
    pilot = Pilot(session, step)
    sampled: list[Group] = []
    for attempt in range(1 + rollout.refill_rounds):
        if attempt == 0:
            draws = budget.plan(step, session.take, pilot)
        else:
            useful = sum(not group.zero_variance for group in sampled)
            missing = rollout.prompts_per_step - useful
            if missing == 0:
                break
            draws = [Draw(place, rollout.n) for place in session.take(missing)]
        sampled += sample(session, step, draws, f"sample {attempt}")
    if budget.needs_norms:
        with session.clock("pilot"):
            budget.observe(measure(session, sampled))
    batch = sampled
    if rollout.refill_rounds:  # zero-variance groups only fill what is left
        batch = sorted(sampled, key=lambda group: group.zero_variance)
        batch = batch[: rollout.prompts_per_step]
    return Gathered(batch, sampled, pilot.samples, pilot.tokens)


def sample(session: Session, step: int, draws: Sequence[Draw], purpose: str) -> list[Group]:
    """A group for every draw."""
    parts = session.parts
    prompts = [parts.prompts.at(draw.place) for draw in draws]
    scoring = Scoring(parts.scorer, parts.policy.tokenizer, prompts)
    with session.clock("sample"):
        completions = parts.engine.generate(
            [prompt.tokens for prompt in prompts],
            session.setting.params,
            seed=derive_seed(session.config.train.seed, step, purpose),
            counts=[draw.count for draw in draws],
            on_completion=scoring,
        )
    session.clock.move(scoring.waited, "sample", "score")
    with session.clock("score"):
        groups, _ = scoring.groups(completions)
    weights = [draw.weight for draw in draws]
    config = session.setting.config
    if config.budget.prompt_weight == "inverse_accepted":
        accepted = [sum(is_accepted(a, group, config) for a in group.attempts) for group in groups]
        weights = accepted_weights(draws, accepted)
    for group, draw, weight in zip(groups, draws, weights, strict=True):
        group.place, group.weight = draw.place, weight
    return groups


class Pilot:
    """Samples some completions of each place for what they tell about it, and counts them."""

    def __init__(self, session: Session, step: int) -> None:
        self.session, self.step = session, step
        self.samples = self.tokens = 0

    def __call__(self, places: Sequence[Place], count: int) -> list[PilotResult]:
        """`count` completions of each place."""
        draws = [Draw(place, count) for place in places]
        groups = sample(self.session, self.step, draws, "pilot")
        attempts = [attempt for group in groups for attempt in group.attempts]
        self.samples += len(attempts)
        self.tokens += sum(len(attempt.tokens) for attempt in attempts)
        with self.session.clock("pilot"):
            found = measure(self.session, groups)
        return [found[place] for place in places]


def is_accepted(attempt: Attempt, group: Group, config: Config) -> bool:
    """reward >= budget.accept, before the scale of its domain."""
    return attempt.reward >= config.budget.accept * config.task.scales.get(group.domain, 1.0)


def measure(session: Session, groups: Sequence[Group]) -> dict[Place, PilotResult]:
    """Of every place: accepted and scored completions, and the mean over the accepted ones of the
    norm of their gradient."""
    config, parts = session.setting.config, session.parts
    accepted = [
        (group, attempt)
        for group in groups
        for attempt in group.attempts
        if is_accepted(attempt, group, config)
    ]
    norms = gradient_norms(
        parts.policy,
        [Sample(prompt=group.prompt, completion=attempt.tokens) for group, attempt in accepted],
        session.setting.spec,
        config.budget.gradient,
        tokens_per_row=config.train.tokens_per_row,
        backend=config.train.backend,
    )
    of_place: dict[Place, list[float]] = {group.place: [] for group in groups}
    for (group, _), norm in zip(accepted, norms, strict=True):
        if math.isfinite(norm):
            of_place[group.place].append(norm)
    scored = dict.fromkeys(of_place, 0)
    for group in groups:
        scored[group.place] += sum(a.reward == a.reward for a in group.attempts)
    return {
        place: PilotResult(len(found), scored[place], sum(found) / len(found) if found else 0.0)
        for place, found in of_place.items()
    }
