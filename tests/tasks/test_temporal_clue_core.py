"""Temporal Clue's worlds, facts, model, minimisation and questions, against enumeration."""

import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.tasks.temporal_clue import names
from pyrl.tasks.temporal_clue.clues import candidates, motives, places, solution
from pyrl.tasks.temporal_clue.facts import SORTS, holds, text
from pyrl.tasks.temporal_clue.generate import LEVELS, generate, question
from pyrl.tasks.temporal_clue.minimise import minimise
from pyrl.tasks.temporal_clue.model import PARAMETERS, Nights, Undecided
from pyrl.tasks.temporal_clue.world import Sizes, World, beside, draw_world, neighbours


def night(players: int, seed: int, **sizes) -> World:
    return draw_world(random.Random(seed), Sizes(players=(players, players), **sizes))


def obeys(w: World) -> bool:
    """The rules, said anew: who may have been where, and the murder."""
    suspects = range(len(w.suspects))
    for piece, path in enumerate(w.paths):
        for time in range(1, len(w.times)):
            before, now = path[time - 1], path[time]
            (y, x), (v, u) = divmod(before, w.columns), divmod(now, w.columns)
            if abs(y - v) + abs(x - u) > 1:
                return False
            is_weapon = len(suspects) <= piece < w.victim
            steps = [(w.paths[s][time - 1], w.paths[s][time]) for s in suspects]
            if is_weapon and before != now and (before, now) not in steps:
                return False
    scene = [p for p, path in enumerate(w.paths) if path[w.time] == w.room]
    stays = all(room == w.room for room in w.paths[w.victim][w.time :])
    alone = [p for p in scene if p in suspects] == [w.murderer]
    return alone and stays and len(suspects) + w.weapon in scene


def everything(world: World) -> list:
    """Facts that leave nothing open."""
    return [*solution(world), *(fact for fact, _ in places(world)), *motives(world)]


def random_fact(rng: random.Random, world: World, kind: str) -> tuple:
    sizes = {
        "piece": len(world.paths),
        "suspect": len(world.suspects),
        "weapon": len(world.weapons),
        "room": len(world.rooms),
        "time": len(world.times),
        "motive": len(world.motives),
    }
    return (
        kind,
        *(
            random_fact(
                rng, world, rng.choice(("at", "murderer_at", "murder_weapon_at", "motive_at"))
            )
            if sort == "fact"
            else rng.randrange(sizes[sort])
            for sort in SORTS[kind]
        ),
    )


# Worlds.


def test_names_are_enough_and_all_different():
    pools = (names.SUSPECTS, names.WEAPONS, names.ROOMS, names.MOTIVES, (names.VICTIM,))
    assert [len(pool) >= n for pool, n in zip(pools, (10, 8, 17, 10, 1), strict=True)] == [True] * 5
    assert max(Counter(itertools.chain(*pools)).values()) == 1


def test_the_grid_is_filled_row_by_row():
    # 0 1 2
    # 3 4
    assert [neighbours(room, 5, 3) for room in range(5)] == [
        (3, 1),
        (4, 0, 2),
        (1,),
        (0, 4),
        (1, 3),
    ]
    assert beside(4, "east", 5, 3) is None and beside(2, "south", 5, 3) is None
    assert beside(3, "north", 5, 3) == 0 and beside(3, "east", 5, 3) == 4


@pytest.mark.parametrize("players", range(1, 7))
def test_worlds_obey_the_rules_and_sizes(players):
    p = players
    for seed in range(60):
        w = night(p, seed)
        S, W, R, T = map(len, (w.suspects, w.weapons, w.rooms, w.times))
        assert obeys(w), w
        most = min(int(2.5 * p), 10)
        assert 2 <= W <= max(2, min(p + 5, int(2.125 * p), 8))
        assert min(W, most) <= S <= min(2 * W - 1, most)
        assert min(S, 3 * p) <= R <= min(2 * S - 2, 3 * p, 17)
        assert 1 <= T <= 2 * p and len(set(w.times)) == T and "12:00 AM" in w.times
        assert 1 <= w.columns <= 5
        assert len(w.paths) == S + W + 1 and all(len(path) == T for path in w.paths)
        assert all(0 <= room < R for path in w.paths for room in path)
        assert len(w.motives) != 1 and set(w.suspect_motives) == set(range(len(w.motives)))
        assert len(w.suspect_motives) == (S if w.motives else 0)
        assert len({*w.suspects, *w.weapons, *w.rooms, *w.motives}) == S + W + R + len(w.motives)


def test_all_sizes_of_the_distribution_occur():
    rng = random.Random(0)
    worlds = [draw_world(rng) for _ in range(600)]
    assert {len(w.suspects) for w in worlds} == set(range(2, 11))
    assert {len(w.weapons) for w in worlds} == set(range(2, 9))
    assert {len(w.rooms) for w in worlds} >= set(range(2, 17))
    assert {len(w.times) for w in worlds} == set(range(1, 13))
    assert {w.columns for w in worlds} == {1, 2, 3, 4, 5}
    # Unique motives: half of the worlds, and the few of the others where nobody shares by chance.
    assert 0.45 < sum(bool(w.motives) and w.unique_motives for w in worlds) / 600 < 0.62


