"""Held-out reward with its uncertainty."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyrl.algorithms import Attempt, Group
from pyrl.rollout import Completion, Rollout, SamplingParams
from pyrl.tasks import Scorer
from pyrl.trainer.data import EncodedPrompt

RESAMPLES = 2000


def score_groups(
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    sampled: Sequence[Sequence[Completion]],
) -> list[Group]:
    """Decodes and scores what was sampled. A reward that is not finite is lost: NaN, a reason."""
    texts = [[tokenizer.decode(c.tokens, skip_special_tokens=True) for c in row] for row in sampled]
    pairs = [(p.prompt, t) for p, row in zip(prompts, texts, strict=True) for t in row]
    scores = iter(scorer.score(pairs))
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
        groups.append(Group(prompt.prompt.id, prompt.prompt.text, prompt.tokens, attempts))
    return groups


def interval(rewards: Sequence[Sequence[float]], seed: int = 0) -> dict[str, float]:
    """Mean over prompts of each prompt's mean reward, and its 95% bootstrap interval over prompts.

    rewards: one row a prompt; NaN is left out, and so is a prompt that has nothing else. The
    prompts are resampled, because completions of one prompt are not independent.
    Returns mean, low, high (NaN when nothing was scored), prompts, samples, nan_rewards.
    """
    rows = [[r for r in row if not math.isnan(r)] for row in rewards]
    means = np.array([np.mean(row) for row in rows if row], dtype=np.float64)
    samples = sum(map(len, rows))
    result = {
        "mean": float("nan"),
        "low": float("nan"),
        "high": float("nan"),
        "prompts": len(means),
        "samples": samples,
        "nan_rewards": sum(map(len, rewards)) - samples,
    }
    if len(means):
        rng = np.random.default_rng(seed)
        draws = rng.integers(len(means), size=(RESAMPLES, len(means)))
        low, high = np.quantile(means[draws].mean(axis=1), [0.025, 0.975])
        result |= {"mean": float(means.mean()), "low": float(low), "high": float(high)}
    return result


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A result as in summary.json, and what it was computed from."""

    result: dict[str, float]
    groups: list[Group]


def evaluate(
    engine: Rollout,
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    params: SamplingParams,
    *,
    seed: int,
) -> Evaluation:
    """Samples `params.n` completions of every prompt with the engine's weights and scores them."""
    sampled = engine.generate([p.tokens for p in prompts], params, seed=seed)
    groups = score_groups(scorer, tokenizer, prompts, sampled)
    return Evaluation(interval([[a.reward for a in g.attempts] for g in groups]), groups)


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
