"""Puzzles in few words, and the class of the smallest."""

import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.tasks import get_task
from pyrl.tasks.temporal_clue import names
from pyrl.tasks.temporal_clue.canonical import key
from pyrl.tasks.temporal_clue.compact import renamed, render_compact, shorthand
from pyrl.tasks.temporal_clue.facts import SORTS
from pyrl.tasks.temporal_clue.generate import generate, question
from pyrl.tasks.temporal_clue.prompt import answers
from pyrl.tasks.temporal_clue.sheet import perfect_sheet
from pyrl.tasks.temporal_clue.world import Sizes, draw_world


@pytest.mark.parametrize("level", ["2x2", "mini", "easy"])
def test_everything_that_differs_between_puzzles_is_said(level):
    for puzzle in (generate(seed, level) for seed in range(6)):
        shown, world = render_compact(puzzle), puzzle.world
        for name in (*world.suspects, *world.weapons, *world.rooms, *world.motives, *world.times):
            assert name in shown
        lines = shown.splitlines()
        clues = lines[lines.index("Clues:") + 1 : lines.index("Questions:")]
        assert clues == [shorthand(clue, world) for clue in puzzle.clues]
        asked = lines[lines.index("Questions:") + 1 : -1]
        assert [line[:3] for line in asked] == [f"{chr(65 + i)}. " for i in range(len(asked))]
        assert len({line[3:] for line in asked}) == len(puzzle.questions)
        assert all("?" in line for line in asked) and shown.endswith("\nAnswers:\n")
        for line, told in zip(asked, puzzle.questions, strict=True):
            assert told.answer not in line
            assert line[3:].replace("?", told.answer) == shorthand(told.fact, world)


def samples(sort, world):
    """Every argument of the sort."""
    if sort == "piece":
        return range(world.victim + 1)
    return range(len(getattr(world, f"{sort}s")))


def test_shorthand_tells_all_facts_apart():
    rng = random.Random(0)
    worlds = (draw_world(rng, Sizes(players=(3, 4))) for _ in range(99))
    world = next(w for w in worlds if w.motives and len(w.times) > 1)
    said = {}
    for kind, sorts in SORTS.items():
        if "fact" in sorts:
            continue
        first = [sample[0] for sample in (samples(sort, world) for sort in sorts)]
        for position, sort in enumerate(sorts):
            for value in samples(sort, world):
                fact = (kind, *first[:position], value, *first[position + 1 :])
                assert said.setdefault(shorthand(fact, world), fact) == fact
    one, other = ("murderer", 0), ("murder_room", 1)
    assert shorthand(("xor", one, other), world) == (
        f"either murderer is {world.suspects[0]} or murder in {world.rooms[1]}"
    )
    assert shorthand(("iff", one, other), world).count(" iff ") == 1


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
    assert f"{a} | {b} / {c} | {d} / {e}" in lines
    motives = lines[2]
    for i, name in enumerate(world.motives):
        count = world.motive_count(i)
        assert (f"{name} ({count})" in motives) == (count > 1) and name in motives


@given(st.integers(0, 10**6), st.sampled_from(["2x2", "mini", "easy"]))
@settings(deadline=None, max_examples=15)
def test_renaming_changes_names_only(seed, level):
    puzzle = generate(seed, level)
    same = renamed(puzzle)
    assert renamed(same) == same and key(same) == key(puzzle)
    assert same.world.suspects == names.SUSPECTS[: len(puzzle.world.suspects)]
    for before, after in zip(puzzle.questions, same.questions, strict=True):
        by_motive = before.text.startswith("Who was motivated by")
        assert question(before.fact, puzzle.world, by_motive=by_motive) == before
        assert question(before.fact, same.world, by_motive=by_motive) == after


def test_the_smallest_class():
    for puzzle in (generate(seed, "2x2") for seed in range(10)):
        world = puzzle.world
        sizes = [len(x) for x in (world.suspects, world.weapons, world.rooms, world.times)]
        assert sizes == [2, 2, 2, 1] and len(world.motives) in (0, 2)
        assert 2 <= len(puzzle.questions) <= 4
        assert not {"xor", "iff"} & {clue[0] for clue in puzzle.clues}
    with pytest.raises(ValueError, match="times=0"):
        draw_world(random.Random(0), Sizes(times=0))


def test_the_task_shows_either_style():
    full, compact = (
        get_task("temporal_clue", level="2x2", train=2, heldout=2, style=style)
        for style in ("full", "compact")
    )
    for split in ("train", "heldout"):
        for chat, bare in zip(full.prompts(split), compact.prompts(split), strict=True):
            assert (chat.id, chat.data["key"]) == (bare.id, bare.data["key"])
            assert isinstance(bare.messages, str) and chat.messages[-1]["role"] == "user"
            assert len(bare.text.split()) < len(chat.text.split()) / 2
            sheet = perfect_sheet(bare.data["answers"])
            assert compact.score(bare, sheet) == 1 and compact.score(bare, bare.text) == 0
            puzzle = renamed(generate(int(bare.id.rpartition("-")[2]), "2x2"))
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
