"""Statements about a night: plain nested tuples (kind, *arguments), their truth and their English.

Each kind and the sorts of its arguments stand in SORTS, so a fact can be walked without knowing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pyrl.tasks.temporal_clue import names
from pyrl.tasks.temporal_clue.world import World

#: (kind, argument, …); an argument is an index of its sort, or a fact.
Fact = tuple

#: kind -> the sort of each argument.
SORTS: dict[str, tuple[str, ...]] = {
    # A piece was in the room at the time; "motive_": some suspect with that motive.
    "at": ("piece", "time", "room"),
    "murderer_at": ("time", "room"),
    "murder_weapon_at": ("time", "room"),
    "motive_at": ("motive", "time", "room"),
    "motive": ("suspect", "motive"),
    "murderer": ("suspect",),
    "murder_weapon": ("weapon",),
    "murder_room": ("room",),
    "murder_time": ("time",),
    "murder_motive": ("motive",),
    # Both in one room, any room, at the time.
    "same_room": ("piece", "piece", "time"),
    "murderer_with": ("piece", "time"),
    "murder_weapon_with": ("piece", "time"),
    "motive_with": ("motive", "piece", "time"),
    # Both in that room at once, at some time.
    "together": ("piece", "piece", "room"),
    "murderer_together": ("piece", "room"),
    "murder_weapon_together": ("piece", "room"),
    "motive_together": ("motive", "piece", "room"),
    # In the first room at the time before, in the second at the time (which is 1 or later).
    "moved": ("piece", "time", "room", "room"),
    "murderer_moved": ("time", "room", "room"),
    "motive_moved": ("motive", "time", "room", "room"),
    # Both a suspect (the murderer, one with the motive) and a weapon (the murder weapon) did so.
    "carried": ("suspect", "weapon", "time", "room", "room"),
    "murderer_carried": ("weapon", "time", "room", "room"),
    "carried_murder_weapon": ("suspect", "time", "room", "room"),
    "motive_carried": ("motive", "weapon", "time", "room", "room"),
    # The first piece was in the next room of that direction from the second's, at the time.
    "north_of": ("piece", "piece", "time"),
    "south_of": ("piece", "piece", "time"),
    "west_of": ("piece", "piece", "time"),
    "east_of": ("piece", "piece", "time"),
    # Exactly one of two facts; both or neither.
    "xor": ("fact", "fact"),
    "iff": ("fact", "fact"),
}


def with_motive(world: World, motive: int) -> Iterator[int]:
    """The suspects with this motive."""
    return (s for s, own in enumerate(world.suspect_motives) if own == motive)


# The three relations that several kinds share, for any of the pieces that a phrase may mean.


def _with(w: World, pieces: Iterable[int], other: int, time: int) -> bool:
    return any(w.paths[p][time] == w.paths[other][time] for p in pieces)


def _together(w: World, pieces: Iterable[int], other: int, room: int) -> bool:
    return any(
        a == room and b == room
        for p in pieces
        for a, b in zip(w.paths[p], w.paths[other], strict=True)
    )


def _moved(w: World, pieces: Iterable[int], time: int, a: int, b: int) -> bool:
    return time > 0 and any(w.paths[p][time - 1] == a and w.paths[p][time] == b for p in pieces)


def _beside(w: World, p: int, q: int, time: int, direction: str) -> bool:
    return w.paths[p][time] == w.beside(w.paths[q][time], direction)


def _arm(w: World, weapon: int) -> int:
    return len(w.suspects) + weapon  # as a piece


_HOLDS: dict[str, Callable[..., bool]] = {
    "at": lambda w, p, t, r: w.paths[p][t] == r,
    "murderer_at": lambda w, t, r: w.paths[w.murderer][t] == r,
    "murder_weapon_at": lambda w, t, r: w.paths[_arm(w, w.weapon)][t] == r,
    "motive_at": lambda w, m, t, r: any(w.paths[s][t] == r for s in with_motive(w, m)),
    "motive": lambda w, s, m: w.suspect_motives[s] == m,
    "murderer": lambda w, s: w.murderer == s,
    "murder_weapon": lambda w, a: w.weapon == a,
    "murder_room": lambda w, r: w.room == r,
    "murder_time": lambda w, t: w.time == t,
    "murder_motive": lambda w, m: w.suspect_motives[w.murderer] == m,
    "same_room": lambda w, p, q, t: _with(w, (p,), q, t),
    "murderer_with": lambda w, q, t: _with(w, (w.murderer,), q, t),
    "murder_weapon_with": lambda w, q, t: _with(w, (_arm(w, w.weapon),), q, t),
    "motive_with": lambda w, m, q, t: _with(w, with_motive(w, m), q, t),
    "together": lambda w, p, q, r: _together(w, (p,), q, r),
    "murderer_together": lambda w, q, r: _together(w, (w.murderer,), q, r),
    "murder_weapon_together": lambda w, q, r: _together(w, (_arm(w, w.weapon),), q, r),
    "motive_together": lambda w, m, q, r: _together(w, with_motive(w, m), q, r),
    "moved": lambda w, p, t, a, b: _moved(w, (p,), t, a, b),
    "murderer_moved": lambda w, t, a, b: _moved(w, (w.murderer,), t, a, b),
    "motive_moved": lambda w, m, t, a, b: _moved(w, with_motive(w, m), t, a, b),
    "carried": lambda w, s, a, t, x, y: (
        _moved(w, (s,), t, x, y) and _moved(w, (_arm(w, a),), t, x, y)
    ),
    "murderer_carried": lambda w, a, t, x, y: (
        _moved(w, (w.murderer,), t, x, y) and _moved(w, (_arm(w, a),), t, x, y)
    ),
    "carried_murder_weapon": lambda w, s, t, x, y: (
        _moved(w, (s,), t, x, y) and _moved(w, (_arm(w, w.weapon),), t, x, y)
    ),
    "motive_carried": lambda w, m, a, t, x, y: (
        _moved(w, with_motive(w, m), t, x, y) and _moved(w, (_arm(w, a),), t, x, y)
    ),
    "north_of": lambda w, p, q, t: _beside(w, p, q, t, "north"),
    "south_of": lambda w, p, q, t: _beside(w, p, q, t, "south"),
    "west_of": lambda w, p, q, t: _beside(w, p, q, t, "west"),
    "east_of": lambda w, p, q, t: _beside(w, p, q, t, "east"),
    "xor": lambda w, f, g: holds(f, w) != holds(g, w),
    "iff": lambda w, f, g: holds(f, w) == holds(g, w),
}


def holds(fact: Fact, world: World) -> bool:
    """Whether the fact is true of the world. KeyError for an unknown kind."""
    return _HOLDS[fact[0]](world, *fact[1:])


def text(fact: Fact, world: World) -> str:
    """An English sentence with its full stop. Of the world it reads only what every solver knows:
    names, and how many suspects have a motive."""
    words = phrase(fact, world)
    return f"{words[0].upper()}{words[1:]}."


def piece_name(piece: int, world: World) -> str:
    """A piece as a sentence says it: "the Dagger", "Ada Thornbury"."""
    is_weapon = len(world.suspects) <= piece < world.victim
    return f"the {world.piece(piece)}" if is_weapon else world.piece(piece)


def motive_holder(motive: int, world: World) -> str:
    """ "the suspect motivated by Envy", or "a suspect …" where several have the motive."""
    article = "the" if world.motive_count(motive) == 1 else "a"
    return f"{article} suspect motivated by {world.motives[motive]}"


def when(time: int, world: World) -> str:
    """ " at 11:30 PM"; nothing where there is only one time."""
    return f" at {world.times[time]}" if len(world.times) > 1 else ""


#: A kind's name without what says whose place it is about: "murderer_moved" is "moved" of murderer.
_SUBJECTS = ("murder_weapon_", "murderer_", "motive_")


def phrase(fact: Fact, world: World) -> str:
    """The sentence without its capital and full stop, as it stands within another."""
    kind, arguments = fact[0], fact[1:]
    if kind in ("xor", "iff"):
        first, second = (phrase(part, world) for part in arguments)
        if kind == "xor":
            return f"either {first}, or {second}, but not both"
        return f"{first} if and only if {second}"
    if kind in _SOLUTION:
        return _SOLUTION[kind](world, *arguments)
    relation = kind
    for prefix in _SUBJECTS:
        relation = relation.removeprefix(prefix)
    subject, arguments = _subject(kind, arguments, world)
    return f"{subject} {_RELATION[relation](world, *arguments)}"


def _subject(kind: str, arguments: tuple, world: World) -> tuple[str, tuple]:
    """Who or what the sentence begins with, and the arguments that remain to be said."""
    if kind == "carried_murder_weapon":
        return piece_name(arguments[0], world), (None, *arguments[1:])
    if kind.startswith("murderer_"):
        return "the murderer", arguments
    if kind.startswith("murder_weapon_"):
        return "the murder weapon", arguments
    if kind.startswith("motive_"):
        return motive_holder(arguments[0], world), arguments[1:]
    return piece_name(arguments[0], world), arguments[1:]


def _travel(world: World, time: int, a: int, b: int) -> str:
    return f"from the {world.rooms[a]} to the {world.rooms[b]}{when(time, world)}"


_SOLUTION: dict[str, Callable[..., str]] = {
    "motive": lambda w, s, m: f"{w.suspects[s]} was motivated by {w.motives[m]}",
    "murderer": lambda w, s: f"{w.suspects[s]} murdered {names.VICTIM}",
    "murder_weapon": lambda w, a: f"{names.VICTIM} was murdered with the {w.weapons[a]}",
    "murder_room": lambda w, r: f"{names.VICTIM} was murdered in the {w.rooms[r]}",
    "murder_time": lambda w, t: f"{names.VICTIM} was murdered at {w.times[t]}",
    "murder_motive": lambda w, m: f"{names.VICTIM} was murdered by {motive_holder(m, w)}",
}

_RELATION: dict[str, Callable[..., str]] = {
    "at": lambda w, t, r: f"was in the {w.rooms[r]}{when(t, w)}",
    "same_room": lambda w, q, t: f"was in the same room as {piece_name(q, w)}{when(t, w)}",
    "together": lambda w, q, r: (
        f"was together with {piece_name(q, w)} in the {w.rooms[r]} at least once"
    ),
    "moved": lambda w, t, a, b: f"moved {_travel(w, t, a, b)}",
    "carried": lambda w, arm, t, a, b: (
        f"carried the {'murder weapon' if arm is None else w.weapons[arm]} {_travel(w, t, a, b)}"
    ),
    **{
        f"{d}_of": lambda w, q, t, d=d: (
            f"was in the room just {d} of {piece_name(q, w)}{when(t, w)}"
        )
        for d in ("north", "south", "west", "east")
    },
}
_RELATION["with"] = _RELATION["same_room"]
_RELATION["carried_murder_weapon"] = _RELATION["carried"]
