"""Puzzles in few words, and the class of the smallest."""

import pickle
import random

import pytest

from pyrl.tasks import get_task
from pyrl.tasks.temporal_clue.compact import render_compact
from pyrl.tasks.temporal_clue.facts import text
from pyrl.tasks.temporal_clue.generate import generate
from pyrl.tasks.temporal_clue.prompt import answers
from pyrl.tasks.temporal_clue.sheet import perfect_sheet
from pyrl.tasks.temporal_clue.world import Sizes, draw_world


@pytest.mark.parametrize("level", ["2x2", "mini"])
def test_everything_that_differs_between_puzzles_is_said(level):
    for puzzle in (generate(seed, level) for seed in range(6)):
        shown, world = render_compact(puzzle), puzzle.world
        lines = shown.splitlines()
        for name in (*world.suspects, *world.weapons, *world.rooms, *world.motives, *world.times):
            assert name in shown
        assert [line for line in lines if line in {text(c, world) for c in puzzle.clues}] == [
            text(clue, world) for clue in puzzle.clues
        ]
        for i, question in enumerate(puzzle.questions):
            assert f"{chr(65 + i)}. {question.text}" in lines
        assert shown.endswith("Answers:\n") and 30 < len(shown.split()) < 170


def test_the_plan_and_shared_motives_are_told():
    sizes = Sizes(players=(3, 3), unique=0.0)
    rng = random.Random(0)
    world = next(
        w
        for w in (draw_world(rng, sizes) for _ in range(99))
        if not w.unique_motives and w.columns == 2 and len(w.rooms) == 5
    )
    puzzle = generate(0, "2x2")
    lines = render_compact(type(puzzle)(0, "toy", world, (), puzzle.questions)).splitlines()
    a, b, c, d, e = world.rooms
    assert f"Rooms: {a} | {b} / {c} | {d} / {e}" in lines
    (motives,) = (line for line in lines if line.startswith("Motives: "))
    for i, name in enumerate(world.motives):
        count = world.motive_count(i)
        assert (f"{name} ({count})" in motives) == (count > 1) and name in motives


def test_the_smallest_class():
    for puzzle in (generate(seed, "2x2") for seed in range(10)):
        world = puzzle.world
        sizes = [len(x) for x in (world.suspects, world.weapons, world.rooms, world.times)]
        assert sizes == [2, 2, 2, 1] and len(world.motives) in (0, 2)
        assert 2 <= len(puzzle.questions) <= 4
    with pytest.raises(ValueError, match="times=0"):
        draw_world(random.Random(0), Sizes(times=0))


def test_the_task_shows_either_style():
    full, compact = (
        get_task("temporal_clue", level="2x2", train=2, heldout=2, style=style)
        for style in ("full", "compact")
    )
    for split in ("train", "heldout"):
        for chat, bare in zip(full.prompts(split), compact.prompts(split), strict=True):
            assert (chat.id, chat.data) == (bare.id, bare.data)
            assert isinstance(bare.messages, str) and chat.messages[-1]["role"] == "user"
            assert len(bare.text.split()) < len(chat.text.split()) / 2
            sheet = perfect_sheet(bare.data["answers"])
            assert compact.score(bare, sheet) == 1 and compact.score(bare, bare.text) == 0
            puzzle = generate(int(bare.id.rpartition("-")[2]), "2x2")
            assert render_compact(puzzle) == bare.text and answers(puzzle) == bare.data["answers"]
    copy = pickle.loads(pickle.dumps(compact))
    assert copy.score(bare, sheet) == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"style": "short"}, "style='short': expected one of full, compact"),
        ({"style": "compact", "system": "Think."}, "system='Think.'"),
    ],
)
def test_bad_styles_are_named(options, problem):
    with pytest.raises(ValueError, match=problem):
        get_task("temporal_clue", **options)
