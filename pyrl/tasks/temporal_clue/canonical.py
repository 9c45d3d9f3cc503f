"""One key for all the ways to write down the same puzzle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrl.tasks.temporal_clue.generate import Puzzle
    from pyrl.tasks.temporal_clue.world import World

#: What a clue is about: (sort, index).
Thing = tuple[str, int]

#: Kinds whose arguments of one sort may be swapped without changing what is said.
UNORDERED = {"same_room", "together", "xor", "iff", "beside"}
#: A plan that is turned or mirrored turns its directions: all four count as one.
MERGED = dict.fromkeys(("north_of", "south_of", "west_of", "east_of"), "beside")


def key(puzzle: Puzzle) -> str:
    """Equal for isomorphic puzzles: whatever their things are called, whatever the order of
    suspects, weapons, motives and clues, and however the plan of the house is turned or mirrored.

    A Weisfeiler-Leman hash (1968) of what the solver is given: sizes, plan, number of suspects per
    motive, clues; the questions do not count. A thing's colour is refined by the colours of the
    clues it is in, and a room's by its neighbours', until no more things can be told apart.
    Different puzzles may collide; they are then on the same side of a split, which loses nothing.
    ValueError for a clue of an unknown kind.
    """
    world = puzzle.world
    colours = _first(world)
    about = {thing: [] for thing in colours}  # type: dict[Thing, list[Any]]
    for clue in puzzle.clues:
        for thing in set(_things(clue, world)):
            about[thing].append(clue)
    classes = 0
    while len(set(colours.values())) > classes:
        classes = len(set(colours.values()))
        colours = {
            thing: _hash(
                colours[thing],
                *sorted(_colour(clue, world, colours, thing) for clue in about[thing]),
                "beside",
                *sorted(_beside(thing, world, colours)),
            )
            for thing in colours
        }
    clues = sorted(_colour(clue, world, colours) for clue in puzzle.clues)
    return _hash(*sorted(colours.values()), "clues", *clues)


def _first(world: World) -> dict[Thing, str]:
    """What tells things apart before any clue: their sort, the order of the times, and how many
    suspects have a motive."""
    counts = [world.suspect_motives.count(m) for m in range(len(world.motives))]
    return {
        **{("suspect", i): "suspect" for i in range(len(world.suspects))},
        **{("weapon", i): "weapon" for i in range(len(world.weapons))},
        ("victim", 0): "victim",
        **{("room", i): "room" for i in range(len(world.rooms))},
        **{("time", i): f"time {i}" for i in range(len(world.times))},
        **{("motive", i): f"motive of {count}" for i, count in enumerate(counts)},
    }


def _parts(fact: Any, world: World) -> Iterator[tuple[str, Any]]:
    """(sort, thing or fact) of each argument."""
    from pyrl.tasks.temporal_clue.facts import SORTS

    if fact[0] not in SORTS:
        raise ValueError(f"clue of unknown kind {fact[0]!r}")
    for sort, argument in zip(SORTS[fact[0]], fact[1:], strict=True):
        if sort == "piece":
            suspects = len(world.suspects)
            if argument < suspects:
                yield sort, ("suspect", argument)
            elif argument == world.victim:
                yield sort, ("victim", 0)
            else:
                yield sort, ("weapon", argument - suspects)
        else:
            yield sort, argument if sort == "fact" else (sort, argument)


def _things(fact: Any, world: World) -> Iterator[Thing]:
    for sort, part in _parts(fact, world):
        if sort == "fact":
            yield from _things(part, world)
        else:
            yield part


def _colour(fact: Any, world: World, colours: dict[Thing, str], marked: Thing | None = None) -> str:
    """The fact with its things replaced by their colours; `marked` is told apart from the rest."""
    kind = MERGED.get(fact[0], fact[0])
    parts = [
        _colour(part, world, colours, marked)
        if sort == "fact"
        else f"{sort} {colours[part]}{' itself' if part == marked else ''}"
        for sort, part in _parts(fact, world)
    ]
    return _hash(kind, *(sorted(parts) if kind in UNORDERED else parts))


def _beside(thing: Thing, world: World, colours: dict[Thing, str]) -> list[str]:
    if thing[0] != "room":
        return []
    return [colours["room", other] for other in world.neighbours(thing[1])]


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
