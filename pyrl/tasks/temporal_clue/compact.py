"""A puzzle in as few words as it takes, for models that are made for such puzzles."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from pyrl.tasks.temporal_clue import names
from pyrl.tasks.temporal_clue.prompt import LETTERS

if TYPE_CHECKING:
    from pyrl.tasks.temporal_clue.facts import Fact
    from pyrl.tasks.temporal_clue.generate import Puzzle, Question
    from pyrl.tasks.temporal_clue.world import World


def renamed(puzzle: Puzzle) -> Puzzle:
    """The same puzzle with the first names of each pool, in their order: a name then means the same
    in every puzzle (the first room is in the north-west)."""
    world = puzzle.world
    pools = {
        "suspects": names.SUSPECTS, "weapons": names.WEAPONS, "rooms": names.ROOMS,
        "motives": names.MOTIVES,
    }  # fmt: skip
    given: dict[str, Any] = {
        field: pool[: len(getattr(world, field))] for field, pool in pools.items()
    }
    new = {
        old: name
        for field, pool in given.items()
        for old, name in zip(getattr(world, field), pool, strict=True)
    }
    pattern = re.compile("|".join(map(re.escape, sorted(new, key=len, reverse=True))))

    def told(text: str) -> str:
        return pattern.sub(lambda match: new[match[0]], text)

    questions = tuple(
        dataclasses.replace(q, text=told(q.text), answer=told(q.answer)) for q in puzzle.questions
    )
    return dataclasses.replace(
        puzzle, world=dataclasses.replace(world, **given), questions=questions
    )


def render_compact(puzzle: Puzzle) -> str:
    """Names and plan, clues and lettered questions in shorthand, a line each: of the smallest
    puzzles about 30 to 60 words.

    The clues and questions are the puzzle's own. The story and the rules are left out: they are the
    same for every puzzle, and a model learns them from rewards.
    """
    world = puzzle.world
    lines = [
        ", ".join(world.suspects),
        ", ".join(world.weapons),
        *([_motives(world)] if world.motives else []),
        _plan(world),
        ", ".join(world.times),
        "Clues:",
        *(shorthand(clue, world) for clue in puzzle.clues),
        "Questions:",
        *(f"{LETTERS[i]}. {_asked(q, world)}" for i, q in enumerate(puzzle.questions)),
        "Answers:\n",
    ]
    return "\n".join(lines)


#: Kind of fact -> how it is said: {0}, {1}, … are its arguments, by name.
_SHORT = {
    "at": "{0} in {2}{1}",
    "motive": "{0} has {1}",
    "murderer": "murderer is {0}",
    "murder_weapon": "murder weapon is {0}",
    "murder_room": "murder in {0}",
    "murder_time": "murder{0}",
    "murder_motive": "murderer has {0}",
    "same_room": "{0} with {1}{2}",
    "with": "{0} with {1}{2}",
    "together": "{0} once with {1} in {2}",
    "moved": "{0} from {2} to {3}{1}",
    "carried": "{0} took {1} from {3} to {4}{2}",
    **{f"{way}_of": f"{{0}} {way} of {{1}}{{2}}" for way in ("north", "south", "west", "east")},
    "xor": "either {0} or {1}",
    "iff": "{0} iff {1}",
}
_ROLES = {"murderer_": "murderer", "murder_weapon_": "murder weapon"}


def shorthand(fact: Fact, world: World) -> str:
    """A clue in few words. KeyError for an unknown kind."""
    from pyrl.tasks.temporal_clue.facts import SORTS

    kind = fact[0]
    said = [_named(sort, value, world) for sort, value in zip(SORTS[kind], fact[1:], strict=True)]
    if kind in _SHORT:
        return _SHORT[kind].format(*said)
    if kind == "carried_murder_weapon":
        return _SHORT["carried"].format(said[0], "murder weapon", *said[1:])
    for prefix, role in _ROLES.items():
        if kind.startswith(prefix):
            return _SHORT[kind.removeprefix(prefix)].format(role, *said)
    return _SHORT[kind.removeprefix("motive_")].format(*said)  # whoever has it


def _named(sort: str, value: Any, world: World) -> str:
    """An argument as it is said; a time with " at ", and not at all where there is only one."""
    if sort == "fact":
        return shorthand(value, world)
    if sort == "piece":
        return world.piece(value)
    if sort == "time":
        return f" at {world.times[value]}" if len(world.times) > 1 else ""
    return getattr(world, f"{sort}s")[value]


def _asked(question: Question, world: World) -> str:
    """What the answer is put for: the fact without it."""
    answer = question.answer
    told = shorthand(question.fact, world)
    return told.replace(answer, "?", 1) if answer in told else told


def _motives(world: World) -> str:
    counts = [world.motive_count(motive) for motive in range(len(world.motives))]
    return ", ".join(
        name if count == 1 else f"{name} ({count})"
        for name, count in zip(world.motives, counts, strict=True)
    )


def _plan(world: World) -> str:
    """The grid's rows from north to south, in each the rooms from west to east."""
    rows = range(0, len(world.rooms), world.columns)
    return " / ".join(" | ".join(world.rooms[i : i + world.columns]) for i in rows)