def test_walkers_and_weapons_move_as_often_as_they_should():
    rng = random.Random(1)
    moved = stayed = 0
    for _ in range(400):
        w = draw_world(rng, Sizes(players=(4, 6)))
        for path in w.paths[: len(w.suspects)]:
            changes = sum(a != b for a, b in itertools.pairwise(path))
            moved, stayed = moved + changes, stayed + len(path) - 1 - changes
    # 20,000 draws: the standard deviation is below 0.004, but the choice of a murder favours some.
    assert abs(moved / (moved + stayed) - 0.5) < 0.02
    still = [draw_world(rng, Sizes(players=(3, 3), move=0.0)) for _ in range(20)]
    assert all(len(set(path)) == 1 for w in still for path in w.paths)
    left = [draw_world(rng, Sizes(players=(3, 3), carry=0.0)) for _ in range(20)]
    assert all(len(set(path)) == 1 for w in left for path in w.paths[len(w.suspects) : w.victim])


@pytest.mark.parametrize("players", [(0, 3), (4, 3)])
def test_bad_sizes(players):
    with pytest.raises(ValueError, match="players="):
        draw_world(random.Random(0), Sizes(players=players))


# Facts and the model.


def test_every_candidate_holds_has_its_sorts_and_reads_well():
    seen = Counter()
    for seed in range(40):
        w = night(1 + seed % 6, seed)
        for fact, bias in candidates(random.Random(seed), w):
            seen[fact[0]] += 1
            assert holds(fact, w) and -0.2 <= bias <= 2.3
            assert len(fact) == len(SORTS[fact[0]]) + 1
            sentence = text(fact, w)
            assert sentence.endswith(".") and sentence[0].isupper() and "  " not in sentence
    assert set(seen) == set(SORTS)


def test_facts_are_as_hashable_and_different_as_their_texts():
    w = night(4, 3)
    facts = [fact for fact, _ in candidates(random.Random(0), w)]
    unique = {fact for fact in facts if not fact[0].startswith("motive_") or w.unique_motives}
    assert len({text(fact, w) for fact in unique}) == len(unique) == len(set(unique))


@pytest.mark.parametrize("kind", SORTS)
def test_clauses_of_a_kind_hold_exactly_if_the_fact_does(kind):
    rng = random.Random(kind)
    outcomes = Counter()
    for seed in itertools.count():
        w = night(1 + seed % 3, seed, unique=seed % 2)
        if not w.motives or len(w.times) < 2:
            continue
        nights = Nights(w)
        wishes = [random_fact(rng, w, "at") for _ in range(30)]
        one = nights.other([], wishes)
        assert obeys(one) and one != w
        for _ in range(12):
            fact = random_fact(rng, w, kind)
            # Of this one night the model must say what `holds` says.
            same = nights.other([*everything(one), fact])
            assert (same == one) if holds(fact, one) else (same is None), (fact, one)
            outcomes[holds(fact, one)] += 1
            found = nights.other([fact], wishes)
            assert found is None or (holds(fact, found) and obeys(found))
        if (seed > 12 and min(outcomes[True], outcomes[False])) or seed > 60:
            break
    assert outcomes[True] and outcomes[False]


def others(w: World):
    """Every night that obeys the rules with w's names, grid and motive counts, without the model:
    all paths, all ways to deal out the motives, all murders."""
    path = list(itertools.product(range(len(w.rooms)), repeat=len(w.times)))
    dealt = sorted(set(itertools.permutations(w.suspect_motives)))
    for paths in itertools.product(path, repeat=len(w.paths)):
        murders = itertools.product(
            range(len(w.suspects)), range(len(w.weapons)), range(len(w.rooms)), range(len(w.times))
        )
        for who, arm, room, time in murders:
            if paths[who][time] != room or paths[w.victim][time] != room:
                continue  # only to be quick; `obeys` says so too
            one = replace(w, paths=paths, murderer=who, weapon=arm, room=room, time=time)
            if obeys(one):
                yield from (replace(one, suspect_motives=deal) for deal in dealt)


@pytest.mark.parametrize("seed", range(6))
def test_enumeration_agrees_that_clues_determine_the_night_and_none_can_be_spared(seed):
    puzzle = generate(seed, "mini")
    w = puzzle.world
    broken = [
        frozenset(i for i, clue in enumerate(puzzle.clues) if not holds(clue, one))
        for one in others(w)
    ]
    assert broken.count(frozenset()) == 1  # the true one alone
    for i in range(len(puzzle.clues)):
        assert frozenset({i}) in broken, f"clue {i} can be spared"


