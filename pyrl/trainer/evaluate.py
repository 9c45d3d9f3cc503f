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
from pyrl.tasks import Score, Scorer
from pyrl.trainer.data import EncodedPrompt
from pyrl.trainer.evaluation_stats import Outcome, describe


def score_groups(
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    sampled: Sequence[Sequence[Completion]],
) -> list[Group]:
    """Decodes and scores what was sampled. A reward that is not finite is lost: NaN, a reason."""
    return _scored(scorer, tokenizer, prompts, sampled, answers=False)[0]


def _scored(
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    sampled: Sequence[Sequence[Completion]],
    answers: bool,
) -> tuple[list[Group], list[Score]]:
    """The groups, and the scores that they were made of, in the same order."""
    texts = [[tokenizer.decode(c.tokens, skip_special_tokens=True) for c in row] for row in sampled]
    pairs = [(p.prompt, t) for p, row in zip(prompts, texts, strict=True) for t in row]
    found = scorer.score(pairs, answers=answers)
    scores = iter(found)
    groups = []
    for prompt, completions, row in zip(prompts, sampled, texts, strict=True):
        attempts = []
        for completion, text in zip(completions, row, strict=True):
            score = next(scores)
            finite = math.isfinite(score.reward)
            error = score.error or (None if finite else f"the reward is {score.reward}")
            attempts.append(
                Attempt(
                    tokens=completion.tokens,
                    logprobs=completion.logprobs,
                    finish_reason=completion.finish_reason,
                    text=text,
                    reward=float(score.reward) if finite else float("nan"),
                    error=error,
                )
            )
        one = prompt.prompt
        groups.append(Group(one.id, one.text, prompt.tokens, attempts, domain=one.domain))
    return groups, found


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
    sampled = engine.generate([p.tokens for p in prompts], params, seed=seed)
    on_phase("score")
    middle = time.perf_counter()
    told = scorer.has_answers
    groups, scores = _scored(scorer, tokenizer, prompts, sampled, answers=told)
    seconds = {"sample": middle - begin, "score": time.perf_counter() - middle}

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
