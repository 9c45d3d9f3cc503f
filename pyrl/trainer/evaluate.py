"""Held-out reward with its uncertainty: what `pyrl eval` and the training loop both run."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyrl.algorithms import Attempt, Group
from pyrl.rollout import Completion, Rollout, SamplingParams
from pyrl.tasks import Pending, Score, Scorer
from pyrl.trainer.data import EncodedPrompt
from pyrl.trainer.evaluation_stats import Outcome, describe


class Scoring:
    """Completions decoded and scored as they come from the engine: pass the object to
    `Rollout.generate` as on_completion, and most are scored when the last one is sampled.

    waited: seconds that sampling stood still for it, decoding and a full queue included.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any, prompts: Sequence[EncodedPrompt]) -> None:
        self._scorer, self._tokenizer, self._prompts = scorer, tokenizer, prompts
        self._found: dict[tuple[int, int], tuple[str, Pending]] = {}
        self.waited = 0.0

    def __call__(self, prompt: int, sample: int, completion: Completion) -> None:
        """Starts the scoring of one."""
        begin = time.perf_counter()
        text = self._tokenizer.decode(completion.tokens, skip_special_tokens=True)
        pending = self._scorer.submit(self._prompts[prompt].prompt, text)
        self._found[prompt, sample] = text, pending
        self.waited += time.perf_counter() - begin

    def groups(
        self, sampled: Sequence[Sequence[Completion]], *, answers: bool = False
    ) -> tuple[list[Group], list[Score]]:
        """The groups, and the scores that they are made of, in the same order. Waits for what is
        not scored yet. A reward that is not finite is lost: NaN, and a reason."""
        found = [[self._found[i, j] for j in range(len(row))] for i, row in enumerate(sampled)]
        scores = [pending.result() for row in found for _, pending in row]
        if answers:
            rows = zip(self._prompts, found, strict=True)
            items = [(prompt.prompt, text) for prompt, row in rows for text, _ in row]
            scores = self._scorer.with_answers(items, scores)
        rest = iter(scores)
        groups = []
        for prompt, completions, row in zip(self._prompts, sampled, found, strict=True):
            attempts = [
                _attempt(completion, text, next(rest))
                for completion, (text, _) in zip(completions, row, strict=True)
            ]
            one = prompt.prompt
            groups.append(Group(one.id, one.text, prompt.tokens, attempts, domain=one.domain))
        return groups, scores


def _attempt(completion: Completion, text: str, score: Score) -> Attempt:
    finite = math.isfinite(score.reward)
    return Attempt(
        tokens=completion.tokens,
        logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        text=text,
        reward=float(score.reward) if finite else math.nan,
        error=score.error or (None if finite else f"the reward is {score.reward}"),
    )


def interval(rewards: Sequence[Sequence[float]], seed: int = 0) -> dict[str, float]:
    """Mean over prompts of each prompt's mean reward, and its 95% bootstrap interval over prompts.

    rewards: one row a prompt; NaN is left out, and so is a prompt that has nothing else. The
    prompts are resampled, because completions of one prompt are not independent.
    Returns mean, low, high (NaN when nothing was scored), prompts, samples, nan_rewards.
    """
    outcomes = [
        Outcome(rewards=row, lengths=[], truncated=[], empty=[]) for row in rewards if len(row)
    ]
    return _result(describe(outcomes, seed=seed)["overall"])


def _result(overall: Mapping[str, Any]) -> dict[str, float]:
    """A table's headline, as summary.json has it."""
    found = {k: math.nan if overall[k] is None else overall[k] for k in ("mean", "low", "high")}
    counts = {"prompts": overall["prompts"], "samples": overall["samples"]}
    return {**found, **counts, "nan_rewards": overall["lost"]}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A result as in summary.json, and what it was computed from."""

    result: dict[str, float]
    """mean, low, high, prompts, samples, nan_rewards."""
    groups: list[Group]
    details: dict[str, Any]
    """`evaluation_stats.describe` of the groups; `lost_reason` and `answers_absent`: why the first
    lost sample was, and why there is no maj@k (None where that is not so)."""
    answers: list[list[str | None]] | None
    """The final answers, as the groups' attempts; None where the task tells none."""
    seconds: dict[str, float]
    """Of `sample` and `score`."""