def test_the_nights_of_the_model_are_those_of_the_enumeration():
    w = next(w for w in (night(1, seed) for seed in range(99)) if len(w.times) == 1 and w.motives)
    nights, listed = Nights(w), list(others(w))
    assert w in listed and len(set(listed)) == len(listed)
    for one in listed:
        assert nights.other(everything(one)) == (None if one == w else one)
    rng = random.Random(0)
    for _ in range(40):
        assert nights.other([], [random_fact(rng, w, "at") for _ in range(9)]) in listed


# Minimisation.


@pytest.mark.parametrize("seed", range(8))
def test_the_clues_are_those_of_plain_deletion(seed):
    rng = random.Random(seed)
    w = night(1 + seed % 2, seed)
    order = [fact for fact, _ in candidates(rng, w)]
    rng.shuffle(order)
    nights, kept = Nights(w), list(order)
    for clue in order:
        rest = [fact for fact in kept if fact != clue]
        if nights.other(rest) is None:
            kept = rest
    assert minimise(w, order) == kept


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10**6), st.sampled_from(["easy", "medium"]))
def test_no_clue_can_be_spared(seed, level):
    puzzle = generate(seed, level)
    if len(puzzle.clues) > 25:
        return
    nights = Nights(puzzle.world)
    assert nights.other(puzzle.clues) is None
    for i, clue in enumerate(puzzle.clues):
        rest = puzzle.clues[:i] + puzzle.clues[i + 1 :]
        second = nights.other(rest)
        assert second is not None and obeys(second) and not holds(clue, second)
        assert all(holds(fact, second) for fact in rest)


def test_too_few_or_false_clues_are_refused():
    w = night(2, 5)
    with pytest.raises(ValueError, match="the 1 clues do not determine"):
        minimise(w, [("murderer", w.murderer)])
    wrong = ("murderer", (w.murderer + 1) % len(w.suspects))
    with pytest.raises(ValueError, match=r"clue 1 = .*: false in the world"):
        minimise(w, [("murderer", w.murderer), wrong])


def test_a_search_beyond_its_limit_is_said(monkeypatch):
    monkeypatch.setitem(PARAMETERS, "max_deterministic_time", 0.0)
    with pytest.raises(Undecided):
        Nights(night(5, 1)).other([])


# Puzzles.


@pytest.mark.parametrize("level", LEVELS)
def test_a_puzzle_is_a_function_of_seed_and_level(level):
    seed = next(s for s in range(50) if len(draw(s, level).paths) < 12)
    once = generate(seed, level)
    assert once == generate(seed, level) and once.world != draw(seed + 1, level)
    assert (once.seed, once.level) == (seed, level)
    low, high = LEVELS[level].sizes.players
    assert 1 <= low <= high <= 6


def test_a_puzzle_does_not_depend_on_the_process():
    code = "from pyrl.tasks.temporal_clue.generate import generate; print(generate(3, 'medium'))"
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == str(generate(3, "medium"))


def draw(seed: int, level: str) -> World:
    rng = random.Random(f"temporal clue {level} {seed} 0")
    return draw_world(rng, LEVELS[level].sizes)


def test_mini_puzzles_are_small():
    for seed in range(30):
        puzzle = generate(seed, "mini")
        w = puzzle.world
        assert (len(w.suspects), len(w.weapons), len(w.rooms)) == (2, 2, 2)
        assert len(w.times) <= 2 and len(w.motives) in (0, 2)
        assert 2 <= len(puzzle.questions) <= 4 and 1 <= len(puzzle.clues) <= 5


@pytest.mark.parametrize("seed", range(12))
def test_questions_have_true_printed_answers_that_no_clue_says(seed):
    puzzle = generate(seed, ("easy", "medium")[seed % 2])
    w = puzzle.world
    assert 1 <= len(puzzle.questions) <= 8
    assert len({q.text for q in puzzle.questions}) == len(puzzle.questions)
    printed = {*w.suspects, *w.weapons, *w.rooms, *w.times, *w.motives}
    for asked in puzzle.questions:
        assert holds(asked.fact, w) and asked.fact not in puzzle.clues
        assert asked.answer in printed and asked.text.endswith("?")
        assert asked.answer not in asked.text
    left = [fact for fact in solution(w) if fact not in puzzle.clues]
    assert [q.fact for q in puzzle.questions][: len(left)] == left


def test_questions_of_each_kind():
    w = replace(night(3, 0), suspect_motives=(0, 1), motives=("Debt", "Spite"))
    suspect = w.suspects[1]
    assert question(("motive", 1, 1), w).answer == "Spite"
    assert question(("motive", 1, 1), w, by_motive=True).answer == suspect
    assert question(("murder_time", w.time), w).answer == w.times[w.time]
    with pytest.raises(ValueError, match="nothing is asked about 'xor'"):
        question(("xor", ("murderer", 0), ("murderer", 1)), w)


@pytest.mark.parametrize(
    ("seed", "level"), [(0, "huge"), ("0", "mini"), (1.0, "mini"), (True, "mini")]
)
def test_bad_seeds_and_levels(seed, level):
    with pytest.raises(ValueError, match=r"^(level='huge'|seed=)"):
        generate(seed, level)
