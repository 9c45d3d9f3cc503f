"""The reward that both trainers of trainer_step.py are given: `trainer_task.py:Dense`.

A completion whose advantage is 0 need not be computed, and one trainer makes use of that. With this
reward the completions of a group practically never tie, so both do the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pyrl.tasks import Prompt, get_task

VOWELS = frozenset("aeiouAEIOU")


class Dense:
    """The prompts of `instructions`; reward = share of the completion's characters that are vowels,
    plus a thousandth of a point a character, 0 for an empty completion."""

    name = "dense"
    trusted = True  # two passes over a short string

    def __init__(self) -> None:
        self._prompts = get_task("instructions").prompts

    def prompts(self, split: Literal["train", "heldout"]) -> Sequence[Prompt]:
        return self._prompts(split)

    def score(self, prompt: Prompt, completion: str) -> float:
        vowels = sum(c in VOWELS for c in completion)
        return vowels / max(len(completion), 1) + 1e-3 * len(completion)
