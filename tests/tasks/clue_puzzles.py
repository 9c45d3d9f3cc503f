"""Puzzles for the tests of Temporal Clue: toy ones, renamed ones, and every night of a tiny one."""

import dataclasses
import itertools
import random

from pyrl.tasks.temporal_clue import names
from pyrl.tasks.temporal_clue.clues import candidates, solution
from pyrl.tasks.temporal_clue.facts import SORTS, holds
from pyrl.tasks.temporal_clue.generate import Puzzle, Question
from pyrl.tasks.temporal_clue.world import Sizes, draw_world

MIRRORED = {
    "rows": {"north_of": "south_of", "south_of": "north_of"},
    "columns": {"west_of": "east_of", "east_of": "west_of"},
    "diagonal": {
        "north_of": "west_of", "west_of": "north_of", "south_of": "east_of", "east_of": "south_of",
    },
}  # fmt: skip


def toy(seed, players=(1, 1), clues=6):
    """A night with some true clues, which need not determine it."""
    rng = random.Random(seed)
    world = draw_world(rng, Sizes(players=players))
    known = [fact for fact, _ in candidates(rng, world)]
    facts = solution(world)[:1]
    questions = tuple(Question("Who was it?", world.suspects[world.murderer], f) for f in facts)
    chosen = tuple(rng.sample(known, min(clues, len(known))))
    return Puzzle(seed, "toy", world, chosen, questions)


def renamed(puzzle, rng, mirror=None):
    """The same puzzle with other names, in another order, its plan perhaps mirrored."""
    world = puzzle.world
    suspects, weapons = len(world.suspects), len(world.weapons)
    maps = {
        "suspect": shuffled(rng, suspects),
        "weapon": shuffled(rng, weapons),
        "motive": shuffled(rng, len(world.motives)),
        "time": list(range(len(world.times))),
    }
    maps["piece"] = [
        *maps["suspect"], *(suspects + w for w in maps["weapon"]), suspects + weapons
    ]  # fmt: skip
    maps["room"], columns = moved_rooms(len(world.rooms), world.columns, mirror)

    def fact(f):
        kind = MIRRORED.get(mirror, {}).get(f[0], f[0])
        arguments = [
            fact(a) if sort == "fact" else maps[sort][a]
            for sort, a in zip(SORTS[f[0]], f[1:], strict=True)
        ]
        if kind in ("xor", "iff", "same_room", "together") and rng.random() < 0.5:
            arguments[:2] = arguments[1::-1]
        return (kind, *arguments)

    def ordered(values, sort):
        out = [None] * len(values)
        for i, value in enumerate(values):
            out[maps[sort][i]] = value
        return tuple(out)

    other = dataclasses.replace(
        world,
        suspects=tuple(rng.sample(names.SUSPECTS, suspects)),
        weapons=tuple(rng.sample(names.WEAPONS, weapons)),
        rooms=tuple(rng.sample(names.ROOMS, len(world.rooms))),
        motives=tuple(rng.sample(names.MOTIVES, len(world.motives))),
        columns=columns,
        suspect_motives=tuple(maps["motive"][m] for m in ordered(world.suspect_motives, "suspect"))
        if world.motives
        else (),
        paths=tuple(tuple(maps["room"][r] for r in p) for p in ordered(world.paths, "piece")),
        murderer=maps["suspect"][world.murderer],
        weapon=maps["weapon"][world.weapon],
        room=maps["room"][world.room],
    )
    clues = [fact(clue) for clue in puzzle.clues]
    rng.shuffle(clues)
    assert all(holds(clue, other) for clue in clues)
    return dataclasses.replace(puzzle, world=other, clues=tuple(clues))


def shuffled(rng, count):
    return rng.sample(range(count), count)


def moved_rooms(rooms, columns, mirror):
    """room -> room of the mirrored plan, and its columns; the plan must be a full rectangle."""
    rows = rooms // columns
    new = []
    for room in range(rooms):
        row, column = divmod(room, columns)
        if mirror == "rows":
            row = rows - 1 - row
        if mirror == "columns":
            column = columns - 1 - column
        new.append(column * rows + row if mirror == "diagonal" else row * columns + column)
    return new, rows if mirror == "diagonal" else columns


def nights(world):
    """Every night that keeps the rules, one by one: only for a handful of rooms and times."""
    suspects, weapons = len(world.suspects), len(world.weapons)
    rooms, times = range(len(world.rooms)), range(len(world.times))
    steps = {(a, b) for a in rooms for b in (a, *world.neighbours(a))}
    walks = [
        path
        for path in itertools.product(rooms, repeat=len(times))
        if all(step in steps for step in itertools.pairwise(path))
    ]
    motives = sorted(set(itertools.permutations(world.suspect_motives)))
    for people in itertools.product(walks, repeat=suspects):
        moves = {(t, p[t - 1], p[t]) for p in people for t in times[1:]}
        carried = [
            p for p in walks
            if all(p[t] == p[t - 1] or (t, p[t - 1], p[t]) in moves for t in times[1:])
        ]  # fmt: skip
        for time, room in itertools.product(times, rooms):
            there = [s for s in range(suspects) if people[s][time] == room]
            if len(there) != 1:
                continue
            victims = [p for p in walks if all(r == room for r in p[time:])]
            for things in itertools.product(carried, repeat=weapons):
                for weapon, victim, motive in itertools.product(range(weapons), victims, motives):
                    if things[weapon][time] == room:
                        yield dataclasses.replace(
                            world, paths=(*people, *things, victim), suspect_motives=motive,
                            murderer=there[0], weapon=weapon, room=room, time=time,
                        )  # fmt: skip
