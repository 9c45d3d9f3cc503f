"""Puzzles: a night, clues none of which can be spared, and questions that no clue answers alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pyrl.tasks.temporal_clue import facts, names
from pyrl.tasks.temporal_clue.clues import candidates, motives, places, solution
from pyrl.tasks.temporal_clue.facts import Fact
from pyrl.tasks.temporal_clue.minimise import minimise
from pyrl.tasks.temporal_clue.model import Undecided
from pyrl.tasks.temporal_clue.world import Sizes, World, draw_world

#: Nights drawn for one puzzle, one after another until a puzzle comes of one.
ATTEMPTS = 100


@dataclass(frozen=True)
class Level:
    """A class of puzzles: sizes of nights; most and fewest questions, and most clues, of one."""

    sizes: Sizes
    most: int = 8
    fewest: int = 1
    clues: int | None = None  # no limit
    compound: bool = True  # whether clues may be two facts of which one, or both or neither, hold


#: "published" is the distribution of the published sets. "mini" is its smallest class: 2 suspects,
#: weapons and rooms, 1 or 2 times, no motives or one each, its clues and questions less than 250
#: tokens of SmolLM2. "2x2" is it at one time and without clues of two parts: nobody moves, and a
#: network of some hundred thousand parameters can learn it.
LEVELS: dict[str, Level] = {
    "mini": Level(Sizes(players=(1, 1)), most=4, fewest=2, clues=5),
    "2x2": Level(Sizes(players=(1, 1), times=1), most=4, fewest=2, compound=False),
    "easy": Level(Sizes(players=(1, 2))),
    "medium": Level(Sizes(players=(3, 4))),
    "hard": Level(Sizes(players=(5, 6))),
    "published": Level(Sizes()),
}


@dataclass(frozen=True)
class Question:
    """`answer` is a name as the puzzle prints it; `fact` is the truth that it asks for."""

    text: str
    answer: str
    fact: Fact


@dataclass(frozen=True)
class Puzzle:
    """`clues` hold in `world` and in no other night of the same names, grid and motive counts; of
    no smaller set of them is that true. Both in the order of print."""

    seed: int
    level: str
    world: World
    clues: tuple[Fact, ...]
    questions: tuple[Question, ...]


def generate(seed: int, level: str = "published") -> Puzzle:
    """The puzzle of a seed and a level, the same on every machine and at any load.

    The clues are those that deletion keeps, tried by bias + U(0, 1). Asked is what the clues do not
    say: of the solution (who, with what, where, when, why), then of other places and motives drawn
    at random, up to 8 questions. ValueError for a seed that is not an integer and unknown levels.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed={seed!r}: expected an integer")
    if level not in LEVELS:
        raise ValueError(f"level={level!r}: expected one of {', '.join(LEVELS)}")
    of = LEVELS[level]
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"temporal clue {level} {seed} {attempt}")
        world = draw_world(rng, of.sizes)
        rank = {fact: bias + rng.random() for fact, bias in candidates(rng, world)}
        if not LEVELS[level].compound:
            rank = {fact: value for fact, value in rank.items() if fact[0] not in ("xor", "iff")}
        try:
            clues = minimise(world, sorted(rank, key=rank.__getitem__))
        except Undecided:
            continue
        if of.clues is not None and len(clues) > of.clues:
            continue
        questions = ask(rng, world, clues, of.most)
        if len(questions) >= of.fewest:
            rng.shuffle(clues)
            return Puzzle(seed, level, world, tuple(clues), tuple(questions))
    raise ValueError(f"seed={seed}, level={level!r}: no puzzle in {ATTEMPTS} attempts")


def ask(rng: random.Random, world: World, clues: list[Fact], most: int) -> list[Question]:
    """Questions about the solution that no clue gives away, then of as many places and motives
    drawn as there is room for up to `most` those that can be asked and are no clue."""
    given = set(clues)
    asked = [question(fact, world) for fact in solution(world) if fact not in given][:most]
    others = [fact for fact, _ in places(world)] + motives(world)
    rng.shuffle(others)
    for fact in others[: most - len(asked)]:
        if fact not in given and _can_be_asked(fact, world):
            asked.append(question(fact, world, by_motive=rng.random() < 0.5))
    return asked


def _can_be_asked(fact: Fact, world: World) -> bool:
    """Where a named piece was, or the only suspect of a motive; a suspect's motive."""
    kind = fact[0]
    if kind == "at":
        return fact[1] != world.victim
    return kind == "motive" or (kind == "motive_at" and world.motive_count(fact[1]) == 1)


def question(fact: Fact, world: World, *, by_motive: bool = False) -> Question:
    """The question that a true fact answers. by_motive: ask for the suspect of a motive that only
    one has, not for the motive of a suspect.

    ValueError for a kind that nothing is asked about.
    """
    kind, *args = fact
    if kind == "murderer":
        return Question(f"Who murdered {names.VICTIM}?", world.suspects[args[0]], fact)
    if kind == "murder_weapon":
        text = f"Which weapon was {names.VICTIM} murdered with?"
        return Question(text, world.weapons[args[0]], fact)
    if kind == "murder_room":
        return Question(f"In which room was {names.VICTIM} murdered?", world.rooms[args[0]], fact)
    if kind == "murder_time":
        return Question(f"At what time was {names.VICTIM} murdered?", world.times[args[0]], fact)
    if kind == "murder_motive":
        return Question("What motivated the murderer?", world.motives[args[0]], fact)
    if kind == "motive":
        suspect, motive = world.suspects[args[0]], world.motives[args[1]]
        if by_motive and world.motive_count(args[1]) == 1:
            return Question(f"Who was motivated by {motive}?", suspect, fact)
        return Question(f"What motivated {suspect}?", motive, fact)
    if kind in ("at", "motive_at"):
        holder = facts.piece_name if kind == "at" else facts.motive_holder
        text = f"In which room was {holder(args[0], world)}{facts.when(args[1], world)}?"
        return Question(text, world.rooms[args[2]], fact)
    raise ValueError(f"fact={fact}: nothing is asked about {kind!r}")
