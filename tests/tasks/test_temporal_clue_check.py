"""Canonical keys, and the second model against every night one by one."""

import dataclasses
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.tasks.registry import load_file
from pyrl.tasks.temporal_clue.canonical import key
from pyrl.tasks.temporal_clue.facts import SORTS, holds
from pyrl.tasks.temporal_clue.generate import generate
from pyrl.tasks.temporal_clue.verify import Night, verify
from pyrl.tasks.temporal_clue.world import draw_world

puzzles = load_file(str(Path(__file__).with_name("clue_puzzles.py")))
nights, renamed, toy = puzzles.nights, puzzles.renamed, puzzles.toy


@given(seed=st.integers(0, 10**6), renaming=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_a_renamed_puzzle_has_the_same_key(seed, renaming):
    puzzle = toy(seed, players=(1, 5), clues=20)
    rng = random.Random(renaming)
    full = len(puzzle.world.rooms) % puzzle.world.columns == 0
    mirror = rng.choice([None, "rows", "columns", "diagonal"]) if full else None
    assert key(renamed(puzzle, rng, mirror)) == key(puzzle)


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_another_puzzle_has_another_key(seed):
    puzzle = toy(seed, players=(2, 4), clues=12)
    fewer = dataclasses.replace(puzzle, clues=puzzle.clues[1:])
    assert key(fewer) != key(puzzle)
    assert key(toy(seed + 1, players=(2, 4), clues=12)) != key(puzzle)


def test_a_swap_of_rooms_that_the_plan_does_not_allow_changes_the_key():
    changed = 0
    for seed in range(20):
        puzzle = toy(seed, players=(3, 4), clues=15)
        rooms = len(puzzle.world.rooms)
        swap = {0: 1, 1: 0} | {r: r for r in range(2, rooms)}

        def swapped(fact, swap=swap):
            arguments = zip(SORTS[fact[0]], fact[1:], strict=True)
            return (fact[0], *(
                swapped(a) if sort == "fact" else swap[a] if sort == "room" else a
                for sort, a in arguments
            ))  # fmt: skip

        other = dataclasses.replace(puzzle, clues=tuple(swapped(c) for c in puzzle.clues))
        changed += key(other) != key(puzzle)
    assert changed >= 18  # the two rooms may be alike


def test_keys_of_different_puzzles_differ():
    assert len({key(toy(seed, players=(2, 6), clues=15)) for seed in range(200)}) == 200


def any_fact(rng, world, kinds):
    sizes = {
        "piece": len(world.paths), "suspect": len(world.suspects), "weapon": len(world.weapons),
        "room": len(world.rooms), "time": len(world.times), "motive": len(world.motives),
    }  # fmt: skip
    while True:
        kind = rng.choice(kinds)
        if all(sort == "fact" or sizes[sort] for sort in SORTS[kind]):
            break
    simple = [k for k in SORTS if "fact" not in SORTS[k]]
    return (kind, *(
        any_fact(rng, world, simple) if sort == "fact" else rng.randrange(sizes[sort])
        for sort in SORTS[kind]
    ))  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_every_kind_of_fact_means_what_it_says(seed):
    """The literal of any fact, true or false, against its truth in the world."""
    rng = random.Random(seed)
    world = draw_world(rng)
    night = Night(world)
    facts = [any_fact(rng, world, [kind]) for kind in SORTS for _ in range(4) if world.motives
             or "motive" not in str(SORTS[kind])]  # fmt: skip
    literals = [night.truth(f) if holds(f, world) else ~night.truth(f) for f in facts]
    assert night.possible([night.is_the_solution(), *literals], 60)


@pytest.mark.parametrize("seed", range(12))
def test_the_verdict_agrees_with_every_night_one_by_one(seed):
    puzzle = toy(seed, clues=3 + seed % 6)
    every = list(nights(puzzle.world))
    assert every.count(puzzle.world) == 1 and len(set(every)) == len(every)
    verdict = verify(puzzle)
    assert verdict.true

    def others(clues):
        return [n for n in every if n != puzzle.world and all(holds(c, n) for c in clues)]

    assert verdict.unique == (not others(puzzle.clues))
    # A clue excludes a night that the others do not; where there is one solution that is the same
    # as having a second one without it.
    for i, needed in enumerate(verdict.needed):
        rest = puzzle.clues[:i] + puzzle.clues[i + 1 :]
        assert needed == any(not holds(puzzle.clues[i], n) for n in others(rest))


@pytest.mark.parametrize("seed", range(4))
def test_a_generated_puzzle_passes_and_a_changed_one_does_not(seed):
    puzzle = generate(seed, "mini")
    verdict = verify(puzzle)
    assert verdict.true and verdict.unique and verdict.irredundant
    assert len(verdict.needed) == len(puzzle.clues)
    fewer = dataclasses.replace(puzzle, clues=puzzle.clues[1:])
    assert not verify(fewer).unique
    twice = verify(dataclasses.replace(puzzle, clues=(*puzzle.clues, puzzle.clues[0])))
    assert twice.unique and not twice.irredundant and twice.needed[1:-1] == verdict.needed[1:]
    false = ("xor", puzzle.clues[0], puzzle.clues[0])
    assert not verify(dataclasses.replace(puzzle, clues=(*puzzle.clues, false))).true


def test_an_unknown_kind_is_named():
    puzzle = dataclasses.replace(toy(0), clues=(("smelled", 0, 0),))
    with pytest.raises(ValueError, match="unknown kind 'smelled'"):
        verify(puzzle)
    with pytest.raises(ValueError, match="unknown kind 'smelled'"):
        key(puzzle)
