"""What the tasks share that read a data set, or draw prompts of their own without one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pyrl.tasks.generated import generated
from pyrl.tasks.protocol import LazyPrompts, Prompt, Split, check_split
from pyrl.tasks.rows import Row, Rows, read_sides

#: How many prompts are drawn where the task is told no numbers.
DRAWN: dict[Split, int] = {"train": 2000, "heldout": 200}


@dataclass(eq=False, kw_only=True)
class ReadingTask:
    """A task whose prompts are rows of `data`, or drawn where there is none.

    A subclass says how a row becomes a prompt (`row_prompt`), what makes two rows the same
    (`row_key`), and how a prompt is drawn (`draw`). No question is ever on both sides.
    """

    data: str | None = None
    """A .jsonl, .json, .parquet or .csv file, or "owner/name" on the Hugging Face hub; None: drawn
    prompts, which need neither."""
    subset: str | None = None
    """The configuration of a hub data set ("main")."""
    split: str = "train"
    """The hub data set's split to train on; slices too ("train[:1%]")."""
    heldout_data: str | None = None
    """Held-out data of its own, instead of an eighth of `data`."""
    heldout_split: str | None = None
    """The split of the held-out data ("test"); of `data`, unless `heldout_data` is named."""
    skip: bool = False
    """Leave out rows without question or answer, instead of an error."""
    train: int | None = None
    """Number of training prompts; None: all rows, or 2000 drawn ones."""
    heldout: int | None = None
    """Number of held-out prompts; None: all rows, or 200 drawn ones."""
    seed: int = 0
    """Decides every draw."""
    suffix: str | None = None
    """What follows every question, after a newline; None: the task's own, "": nothing."""
    system: str | None = None
    """The system message; None: none."""

    own_suffix: ClassVar[str] = ""
    _sides: dict[Split, Rows] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("train", "heldout"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name}={count}: expected at least 1")
        if self.suffix is None:
            self.suffix = self.own_suffix
        if self.data is not None:
            self._sides = read_sides(
                self._key,
                data=self.data,
                split=self.split,
                subset=self.subset,
                heldout_data=self.heldout_data,
                heldout_split=self.heldout_split,
                limits={"train": self.train, "heldout": self.heldout},
                seed=self.seed,
            )
            return
        for name in ("subset", "heldout_data", "heldout_split"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)!r}: there is no data to apply it to")

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows: scoring reads the prompt only, and a data set is large."""
        return {**self.__dict__, "_sides": None}

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The rows of a side, or the drawn prompts; made when they are asked for."""
        check_split(split)
        if self._sides is None:
            count = self.train if split == "train" else self.heldout
            return generated(
                split,
                DRAWN[split] if count is None else count,
                lambda rng, index: self.draw(f"{split}-{index}", rng, index),
                seed=self.seed,
                key=self.drawn_key,
            )
        rows = self._sides[split]

        def make(index: int) -> Prompt:
            return self.row_prompt(f"{split}-{rows.number(index)}", rows[index], rows.where(index))

        return LazyPrompts(len(rows), make)

    def draw(self, id: str, rng: random.Random, index: int) -> Prompt:
        """A prompt of the task's own."""
        raise NotImplementedError

    def drawn_key(self, prompt: Prompt) -> str:
        """What makes two drawn prompts the same: the question."""
        return prompt.text.removesuffix(self._ending)

    def row_prompt(self, id: str, row: Row, where: str) -> Prompt:
        """The row's prompt. ValueError, with the place `where`, for a row that makes none."""
        raise NotImplementedError

    def row_key(self, row: Row, where: str) -> str:
        """The row's question; equal ones are never on both sides. ValueError as `row_prompt`."""
        raise NotImplementedError

    def chat(self, question: str) -> tuple[dict[str, str], ...]:
        """The messages that ask a question."""
        user = {"role": "user", "content": question + self._ending}
        return (
            (user,) if self.system is None else ({"role": "system", "content": self.system}, user)
        )

    @property
    def _ending(self) -> str:
        return f"\n{self.suffix}" if self.suffix else ""

    def _key(self, row: Row, where: str) -> str | None:
        try:
            return self.row_key(row, where)
        except ValueError:
            if self.skip:
                return None
            raise
