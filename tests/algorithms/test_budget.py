"""Budgets with pilots that are made up: shards, counts, weights, groups, resuming."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyrl.algorithms import GVM, Draw, Online, PilotResult, Uniform, accepted_weights
from pyrl.algorithms.allocate import allocate_budget
from pyrl.algorithms.draws import Share, cut_into_steps


class Data:
    """A stream of places, and a pilot that answers from a table of (p, G) by position."""

    def __init__(self, truth=None, size=10**6):
        self.truth, self.position, self.size = truth, 0, size
        self.pilots = []

    def take(self, count):
        first, self.position = self.position, self.position + count
        return [("sums", first + i) for i in range(count)]

    def result(self, place, count):
        p, g = self.truth[place[1] % len(self.truth)]
        accepted = round(p * count)
        return PilotResult(accepted, count, g if accepted else 0.0)

    def pilot(self, places, count):
        self.pilots.append((len(places), count))
        return [self.result(place, count) for place in places]

    def steps(self, budget, count, first=1):
        return [budget.plan(first + i, self.take, self.pilot) for i in range(count)]


TRUTH = [(0.0, 1.0), (0.125, 2.0), (0.5, 1.0), (1.0, 0.5), (0.25, 3.0), (0.875, 1.0), (0.0, 9.0)]


def by_place(draws):
    found = {}
    for draw in draws:
        found[draw.place] = found.get(draw.place, 0) + draw.count
    return found


def test_uniform_takes_the_next_prompts():
    data, budget = Data(), Uniform(3, 4)
    first, second = data.steps(budget, 2)
    assert first == [Draw(("sums", i), 4) for i in range(3)]
    assert [draw.place[1] for draw in second] == [3, 4, 5]
    assert not budget.needs_norms and budget.metrics() == {} and not data.pilots
    budget.load_state_dict(budget.state_dict())


def test_a_shard_is_piloted_once_and_spent_exactly():
    data = Data(TRUTH)
    budget = GVM(7, 12, pilot_samples=8, steps=3)
    steps = data.steps(budget, 3)
    assert data.pilots == [(21, 8)] and data.position == 21
    spent = by_place(draw for draws in steps for draw in draws)
    rates, norms = zip(*[TRUTH[i % 7] for i in range(21)], strict=True)
    expected = allocate_budget(rates, norms, 21 * (12 - 8))
    assert [spent.get(("sums", i), 0) for i in range(21)] == expected.tolist()
    # prompts in order, none of them without a sample
    places = [draw.place[1] for draws in steps for draw in draws]
    assert places == sorted(places) and all(d.count > 0 for draws in steps for d in draws)
    assert all(draw.weight == 1.0 and draw.group == 0 for draws in steps for draw in draws)
    data.steps(budget, 1)
    assert data.pilots == [(21, 8)] * 2 and data.position == 42


def test_what_the_pilot_costs():
    total = {}
    for count_pilot in (True, False):
        data, budget = Data(TRUTH), GVM(7, 12, steps=2, count_pilot=count_pilot)
        steps = data.steps(budget, 2)
        total[count_pilot] = sum(draw.count for draws in steps for draw in draws)
    assert total == {True: 14 * 4, False: 14 * 12}
    message = "pilot_samples=12: with count_pilot they come out of the n=12 samples per prompt"
    with pytest.raises(ValueError, match=message):
        GVM(7, 12, pilot_samples=12)
    GVM(7, 12, pilot_samples=12, count_pilot=False)


def test_metrics_tell_of_pilot_shard_and_step():
    data, budget = Data(TRUTH), GVM(7, 12, steps=2, drop_easy=0.9, drop_hard=2.0)
    first = data.steps(budget, 1)[0]
    m = budget.metrics()
    assert m["budget_pilot_samples"] == 14 * 8
    # p = 1 is too easy; p = 0 and 12 / 8 acceptances of 12 are too few
    assert m["budget_prompts_dropped"] == 8 and m["budget_zero_share"] == 8 / 14
    assert m["budget_samples"] == sum(draw.count for draw in first)
    assert m["budget_prompts"] == len(first)
    second = data.steps(budget, 1, first=2)[0]
    assert budget.metrics()["budget_pilot_samples"] == 0
    assert budget.metrics()["budget_max"] == max(d.count for d in first + second)
    assert {d.place[1] % 7 for d in first + second} == {2, 4, 5}


@pytest.mark.parametrize(
    "truth", [[(0.0, 0.0)], [(1.0, 2.0)], [(0.5, 0.0)]], ids=["failed", "dropped", "no gradient"]
)
def test_a_pilot_that_says_nothing_gives_a_uniform_shard(truth):
    data, budget = Data(truth), GVM(4, 10, steps=3, drop_easy=0.9, prompt_weight="inverse_np")
    steps = data.steps(budget, 3)
    assert [[d.count for d in draws] for draws in steps] == [[2] * 4] * 3
    assert all(d.weight == pytest.approx(1.0) for draws in steps for d in draws)


def test_lost_pilot_samples_are_not_failures():
    class Lossy(Data):
        def result(self, place, count):
            scored = 4 if place[1] % 2 else 0
            return PilotResult(scored // 2, scored, 1.0 if scored else 0.0)

    [draws] = Lossy().steps(GVM(4, 10, steps=1), 1)
    assert [d.place[1] for d in draws] == [1, 3] and {d.count for d in draws} == {4}


def test_a_maximum_spreads_what_one_prompt_cannot_take():
    data = Data([(0.5, 1.0), (0.0, 0.0), (0.0, 0.0)])
    [draws] = data.steps(GVM(3, 10, steps=1, count_pilot=False, maximum=16), 1)
    assert [d.count for d in draws] == [16, 7, 7]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, [[11], [3], [8]]), (4, [[4, 7], [3], [4, 4]]), (20, [[11], [3], [8]])],
)
def test_groups_of_one_prompt(size, expected, monkeypatch):
    counts = np.array([11, 3, 8])
    monkeypatch.setattr("pyrl.algorithms.budget.allocate_budget", lambda *a, **k: counts)
    data = Data([(0.5, 1.0)])
    [draws] = data.steps(GVM(3, 12, steps=1, group_size=size), 1)
    found = [[d.count for d in draws if d.place[1] == i] for i in range(3)]
    assert found == expected
    for i in range(3):
        groups = [d.group for d in draws if d.place[1] == i]
        assert groups == list(range(len(groups)))


def test_weights_of_prompts():
    truth = [(0.25, 1.0), (0.5, 2.0), (1.0, 1.0)]
    budget = GVM(3, 20, steps=1, prompt_weight="inverse_np", group_size=4)
    [draws] = Data(truth).steps(budget, 1)
    counts = by_place(draws)
    raw = np.array([1 / (counts["sums", i] * truth[i][0]) for i in range(3)])
    for draw in draws:  # every group of a prompt has its weight; the mean is over prompts
        assert draw.weight == pytest.approx(raw[draw.place[1]] / raw.mean())
    later = GVM(3, 20, steps=1, prompt_weight="inverse_accepted", group_size=4)
    [draws] = Data(truth).steps(later, 1)
    assert all(draw.weight == 1.0 for draw in draws)


def test_weights_by_what_was_accepted():
    a, b, c = ("x", 0), ("x", 1), ("y", 0)
    draws = [Draw(a, 4), Draw(a, 4, group=1), Draw(b, 8), Draw(c, 2)]
    weights = accepted_weights(draws, [1, 3, 2, 0])
    assert weights == pytest.approx([0.25 / 0.375, 0.25 / 0.375, 0.5 / 0.375, 0.0])
    assert accepted_weights(draws, [0] * 4) == [0.0] * 4


def test_resuming_inside_a_shard():
    options = {"steps": 4, "prompt_weight": "inverse_np", "group_size": 3}
    data, budget = Data(TRUTH), GVM(5, 12, **options)
    expected = data.steps(budget, 10)
    data, budget = Data(TRUTH), GVM(5, 12, **options)
    found = data.steps(budget, 6)
    state = json.loads(json.dumps(budget.state_dict()))
    again = GVM(5, 12, **options)
    again.load_state_dict(state)
    assert again.metrics() == budget.metrics()
    found += data.steps(again, 4, first=7)
    assert found == expected and len(data.pilots) == 3
    with pytest.raises(ValueError, match="the state is of a budget 'gvm', not 'uniform'"):
        Uniform(2, 2).load_state_dict(state)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 9))
def test_steps_are_balanced(counts, steps):
    shares = [Share(("x", i), n, 0.5) for i, n in enumerate(counts)]
    total = sum(counts)
    parts = cut_into_steps(shares, steps)
    assert len(parts) == steps
    spent = {}
    for part in parts:
        for share in part:
            assert share.samples > 0
            spent[share.place[1]] = spent.get(share.place[1], 0) + share.samples
    assert spent == {i: n for i, n in enumerate(counts) if n}
    places = [share.place[1] for part in parts for share in part]
    assert places == sorted(places)
    if total >= steps:
        sizes = [sum(share.samples for share in part) for part in parts]
        assert min(sizes) > 0
        # each cut is at most half a prompt from its even place, which is rounded down
        assert max(abs(size - total / steps) for size in sizes) <= max(counts) + 1
    if total >= steps * max(counts):
        assert len(places) == len(set(places)), "no prompt is split without need"


def test_a_prompt_larger_than_a_step_is_split():
    """Even cuts would be 3, 6, 9: the first moves to the end of prompt 0, the others stay."""
    parts = cut_into_steps([Share(("x", 0), 1, None), Share(("x", 1), 11, None)], 4)
    found = [[(s.place[1], s.samples) for s in part] for part in parts]
    assert found == [[(0, 1)], [(1, 5)], [(1, 3)], [(1, 3)]]


def online(prompts=4, n=6, size=8, **options):
    return Online(prompts, n, key=lambda place: (place[0], place[1] % size), **options)


def visit(budget, data, draws):
    budget.observe({place: data.result(place, n) for place, n in by_place(draws).items()})


def test_online_is_uniform_first_and_then_follows_what_it_saw():
    data = Data([(0.5, 1.0), (0.5, 3.0), (0.0, 1.0), (1.0, 1.0)] * 2)
    budget = online()
    assert budget.needs_norms
    for _ in range(2):
        [draws] = data.steps(budget, 1)
        assert [d.count for d in draws] == [6] * 4
        assert budget.metrics()["budget_known_share"] == 0.0
        visit(budget, data, draws)
    [draws] = data.steps(budget, 1)
    expected = allocate_budget([0.5, 0.5, 0, 1], [1, 3, 0, 1], 24, minimum=1)
    assert [d.count for d in draws] == expected.tolist() and draws[2].count == 1
    assert budget.metrics()["budget_known_share"] == 1.0 and not data.pilots


def test_online_step_of_known_and_new_prompts():
    data, budget = Data([(0.5, 1.0), (0.5, 2.0), (0.5, 4.0)] * 2), online(prompts=4, size=6)
    visit(budget, data, data.steps(budget, 1)[0])
    [draws] = data.steps(budget, 1)  # two new ones, then the first two again
    assert [d.count for d in draws] == [6, 6, 4, 8]
    assert budget.metrics()["budget_known_share"] == 0.5


def test_online_forgets_slowly_and_by_samples():
    budget, place = online(prompts=1, size=1, decay=0.5), ("sums", 0)
    budget.observe({place: PilotResult(4, 8, 2.0)})
    budget.observe({place: PilotResult(0, 0, 0.0)})  # lost: nothing was seen
    budget.observe({place: PilotResult(1, 2, 6.0)})
    [[_, accepted, scored, norms]] = budget.state_dict()["seen"]
    assert (accepted, scored, norms) == (0.5 * 4 + 1, 0.5 * 8 + 2, 0.5 * 8 + 6)
    budget = online(prompts=2, prompt_weight="inverse_np")
    budget.observe({("sums", 0): PilotResult(0, 4, 0.0), ("sums", 1): PilotResult(4, 4, 1.0)})
    [draws] = Data().steps(budget, 1)
    assert [d.count for d in draws] == [1, 11]
    raw = np.array([1 / (1 * 0.125), 1 / 11])  # half an acceptance of four
    assert [d.weight for d in draws] == pytest.approx(raw / raw.mean())


def test_online_resumes():
    data = Data([(0.5, 1.0), (0.25, 3.0), (0.0, 1.0), (1.0, 1.0)] * 2)
    budget = online(prompts=3, group_size=2)
    for _ in range(5):
        [draws] = data.steps(budget, 1)
        visit(budget, data, draws)
    again = online(prompts=3, group_size=2)
    again.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    position, [expected] = data.position, data.steps(budget, 1)
    data.position = position
    assert data.steps(again, 1) == [expected] and again.metrics() == budget.metrics()


def test_neyman_needs_the_second_moments():
    class Moments(Data):
        def result(self, place, count):
            p, g = self.truth[place[1] % len(self.truth)]
            return PilotResult(round(p * count), count, g, second_moment=2 * g * g)

    [draws] = Moments([(0.5, 1.0), (1.0, 1.0)]).steps(GVM(2, 50, steps=1, method="neyman"), 1)
    expected = allocate_budget([0.5, 1], [1, 1], 84, method="neyman", second_moment=[2, 2])
    assert [d.count for d in draws] == expected.tolist()
    message = r"needs second_moment; the pilot of \('sums', 1\) has none"
    with pytest.raises(ValueError, match=message):
        Data(TRUTH).steps(GVM(2, 50, steps=1, method="neyman"), 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0, 4), "prompts=0: expected a whole number >= 1"),
        (lambda: Uniform(4, 1.5), r"n=1\.5: expected a whole number"),
        (lambda: GVM(4, 12, steps=0), "steps=0: expected a whole number >= 1"),
        (lambda: GVM(4, 12, group_size=-1), "group_size=-1: expected a whole number >= 0"),
        (lambda: GVM(4, 12, maximum=11), "maximum=11: expected a whole number >= 12"),
        (lambda: GVM(4, 12, alpha=0.0), r"alpha=0\.0: expected a finite number > 0"),
        (lambda: GVM(4, 12, method="x"), "method='x': expected one of gvm, neyman"),
        (lambda: GVM(4, 12, drop_easy=1.5), r"drop_easy=1\.5: expected a number in \[0, 1\]"),
        (lambda: GVM(4, 12, drop_hard=-1), r"drop_hard=-1: expected a number in \[0, 12\]"),
        (lambda: GVM(4, 12, prompt_weight="np"), "prompt_weight='np': expected one of none"),
        (lambda: online(decay=1.1), r"decay=1\.1: expected a number in \[0, 1\]"),
        (lambda: online(beta=1.0), r"beta=1\.0: expected a finite number >= 2"),
        (lambda: PilotResult(3, 2, 1.0), "PilotResult: 3 accepted of 2 scored"),
        (lambda: PilotResult(1, 2, float("nan")), r"PilotResult\.gradient_norm=nan"),
        (lambda: PilotResult(1, 2, 1.0, -1.0), r"PilotResult\.second_moment=-1\.0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pilot_of_another_length_is_refused():
    data = Data(TRUTH)
    with pytest.raises(ValueError, match="pilot: 3 results for 4 prompts"):
        GVM(4, 12, steps=1).plan(1, data.take, lambda places, n: data.pilot(places, n)[:3])


@settings(deadline=None, max_examples=60)
@example([(2, 5.0), (6, 5.0), (7, 2.75)], 3, 6)  # a quota below the minimum that is rounded to it
@given(
    st.lists(st.tuples(st.integers(0, 8), st.floats(0.1, 9)), min_size=1, max_size=12),
    st.integers(2, 4),
    st.integers(5, 16),
)
def test_a_prompt_gets_the_minimum_or_nothing(table, minimum, n):
    truth = [(accepted / 8, norm) for accepted, norm in table]
    data, budget = Data(truth), GVM(len(truth), n, pilot_samples=8, steps=1, count_pilot=False,
                                    minimum=minimum)  # fmt: skip
    (draws,) = data.steps(budget, 1)
    spent = by_place(draws)
    assert sum(spent.values()) == n * len(truth)
    assert min(spent.values()) >= minimum
    plain = by_place(Data(truth).steps(
        GVM(len(truth), n, pilot_samples=8, steps=1, count_pilot=False), 1
    )[0])  # fmt: skip
    weighted = sum(accepted > 0 for accepted, _ in table)
    if len(plain) == weighted and min(plain.values()) >= minimum:  # nothing to mend
        assert spent == plain


def test_a_minimum_above_the_shard_goes_to_the_prompt_that_matters_most():
    data = Data([(0.5, 1.0), (0.5, 3.0)])
    budget = GVM(2, 2, pilot_samples=8, steps=1, count_pilot=False, minimum=4)
    assert by_place(data.steps(budget, 1)[0]) == {("sums", 1): 4}
    with pytest.raises(ValueError, match="minimum=0"):
        GVM(2, 4, pilot_samples=2, minimum=0)
    with pytest.raises(ValueError, match="minimum=5: above the n=4"):
        Online(2, 4, key=lambda place: place, minimum=5)
