"""Candidate clues of a world, each with its bias: the lower, the sooner it is dropped."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice

from pyrl.tasks.temporal_clue.facts import Fact, holds
from pyrl.tasks.temporal_clue.world import World

#: A fact and its bias.
Candidate = tuple[Fact, float]

#: Shares of the pairs told otherwise: of "the murderer" or "the murder weapon", of a motive.
BY_ROLE, BY_MOTIVE = 2 / 3, 1 / 2


def candidates(rng: random.Random, world: World) -> list[Candidate]:
    """True facts that together determine the world, without repetitions.

    Directly: the solution −0.2; where pieces were −0.15, the murderer or the murder weapon −0.1;
    motives 0. With k = 2·round(direct/6): k exclusive-ors of a true and a false place, mean of
    their biases + 0.1; k/2 equivalences of two true and k/2 of two false places, mean + 0.2; at
    most k pairs in one room (0.5) or together at least once (0.8), + 1.5 if about the murderer or
    the murder weapon; at most k moves, 0.1, the murderer's 0.2; carried weapons 0.2, about the
    murderer or the murder weapon 0.35; at most k pairs in neighbouring rooms, 0.2.
    """
    direct: list[Candidate] = [(fact, -0.2) for fact in solution(world)]
    direct += places(world)
    direct += [(fact, 0.0) for fact in motives(world)]
    k = 2 * round(len(direct) / 6)
    drawn = [
        *direct,
        *_exclusive(rng, world, k),
        *_equivalent(rng, world, k // 2),
        *islice(_meetings(rng, world), k),
        *islice(_moves(rng, world), k),
        *_carriages(world),
        *_neighbours(rng, world, k),
    ]
    biases: dict[Fact, float] = {}
    for fact, bias in drawn:
        biases.setdefault(fact, bias)
    return list(biases.items())


def solution(world: World) -> list[Fact]:
    """Who, with what, where, when if there are several times, and why if there are motives."""
    facts: list[Fact] = [
        ("murderer", world.murderer),
        ("murder_weapon", world.weapon),
        ("murder_room", world.room),
    ]
    if len(world.times) > 1:
        facts.append(("murder_time", world.time))
    if world.motives:
        facts.append(("murder_motive", world.suspect_motives[world.murderer]))
    return facts


def motives(world: World) -> list[Fact]:
    """Each suspect's motive."""
    return [("motive", s, m) for s, m in enumerate(world.suspect_motives)]


def _told(world: World, piece: int, time: int, room: int) -> Iterator[Candidate]:
    """The ways to say where a piece was."""
    yield ("at", piece, time, room), -0.15
    if piece == world.murderer:
        yield ("murderer_at", time, room), -0.1
    if piece == len(world.suspects) + world.weapon:
        yield ("murder_weapon_at", time, room), -0.1
    if piece < len(world.suspect_motives):
        yield ("motive_at", world.suspect_motives[piece], time, room), -0.15


def places(world: World) -> Iterator[Candidate]:
    """Where each piece was at each time, in every way to say it, with biases."""
    for piece, path in enumerate(world.paths):
        for time, room in enumerate(path):
            yield from _told(world, piece, time, room)


def _drawn(rng: random.Random, world: World, n: int, true: bool) -> list[Candidate]:
    """n places, piece by piece, in random order of pieces and of a piece's times; if not `true`,
    each with one wrong room for the piece and the time, and none that is true all the same."""
    drawn: list[Candidate] = []
    for piece in _shuffled(rng, range(len(world.paths))):
        for time in _shuffled(rng, _times(world)):
            room = world.paths[piece][time]
            if not true:
                room = rng.choice([other for other in _rooms(world) if other != room])
            told = _told(world, piece, time, room)
            drawn += [place for place in told if holds(place[0], world) == true]
    return drawn[:n]


def _exclusive(rng: random.Random, world: World, n: int) -> Iterator[Candidate]:
    pairs = zip(
        _shuffled(rng, _drawn(rng, world, n, True)),
        _shuffled(rng, _drawn(rng, world, n, False)),
        strict=False,  # there may be fewer false ones
    )
    for (f, bias), (g, other) in pairs:
        f, g = (g, f) if rng.random() < 0.5 else (f, g)
        yield ("xor", f, g), (bias + other) / 2 + 0.1


