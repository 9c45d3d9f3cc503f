"""A task that a tiny random model learns in a few steps: for tests and smoke runs."""

from __future__ import annotations

from collections.abc import Sequence

from pyrl.tasks.protocol import LazyPrompts, Prompt, Split, check_split


class Letters:
    """Any text will do, as long as it is made of certain letters.

    reward = (characters of the completion that are in `target`) / (characters of the completion),
    0 for an empty completion. A model that samples uniformly from letters starts in the
    middle, every group has several different rewards, and the best policy does not depend on the
    prompt, so a few dozen parameters are enough.
    """

    name = "letters"
    trusted = True

    def __init__(
        self, *, target: str = "abcdefghijklmnopqrstuvwxyz", train: int = 64, heldout: int = 16
    ) -> None:
        """target: the characters that pay; train, heldout: numbers of prompts."""
        if not target:
            raise ValueError("target='': expected at least one character")
        for name, count in (("train", train), ("heldout", heldout)):
            if count < 1:
                raise ValueError(f"{name}={count}: expected at least 1")
        self.target, self._sizes = frozenset(target), {"train": train, "heldout": heldout}

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Texts "0 a", "1 a", … for training and "0 b", "1 b", … held out."""
        check_split(split)
        mark = "a" if split == "train" else "b"
        return LazyPrompts(self._sizes[split], lambda i: Prompt(f"{split}-{i}", f"{i} {mark}"))

    def score(self, prompt: Prompt, completion: str) -> float:
        """The share of the completion's characters that are in `target`."""
        return sum(c in self.target for c in completion) / max(len(completion), 1)
