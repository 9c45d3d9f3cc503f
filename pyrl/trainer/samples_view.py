"""Prompts and completions as the pages show them: text made safe, rewards on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyrl.trainer.charts import finite, label
from pyrl.trainer.html import safe_text

MAX_CHARACTERS = 4000


def sample_view(sample: Mapping[str, Any], low: float, high: float) -> dict[str, Any]:
    """A row of samples.jsonl as the template's `chip` and `completion` show it; `low` and `high`:
    the ends of the reward's meter."""
    reward = finite(sample.get("reward"))
    place = (
        100.0 if high == low else 100 * ((low if reward is None else reward) - low) / (high - low)
    )
    reason = sample.get("finish_reason")
    return {
        "text": safe_text(sample.get("completion", ""), MAX_CHARACTERS),
        "reward": None if reward is None else label(reward),
        "place": round(place, 1),
        "reason": None if reason is None else safe_text(reason, 40),
        "error": safe_text(sample["error"], 200) if sample.get("error") else None,
        "step": sample.get("step"),
    }


def prompt_text(prompt: Any) -> str:
    """A prompt given as text, or as chat messages."""
    if isinstance(prompt, list):
        parts = [m if isinstance(m, dict) else {"content": m} for m in prompt]
        prompt = "\n".join(
            f"{m.get('role', '')}: {m.get('content', '')}".removeprefix(": ") for m in parts
        )
    return safe_text("" if prompt is None else prompt, MAX_CHARACTERS)


def reward_range(samples: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The scale of the reward meters: 0 to 1 unless the rewards leave it."""
    rewards = [y for s in samples if (y := finite(s.get("reward"))) is not None]
    return min([0.0, *rewards]), max([1.0, *rewards])