def _equivalent(rng: random.Random, world: World, n: int) -> Iterator[Candidate]:
    for true in (True, False):
        first, second = (_drawn(rng, world, n, true) for _ in range(2))
        for (f, bias), (g, other) in zip(first, second, strict=False):
            if f != g:
                yield ("iff", f, g), (bias + other) / 2 + 0.2


def _meetings(rng: random.Random, world: World) -> Iterator[Candidate]:
    """For each occupied room of each time, in random order, two of the pieces there."""
    for time, room in _shuffled(rng, ((t, r) for t in _times(world) for r in _rooms(world))):
        present = [p for p, path in enumerate(world.paths) if path[time] == room]
        if len(present) < 2:
            continue
        first, second = rng.sample(present, 2)
        about, who = _reference(rng, world, first, second)
        if rng.random() < 0.5:
            kind = "same_room" if not about else f"{about}_with"
            fact, bias = (kind, *who, second, time), 0.5
        elif len(world.times) > 1:
            kind = "together" if not about else f"{about}_together"
            fact, bias = (kind, *who, second, room), 0.8
        else:
            continue
        yield fact, bias + 1.5 * about.startswith("murder")


def _reference(
    rng: random.Random, world: World, piece: int, other: int
) -> tuple[str, tuple[int, ...]]:
    """How a meeting names its first piece: the kind's prefix and arguments. By its role or motive
    only beside a piece of another sort."""
    suspects, weapons = range(len(world.suspects)), range(len(world.suspects), world.victim)
    if piece == world.murderer and other not in suspects and rng.random() < BY_ROLE:
        return "murderer", ()
    if world.motives and piece in suspects and other not in suspects and rng.random() < BY_MOTIVE:
        return "motive", (world.suspect_motives[piece],)
    arm = len(suspects) + world.weapon
    if piece == arm and other not in weapons and rng.random() < BY_ROLE:
        return "murder_weapon", ()
    return "", (piece,)


def _steps(world: World, pieces: Iterable[int]) -> Iterator[tuple[int, int, int, int]]:
    """(piece, time, from, to) of each change of room."""
    for piece in pieces:
        path = world.paths[piece]
        for time in range(1, len(path)):
            if path[time] != path[time - 1]:
                yield piece, time, path[time - 1], path[time]


def _moves(rng: random.Random, world: World) -> Iterator[Candidate]:
    """What suspects' steps say, step by step in random order."""
    for suspect, *step in _shuffled(rng, _steps(world, range(len(world.suspects)))):
        if suspect == world.murderer:
            yield ("murderer_moved", *step), 0.2
        if world.motives:
            yield ("motive_moved", world.suspect_motives[suspect], *step), 0.1
        yield ("moved", suspect, *step), 0.1


def _carriages(world: World) -> Iterator[Candidate]:
    """Weapons that moved, and each suspect who moved with them."""
    n = len(world.suspects)
    for piece, *step in _steps(world, range(n, world.victim)):
        weapon, (time, a, b) = piece - n, step
        for suspect in range(n):
            path = world.paths[suspect]
            if path[time - 1] != a or path[time] != b:
                continue
            if suspect == world.murderer:
                yield ("murderer_carried", weapon, *step), 0.35
            if weapon == world.weapon:
                yield ("carried_murder_weapon", suspect, *step), 0.35
            if world.motives:
                yield ("motive_carried", world.suspect_motives[suspect], weapon, *step), 0.2
            yield ("carried", suspect, weapon, *step), 0.2


def _neighbours(rng: random.Random, world: World, tries: int) -> Iterator[Candidate]:
    """Of `tries` pairs of occupied rooms at random times, those that are next to each other."""
    for _ in range(tries):
        time = rng.randrange(len(world.times))
        rooms = sorted({path[time] for path in world.paths})
        if len(rooms) < 2:
            continue
        pair = rng.sample(rooms, 2)
        p, q = (
            rng.choice([p for p, path in enumerate(world.paths) if path[time] == room])
            for room in pair
        )
        for direction in ("north", "south", "west", "east"):
            if world.beside(pair[1], direction) == pair[0]:
                yield (f"{direction}_of", p, q, time), 0.2


def _times(world: World) -> range:
    return range(len(world.times))


def _rooms(world: World) -> range:
    return range(len(world.rooms))


def _shuffled(rng: random.Random, items: Iterable) -> list:
    drawn = list(items)
    rng.shuffle(drawn)
    return drawn
