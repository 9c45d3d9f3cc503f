"""Puzzles of the `reasoning_gym` package as a task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from pyrl.tasks.extract import after_thinking, last_tag
from pyrl.tasks.generated import generated
from pyrl.tasks.logic import gym
from pyrl.tasks.logic.findings import CURATED, EXCLUDED, LEVELS
from pyrl.tasks.protocol import LazyPrompts, Prompt, Split, check_split

#: What follows every question.
FORMAT = "Give your final answer between <answer> and </answer>."


class Logic:
    """Puzzles of reasoning-gym (arXiv 2505.24760): arithmetic, grids, graphs, games, logic.

    reward = the puzzle's own scorer, in [0, 1], of the text in the last `<answer>` tag after the
    last `</think>`; 0 without one. Many scorers pay a little (0.01 to 0.25) for a wrong answer in
    the right form.

    Prompts are made one by one: the i-th is a function of (seed, split, i), the same in every
    process; no question is in both splits. `Prompt.domain` is the puzzle's name, `Prompt.data` its
    entry, level and name, so that a scoring process makes no entries. Scorers run in processes that
    can be killed: some use sympy, or search.

    Needs `pip install "pyrl[tasks]"`. What is known of each data set is in `logic.findings`.
    """

    name = "logic"

    def __init__(
        self,
        *,
        tasks: Sequence[str] | str = "curated",
        level: int | Sequence[int] | None = None,
        train: int = 8192,
        heldout: int = 256,
        seed: int = 0,
        system: str | None = None,
    ) -> None:
        """tasks: names of puzzles, "curated" (30 quick ones) or "all" (95, see `findings.LEVELS`).
        level: from 1, the easiest, or several, of which each prompt draws one; a puzzle with fewer
        levels is at its last, one without levels as the package has it. None: the package's default
        difficulty. A stage of a recipe can raise it.
        train, heldout: numbers of prompts. seed: decides every draw. system: a system message.
        """
        self._tasks = _known(tasks)
        self._levels = _checked_levels(level, self._tasks)
        for name, count in (("train", train), ("heldout", heldout)):
            if count < 1:
                raise ValueError(f"{name}={count}: expected at least 1")
        gym.check_installed()
        self._sizes = {"train": train, "heldout": heldout}
        self._seed, self._system = seed, system
        self._held: dict[int, Prompt] = {}  # held-out prompts are asked for again and again

    def __getstate__(self) -> dict[str, Any]:
        """Without prompts: scoring reads the prompt's own data."""
        return {**self.__dict__, "_held": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Loads the package as well, so that no scoring deadline has to include it."""
        self.__dict__.update(state)
        gym.load()

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The prompts of a split, made when they are asked for."""
        check_split(split)
        count = self._sizes[split]

        def make(index: int) -> Prompt:
            # The puzzle and the level are drawn once: a side is only looked for among its entries.
            rng = random.Random(f"{self._seed} {split} {index} puzzle")
            name, level = rng.choice(self._tasks), rng.choice(self._levels)
            same = generated(
                split,
                count,
                lambda rng, i: self._drawn(name, level, rng, f"{split}-{i}"),
                seed=self._seed,
                key=lambda prompt: prompt.data["entry"]["question"],
            )
            try:
                return same[index]
            except ValueError as error:
                raise ValueError(f"puzzle {name!r} at level {level}: {error}") from None

        def remembered(index: int) -> Prompt:
            if index not in self._held:
                self._held[index] = make(index)
            return self._held[index]

        return LazyPrompts(count, make if split == "train" else remembered)

    def score(self, prompt: Prompt, completion: str) -> float:
        """The puzzle's own score of the completion's answer, 0 where it gives none."""
        answer = last_tag(after_thinking(completion), "answer")
        data = prompt.data
        return gym.score(data["task"], data["level"], data["entry"], answer or "")

    def answer(self, prompt: Prompt, completion: str) -> str | None:
        """The text in the tag with single spaces, None where there is none."""
        found = last_tag(after_thinking(completion), "answer")
        return " ".join(found.split()) or None if found else None

    def _drawn(self, name: str, level: int | None, rng: random.Random, id: str) -> Prompt:
        entry = gym.entry(name, level, rng)
        system = () if self._system is None else ({"role": "system", "content": self._system},)
        text = f"{entry['question'].strip()}\n\n{FORMAT}"
        return Prompt(
            id,
            (*system, {"role": "user", "content": text}),
            {"task": name, "level": level, "entry": entry},
            domain=name,
        )


def _known(tasks: Sequence[str] | str) -> list[str]:
    if isinstance(tasks, str):
        if tasks not in ("all", "curated"):
            raise ValueError(f"tasks={tasks!r}: expected 'all', 'curated', or a list of names")
        return list(LEVELS) if tasks == "all" else list(CURATED)
    if not tasks:
        raise ValueError(f"tasks={tasks!r}: expected at least one name")
    for name in tasks:
        if name in EXCLUDED:
            raise ValueError(f"tasks: {name!r} is not used here ({EXCLUDED[name]})")
        if name not in LEVELS:
            raise ValueError(f"tasks: unknown {name!r}; expected some of {', '.join(LEVELS)}")
    return list(dict.fromkeys(tasks))


def _checked_levels(
    level: int | Sequence[int] | None, tasks: Sequence[str]
) -> Sequence[int | None]:
    if level is None:
        return [None]
    levels = [level] if isinstance(level, int) else list(level)
    most = max(len(LEVELS[name]) for name in tasks)
    if not most:
        raise ValueError(f"level={level!r}: {', '.join(tasks)} have no levels; leave it out")
    if not levels or any(
        isinstance(x, bool) or not isinstance(x, int) or not 1 <= x <= most for x in levels
    ):
        many = max(tasks, key=lambda name: len(LEVELS[name]))
        raise ValueError(
            f"level={level!r}: expected 1 to {most}, or a list of such: of the chosen puzzles "
            f"{many!r} has most levels"
        )
    return levels
