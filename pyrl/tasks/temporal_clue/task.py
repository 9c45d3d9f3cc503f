"""The puzzles as a task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyrl.tasks.generated import generated, side
from pyrl.tasks.protocol import SPLITS, LazyPrompts, Prompt, Split, check_split
from pyrl.tasks.temporal_clue.sheet import read_sheet, score_sheet

if TYPE_CHECKING:
    from pyrl.tasks.temporal_clue.store import Record

#: Numbers of puzzles that are drawn without `data`.
TRAIN, HELDOUT = 256, 64
#: How puzzles are shown.
STYLES = ("full", "compact")


class TemporalClue:
    """Prompts: a murder, its clues and lettered questions; see `prompt.render`, `render_compact`.

    Reward: (questions answered right) / (questions), on lines `A. answer`; see `sheet`. Puzzles
    that are the same but for names (`canonical.key`) are always in the same split: a key's side is
    fixed, so the splits of different seeds, levels and files do not overlap either.
    """

    name = "temporal_clue"
    trusted = True  # pure string checks, linear in the text: nothing to kill

    def __init__(
        self,
        *,
        data: str | None = None,
        level: str = "mini",
        train: int | None = None,
        heldout: int | None = None,
        seed: int = 0,
        limit: int | None = None,
        legacy: bool = False,
        style: str = "full",
        system: str | None = None,
    ) -> None:
        """data: JSONL file of `pyrl puzzles`; None draws puzzles of `level` when they are asked
        for; level: of the drawn puzzles, see `generate.LEVELS`; train, heldout: numbers of puzzles,
        None for all of the file, or 256 and 64 drawn ones; seed: decides which are drawn; limit:
        only the first that many training puzzles; legacy: score as the public scorer, for which
        times are never right; style: "full", a chat in plain English, or "compact", a bare text of
        names, clues and questions, with the same few names in all puzzles, for tiny models; system:
        the system message, None for none of our own; a bare text cannot have one.
        """
        for option, number in (("train", train), ("heldout", heldout), ("limit", limit)):
            if number is not None and number < 1:
                raise ValueError(f"{option}={number}: expected at least 1")
        if style not in STYLES:
            raise ValueError(f"style={style!r}: expected one of {', '.join(STYLES)}")
        if style == "compact" and system is not None:
            raise ValueError(f"system={system!r}: style 'compact' is a bare text, not a chat")
        self.legacy, self.style, self.system = legacy, style, system
        self._cache: dict[tuple[str, int], Prompt] = {}
        self._splits: dict[str, Sequence[Prompt]] = {}
        if data is None:
            from pyrl.tasks.temporal_clue.write import check_generator

            check_generator(level)
            sizes = {"train": train or TRAIN, "heldout": heldout or HELDOUT}
            for split in SPLITS:
                self._splits[split] = self._drawn(split, sizes[split], level, seed)  # type: ignore[arg-type]
        else:
            self._splits = self._stored(data, {"train": train, "heldout": heldout})
        if limit is not None:
            self._splits["train"] = _first(self._splits["train"], limit)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The puzzles of a split, in the file's order or as drawn; drawn ones are kept."""
        check_split(split)
        return self._splits[split]

    def score(self, prompt: Prompt, completion: str) -> float:
        """The reward in [0, 1]; see the class."""
        return score_sheet(prompt.data["answers"], completion, legacy=self.legacy)

    def answer(self, prompt: Prompt, completion: str) -> str | None:
        """The sheet, "A=ada thornbury;B=dagger", if it answers every question."""
        sheet = read_sheet(completion)
        letters = prompt.data["answers"]
        if not all(sheet.get(letter) for letter in letters):
            return None
        return ";".join(f"{letter}={sheet[letter]}" for letter in letters)

    def __getstate__(self) -> dict[str, Any]:
        """Scoring reads the prompt only: the puzzles stay here."""
        return vars(self) | {"_cache": {}, "_splits": {}}

    def _prompt(self, record: Record) -> Prompt:
        id = f"{record.level}-{record.seed}"
        data = {"answers": dict(record.answers), "key": record.key}
        if self.style == "compact":
            from pyrl.tasks.temporal_clue.compact import renamed, render_compact
            from pyrl.tasks.temporal_clue.prompt import answers

            puzzle = renamed(record.puzzle())
            return Prompt(id, render_compact(puzzle), data | {"answers": answers(puzzle)})
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return Prompt(id, (*system, {"role": "user", "content": record.prompt}), data)

    def _stored(self, data: str, sizes: dict[str, int | None]) -> dict[str, Sequence[Prompt]]:
        from pyrl.tasks.temporal_clue.store import read

        found: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
        for record in read(data):
            found[side(record.key)].append(self._prompt(record))
        for split, size in sizes.items():
            if size is not None and size > len(found[split]):
                raise ValueError(f"{split}={size}: {data} has {len(found[split])} such puzzles")
        return {split: found[split][: sizes[split]] for split in SPLITS}

    def _drawn(self, split: Split, count: int, level: str, seed: int) -> Sequence[Prompt]:
        prompts = generated(
            split, count, lambda rng, _: self._draw(rng, level), seed=seed,
            key=lambda prompt: prompt.data["key"],
        )  # fmt: skip

        def make(index: int) -> Prompt:
            if (split, index) not in self._cache:
                self._cache[split, index] = prompts[index]
            return self._cache[split, index]

        return LazyPrompts(count, make)

    def _draw(self, rng: random.Random, level: str) -> Prompt:
        from pyrl.tasks.temporal_clue.generate import generate
        from pyrl.tasks.temporal_clue.store import record

        return self._prompt(record(generate(rng.getrandbits(40), level)))


def _first(prompts: Sequence[Prompt], limit: int) -> Sequence[Prompt]:
    if limit > len(prompts):
        raise ValueError(f"limit={limit}: there are only {len(prompts)} training puzzles")
    return LazyPrompts(limit, lambda i: prompts[i])
