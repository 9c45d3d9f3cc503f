"""Puzzles in a JSONL file: one self-contained record a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrl.tasks.temporal_clue.sheet import check_answers

if TYPE_CHECKING:
    from pyrl.tasks.temporal_clue.generate import Puzzle

#: What a record's world has of each, in the order of `Record.sizes`.
SIZES = ("suspects", "weapons", "rooms", "times", "motives")


@dataclass(frozen=True)
class Record:
    """One puzzle as the file has it."""

    key: str
    """`canonical.key`: equal for puzzles that differ in names only."""
    seed: int
    level: str
    prompt: str
    answers: Mapping[str, str]
    """letter → right answer"""
    clues: tuple[Any, ...]
    """Facts; see `facts`."""
    questions: tuple[Mapping[str, Any], ...]
    """text, answer, fact of each, in the order of the letters"""
    world: Mapping[str, Any]
    """The fields of `world.World`."""

    @property
    def characters(self) -> int:
        """Length of the prompt."""
        return len(self.prompt)

    @property
    def sizes(self) -> dict[str, int]:
        """How many suspects, weapons, rooms, times and motives there are."""
        return {name: len(self.world[name]) for name in SIZES}

    def line(self) -> bytes:
        """The record as a line of the file."""
        content = asdict(self) | {"characters": self.characters, "sizes": self.sizes}
        return json.dumps(content, ensure_ascii=False).encode() + b"\n"

    def puzzle(self) -> Puzzle:
        """The puzzle that the record is of."""
        from pyrl.tasks.temporal_clue.generate import Puzzle, Question
        from pyrl.tasks.temporal_clue.world import World

        questions = tuple(Question(q["text"], q["answer"], q["fact"]) for q in self.questions)
        return Puzzle(self.seed, self.level, World(**self.world), self.clues, questions)


def record(puzzle: Puzzle) -> Record:
    """What is written of a puzzle."""
    from pyrl.tasks.temporal_clue.canonical import key
    from pyrl.tasks.temporal_clue.prompt import answers, render

    return Record(
        key=key(puzzle),
        seed=puzzle.seed,
        level=puzzle.level,
        prompt=render(puzzle),
        answers=answers(puzzle),
        clues=puzzle.clues,
        questions=tuple(
            {"text": q.text, "answer": q.answer, "fact": q.fact} for q in puzzle.questions
        ),
        world=asdict(puzzle.world),
    )


def read(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file, in order.

    ValueError naming the file, and the line, when there is no such file or no record in it, or when
    a line is no record.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    found = list(_records(file, file.read_bytes()))
    if not found:
        raise ValueError(f"{file}: there is no puzzle in it")
    return found


def _records(file: Path, content: bytes) -> Iterator[Record]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield parse(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None


def parse(line: bytes | str) -> Record:
    """The record of a line. ValueError saying what is wrong with it."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, found {type(content).__name__}")
    kinds = {
        "key": str, "seed": int, "level": str, "prompt": str, "answers": dict,
        "clues": list, "questions": list, "world": dict,
    }  # fmt: skip
    for name, kind in kinds.items():
        if type(content.get(name)) is not kind:  # True is no whole number
            problem = f"is {content[name]!r:.40}" if name in content else "is missing"
            raise ValueError(f"{name!r} {problem}; expected {_ENGLISH[kind]}")
    for name in ("key", "prompt"):
        if not content[name]:
            raise ValueError(f"{name!r} is empty")
    for name in SIZES:
        if not isinstance(content["world"].get(name), list):
            raise ValueError(f"'world' has no list {name!r}")
    check_answers(content["answers"])
    fields: dict[str, Any] = {name: content[name] for name in kinds}
    fields["clues"], fields["world"] = _tuples(fields["clues"]), _tuples(fields["world"])
    fields["questions"] = tuple(_question(q) for q in fields["questions"])
    return Record(**fields)


_ENGLISH = {str: "a string", int: "a whole number", dict: "an object", list: "a list"}


def _question(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or not {"text", "answer", "fact"} <= content.keys():
        raise ValueError(f"'questions' has {content!r:.40}; expected text, answer and fact")
    return dict(_tuples(content))


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were written from."""
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return value
