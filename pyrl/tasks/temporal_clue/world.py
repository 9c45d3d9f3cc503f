"""One night at the mansion: who and what was where at each time, and the murder."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from pyrl.tasks.temporal_clue import names

#: Draws of a murder in one night, and nights drawn, before giving up.
MURDER_TRIES, NIGHTS = 10, 60


@dataclass(frozen=True)
class World:
    """What happened. Suspects S, weapons W, rooms R, times T, motives M are indices into names.

    Pieces are suspects 0…S−1, weapons S…S+W−1, and last the victim S+W.
    """

    suspects: tuple[str, ...]
    weapons: tuple[str, ...]
    rooms: tuple[str, ...]  # fill the grid row by row from the north-west; the last may be short
    times: tuple[str, ...]  # in order, such as "11:30 PM"
    motives: tuple[str, ...]  # each somebody's; empty where motives play no part, never just one
    columns: int  # of the grid
    suspect_motives: tuple[int, ...]  # [S] -> motive; empty if there are no motives
    paths: tuple[tuple[int, ...], ...]  # [S+W+1 pieces][T] -> room
    victim: int  # a piece: always S+W
    murderer: int  # a suspect
    weapon: int  # a weapon: 0…W−1, piece S+weapon
    room: int
    time: int

    def neighbours(self, room: int) -> tuple[int, ...]:
        """The rooms north, south, west and east of `room`, those that exist."""
        return neighbours(room, len(self.rooms), self.columns)

    def beside(self, room: int, direction: str) -> int | None:
        """The room just "north", "south", "west" or "east" of `room`."""
        return beside(room, direction, len(self.rooms), self.columns)

    def piece(self, index: int) -> str:
        """The name of a piece, without an article."""
        return (*self.suspects, *self.weapons, names.VICTIM)[index]

    def motive_count(self, motive: int) -> int:
        """The number of suspects with this motive; the solver of the puzzle knows it."""
        return self.suspect_motives.count(motive)

    @property
    def unique_motives(self) -> bool:
        """No two suspects share a motive."""
        return len(set(self.suspect_motives)) == len(self.suspect_motives)


def beside(room: int, direction: str, rooms: int, columns: int) -> int | None:
    """As `World.beside`."""
    row, column = divmod(room, columns)
    down, right = {"north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}[direction]
    row, column = row + down, column + right
    there = row * columns + column
    return there if row >= 0 and 0 <= column < columns and there < rooms else None


def neighbours(room: int, rooms: int, columns: int) -> tuple[int, ...]:
    """As `World.neighbours`."""
    around = (beside(room, d, rooms, columns) for d in ("north", "south", "west", "east"))
    return tuple(there for there in around if there is not None)


@dataclass(frozen=True)
class Sizes:
    """How large and how lively a night is. With p = U{players[0]…players[1]}:

    W = max(2, min(p + U{−1…5}, ⌊2.125p⌋, 8)), S = min(W + U{0…W−1}, ⌊2.5p⌋, 10),
    R = min(S + U{0…S−2}, 3p, 17), T = U{1…min(2p, times)}; with probability `unique` each
    suspect has his own motive, else each draws one of U{1…S} motives. Fewer than two motives drawn:
    no motives.
    """

    players: tuple[int, int] = (1, 6)
    times: int = 12  # most
    unique: float = 0.5
    move: float = 0.5  # probability that a character leaves his room at a time
    carry: float = 0.8  # probability that a weapon goes with its holder who leaves


def draw_world(rng: random.Random, sizes: Sizes = Sizes()) -> World:
    """A night with a murder, a function of the generator's state.

    Suspects start anywhere and at each later time move to a neighbouring room w.p. `move`. A weapon
    starts anywhere; at each later time it first follows its holder w.p. `carry` if he left, then a
    random suspect in its room, if any, holds it. The murderer is alone among suspects in a room
    with a weapon; the victim is there from then on, and came there by a random walk.
    ValueError if NIGHTS nights had no such moment.
    """
    low, high = sizes.players
    if not 1 <= low <= high:
        raise ValueError(f"players={sizes.players}: expected 1 <= lowest <= highest")
    if sizes.times < 1:
        raise ValueError(f"times={sizes.times}: expected at least 1")
    for _ in range(NIGHTS):
        world = _night(rng, rng.randint(low, high), sizes)
        if world is not None:
            return world
    raise ValueError(f"no murder was possible in {NIGHTS} nights of {sizes}")


def _night(rng: random.Random, players: int, sizes: Sizes) -> World | None:
    n_weapons = max(2, min(players + rng.randint(-1, 5), int(2.125 * players), 8))
    n_suspects = min(n_weapons + rng.randint(0, n_weapons - 1), int(2.5 * players), 10)
    n_rooms = min(n_suspects + rng.randint(0, n_suspects - 2), 3 * players, 17)
    n_times = rng.randint(1, min(2 * players, sizes.times))
    unique = rng.random() < sizes.unique
    n_motives = n_suspects if unique else rng.randint(1, n_suspects)
    columns = rng.choice((math.isqrt(n_rooms), math.isqrt(n_rooms - 1) + 1))  # floor, ceil of root
    nearby = [neighbours(room, n_rooms, columns) for room in range(n_rooms)]

    suspects = [
        _walk(rng, rng.randrange(n_rooms), n_times, nearby, sizes) for _ in range(n_suspects)
    ]
    weapons = [_carried(rng, rng.randrange(n_rooms), suspects, sizes) for _ in range(n_weapons)]
    motives = (
        rng.sample(range(n_motives), n_suspects)
        if unique
        else [rng.randrange(n_motives) for _ in range(n_suspects)]
    )
    drawn = sorted(set(motives))
    if len(drawn) < 2:
        motives, drawn = [], []

    for _ in range(MURDER_TRIES):
        murderer, time = rng.randrange(n_suspects), rng.randrange(n_times)
        room = suspects[murderer][time]
        arms = [w for w in range(n_weapons) if weapons[w][time] == room]
        if arms and sum(path[time] == room for path in suspects) == 1:
            break
    else:
        return None
    before = _walk(rng, room, time + 1, nearby, sizes)  # from the murder backwards
    return World(
        suspects=tuple(rng.sample(names.SUSPECTS, n_suspects)),
        weapons=tuple(rng.sample(names.WEAPONS, n_weapons)),
        rooms=tuple(rng.sample(names.ROOMS, n_rooms)),
        times=_clock(rng, n_times),
        motives=tuple(rng.sample(names.MOTIVES, len(drawn))),
        columns=columns,
        suspect_motives=tuple(drawn.index(motive) for motive in motives),
        paths=tuple(
            map(tuple, (*suspects, *weapons, before[::-1] + [room] * (n_times - time - 1)))
        ),
        victim=n_suspects + n_weapons,
        murderer=murderer,
        weapon=rng.choice(arms),
        room=room,
        time=time,
    )


def _walk(
    rng: random.Random, room: int, times: int, nearby: list[tuple[int, ...]], sizes: Sizes
) -> list[int]:
    path = [room]
    while len(path) < times:
        path.append(rng.choice(nearby[path[-1]]) if rng.random() < sizes.move else path[-1])
    return path


def _carried(rng: random.Random, room: int, suspects: list[list[int]], sizes: Sizes) -> list[int]:
    path, holder = [room], -1  # nobody holds a weapon at first
    for time in range(1, len(suspects[0])):
        follows = holder >= 0 and suspects[holder][time] != room and rng.random() < sizes.carry
        room = suspects[holder][time] if follows else room
        present = [s for s, walk in enumerate(suspects) if walk[time] == room]
        holder = rng.choice(present) if present else -1
        path.append(room)
    return path


def _clock(rng: random.Random, times: int) -> tuple[str, ...]:
    """Times 15, 30 or 60 minutes apart, 12:00 AM among them and, if several, one before it."""
    step = rng.choice((15, 30, 60))
    before = 0 if times == 1 else 1 + sum(rng.random() < 0.5 for _ in range(times - 2))
    minutes = [(step * (i - before)) % (24 * 60) for i in range(times)]
    return tuple(
        f"{(m // 60 - 1) % 12 + 1}:{m % 60:02d} {'AM' if m < 12 * 60 else 'PM'}" for m in minutes
    )
