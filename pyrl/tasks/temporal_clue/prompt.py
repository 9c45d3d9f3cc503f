"""A puzzle as the text that a solver reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyrl.tasks.temporal_clue.generate import Puzzle
    from pyrl.tasks.temporal_clue.world import World

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def answers(puzzle: Puzzle) -> dict[str, str]:
    """letter → right answer."""
    return {LETTERS[i]: question.answer for i, question in enumerate(puzzle.questions)}


def render(puzzle: Puzzle) -> str:
    """The story, the people and things, the house, the times, the rules exactly as the solution
    keeps them, the clues, the lettered questions and the form of the answer."""
    from pyrl.tasks.temporal_clue.facts import text

    world = puzzle.world
    victim = world.piece(world.victim)
    clues = [f"- {text(clue, world)}" for clue in puzzle.clues]
    questions = [f"{LETTERS[i]}. {q.text}" for i, q in enumerate(puzzle.questions)]
    sections = [
        f"{victim} was found dead this morning, in his own country house. One of the guests of "
        "last night's party killed him. Find out what happened.",
        _listed("The suspects:", world.suspects),
        _listed("The weapons, one of which was used:", world.weapons),
        *_motives(world),
        _house(world),
        _times(world),
        "What is certain:\n" + "\n".join(f"- {rule}" for rule in rules(world)),
        "The clues, all of them true:\n" + "\n".join(clues),
        "The questions:\n" + "\n".join(questions),
        "There is exactly one solution. End with the answers, one per line: the letter, a full "
        "stop and the answer alone, spelled as above.\n"
        + "\n".join(f"{LETTERS[i]}. answer" for i in range(len(questions))),
    ]
    return "\n\n".join(sections)


def rules(world: World) -> list[str]:
    """What the solver may rely on beyond the clues, one sentence or two each."""
    victim = world.piece(world.victim)
    several = len(world.times) > 1
    if not several:
        return [
            f"At that time every suspect, every weapon and {victim} was in exactly one room.",
            f"The murderer was the only suspect in the room of the murder. {victim} and the murder "
            "weapon were there too.",
        ]
    first, second = world.times[:2]
    return [
        f"At each of these times every suspect, every weapon and {victim} was in exactly one room.",
        f"From one time to the next, each suspect and {victim} stayed in the same room or went to "
        "the next one north, south, east or west.",
        "A weapon changed rooms only together with a suspect who made the same move. To have "
        "carried it means to have made that move with it.",
        f'"Moved at {second}" means: was in the first room at {first} and in the second at '
        f"{second}.",
        "The murderer was the only suspect in the room of the murder at the time of the murder. "
        f"{victim} and the murder weapon were there too.",
        f"From the time of the murder on, {victim} stayed in that room.",
    ]


def _listed(title: str, items: tuple[str, ...]) -> str:
    return "\n".join([title, *(f"- {item}" for item in items)])


def _motives(world: World) -> list[str]:
    if not world.motives:
        return []
    counts = [world.motive_count(m) for m in range(len(world.motives))]
    if all(count == 1 for count in counts):
        return [_listed("The motives, each of exactly one suspect:", world.motives)]
    return [
        _listed(
            "The motives; every suspect had exactly one:",
            tuple(
                f"{name} ({count} suspect{'s' if count > 1 else ''})"
                for name, count in zip(world.motives, counts, strict=True)
            ),
        )
    ]


def _house(world: World) -> str:
    rows = [
        world.rooms[start : start + world.columns]
        for start in range(0, len(world.rooms), world.columns)
    ]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(world.columns)]
    lines = [
        "| "
        + " | ".join(name.ljust(width) for name, width in zip(row, widths, strict=False))
        + " |"
        for row in rows
    ]
    head = (
        f"The house has {len(world.rooms)} rooms on one floor. In this plan north is up and west "
        "is left, and rooms that share a side are connected:"
    )
    return "\n".join([head, *lines])


def _times(world: World) -> str:
    if len(world.times) == 1:
        return f"The murder was committed at {world.times[0]}."
    return "The murder was committed at one of these times, listed in order:\n" + "\n".join(
        f"- {time}" for time in world.times
    )