def evaluate(
    engine: Rollout,
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    params: SamplingParams,
    *,
    seed: int,
    success: float = 1.0,
    weights: Mapping[str, float] | None = None,
    scales: Mapping[str, float] | None = None,
    on_phase: Callable[[str], None] = lambda name: None,
) -> Evaluation:
    """Samples `params.n` completions of every prompt with the engine's weights and scores them.

    success, weights: see `describe`; scales: of the domains' rewards; on_phase hears `sample` and
    `score` as they begin. All prompts go to the engine in one call: its noise depends on a prompt's
    place in it.
    """
    on_phase("sample")
    begin = time.perf_counter()
    scoring = Scoring(scorer, tokenizer, prompts)
    tokens = [p.tokens for p in prompts]
    sampled = engine.generate(tokens, params, seed=seed, on_completion=scoring)
    on_phase("score")
    middle = time.perf_counter()
    told = scorer.has_answers
    groups, scores = scoring.groups(sampled, answers=told)
    end, waited = time.perf_counter(), scoring.waited
    seconds = {"sample": middle - begin - waited, "score": end - middle + waited}

    rest = iter(scores)
    rows = [[next(rest) for _ in group.attempts] for group in groups]
    outcomes = [
        Outcome(
            rewards=[a.reward for a in group.attempts],
            lengths=[len(a.tokens) for a in group.attempts],
            truncated=[a.finish_reason == "length" for a in group.attempts],
            empty=[not a.text.strip() for a in group.attempts],
            answers=[score.answer for score in row] if told else None,
            unread=[score.answer_error is not None for score in row] if told else None,
            domain=group.domain,
            scale=(scales or {}).get(group.domain, 1.0),
        )
        for group, row in zip(groups, rows, strict=True)
    ]
    details = describe(outcomes, success=success, weights=weights)
    absent = None
    if details["overall"]["majority"] is None:
        reason = next((s.answer_error for s in scores if s.answer_error), "no sample was scored")
        absent = reason if told else "the task has no method `answer`"
        if told and "NotImplementedError" in absent:
            absent = "the task tells no answers for these prompts"
    details["lost_reason"] = next((a.error for g in groups for a in g.attempts if a.error), None)
    details["answers_absent"] = absent
    answers = [[score.answer for score in row] for row in rows] if told else None
    return Evaluation(_result(details["overall"]), groups, details, answers, seconds)


def heldout_metrics(details: Mapping[str, Any]) -> dict[str, float | None]:
    """What metrics.jsonl has of an evaluation during training: heldout_mean, _low, _high, the
    greatest k's heldout_pass_at_<k>, and each domain's mean as heldout_<domain> (a domain that has
    one of the other names is only in evaluations.jsonl)."""
    overall, most = details["overall"], str(details["ks"][-1])
    found = {name: table["mean"] for name, table in details["domains"].items() if name}
    found |= {key: overall[key] for key in ("mean", "low", "high")}
    found[f"pass_at_{most}"] = overall["pass"][most]["mean"]
    return {f"heldout_{key}": value for key, value in found.items()}


def sample_rows(groups: Sequence[Group], step: int, phase: str, limit: int) -> list[dict[str, Any]]:
    """Objects of samples.jsonl, at most `limit`: the first completion of every group, then the
    second of every group, and so on."""
    rounds = itertools.zip_longest(*(group.attempts for group in groups))
    pairs = ((g, a) for turn in rounds for g, a in zip(groups, turn, strict=True) if a is not None)
    return [
        {
            "step": step,
            "phase": phase,
            "prompt_id": group.prompt_id,
            "prompt": group.prompt_text,
            "completion": attempt.text,
            "reward": attempt.reward,
            "finish_reason": attempt.finish_reason,
            **({"error": attempt.error} if attempt.error else {}),
        }
        for group, attempt in itertools.islice(pairs, limit)
    ]
