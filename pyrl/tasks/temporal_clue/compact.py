"""A puzzle in as few words as it takes, for models that are made for such puzzles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyrl.tasks.temporal_clue.prompt import LETTERS

if TYPE_CHECKING:
    from pyrl.tasks.temporal_clue.generate import Puzzle
    from pyrl.tasks.temporal_clue.world import World


def render_compact(puzzle: Puzzle) -> str:
    """Names, plan, clues and lettered questions; of the smallest puzzles about 70 to 130 words.

    The clues and questions are those of `prompt.render`, word for word. The story and the rules are
    left out: they are the same for every puzzle, and a model learns them from rewards.
    """
    from pyrl.tasks.temporal_clue.facts import text

    world = puzzle.world
    lines = [
        f"Suspects: {', '.join(world.suspects)}",
        f"Weapons: {', '.join(world.weapons)}",
        *([f"Motives: {_motives(world)}"] if world.motives else []),
        f"Rooms: {_plan(world)}",
        f"Times: {', '.join(world.times)}",
        "Clues:",
        *(text(clue, world) for clue in puzzle.clues),
        "Questions:",
        *(f"{LETTERS[i]}. {question.text}" for i, question in enumerate(puzzle.questions)),
        "Answers:\n",
    ]
    return "\n".join(lines)


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
