"""avg@k, pass@k, maj@k and their intervals, against enumeration."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.trainer import evaluation_stats
from pyrl.trainer.evaluation_stats import (
    Outcome,
    bootstrap,
    describe,
    maj_at_k,
    pass_at_k,
    powers,
)

NAN = math.nan


def outcome(rewards, answers=None, **given):
    n = len(rewards)
    values = {"lengths": [3] * n, "truncated": [False] * n, "empty": [False] * n, **given}
    return Outcome(rewards=rewards, answers=answers, **values)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_success(successes, data):
    n, c = len(successes), sum(successes)
    k = data.draw(st.integers(1, n))
    subsets = list(itertools.combinations(successes, k))
    expected = sum(map(any, subsets)) / len(subsets)
    # A handful of logs and one expm1: a few roundings of 2^-53 each.
    assert float(pass_at_k(n, c, k)) == pytest.approx(expected, rel=1e-14, abs=0)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(2000, 1, 1), (2000, 1, 1000), (2000, 37, 64), (10**6, 1, 3), (10**5, 5, 7)]
)
def test_pass_at_k_keeps_its_digits_among_many_samples(n, c, k):
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    # k logs of relative rounding 2^-53 each, and their sum's.
    assert float(pass_at_k(n, c, k)) == pytest.approx(float(exact), rel=1e-13, abs=0)


def test_pass_at_k_of_arrays_and_its_limits():
    n, c = np.array([4, 4, 4, 2, 0]), np.array([0, 4, 3, 1, 0])
    assert pass_at_k(n, c, 2).tolist()[:4] == [0, 1, 1, 1]
    assert math.isnan(pass_at_k(n, c, 2)[4])
    assert np.isnan(pass_at_k(n, c, 3)).tolist() == [False, False, False, True, True]
    assert str(float(pass_at_k(5, 0, 2))) == "0.0"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.data())
def test_pass_at_k_grows_with_k_and_c(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    here = float(pass_at_k(n, c, k))
    assert 0 <= here <= 1
    assert float(pass_at_k(n, c, min(n, k + 1))) >= here - 1e-15
    assert float(pass_at_k(n, min(n, c + 1), k)) >= here - 1e-15


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 2, 0, "k=0"),
        ([4, 4], [1, 5], 1, r"c\[1\]=5: expected 0 to n\[1\]=4"),
        (4, -1, 1, r"c\[0\]=-1"),
    ],
)
def test_pass_at_k_mistakes(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def brute_majority(answers, rewards, k):
    """Enumerates subsets, tied answers and the samples that give the chosen one."""
    total = []
    for chosen in itertools.combinations(range(len(answers)), k):
        voters = [i for i in chosen if answers[i] is not None]
        if not voters:
            total.append(np.mean([rewards[i] for i in chosen]))
            continue
        votes = {a: sum(answers[i] == a for i in voters) for a in {answers[i] for i in voters}}
        best = [a for a, count in votes.items() if count == max(votes.values())]
        pays = [np.mean([rewards[i] for i in voters if answers[i] == a]) for a in best]
        total.append(np.mean(pays))
    return float(np.mean(total))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["4", "5", "6", None]), st.sampled_from([0.0, 0.25, 1.0])),
        min_size=1,
        max_size=7,
    ),
    st.data(),
)
def test_maj_at_k_is_the_expectation_over_subsets(samples, data):
    answers, rewards = zip(*samples, strict=True)
    k = data.draw(st.integers(1, len(samples)))
    expected = brute_majority(answers, rewards, k)
    # Means of at most 35 numbers of size 1.
    assert maj_at_k(answers, rewards, k) == pytest.approx(expected, rel=0, abs=1e-14)


def test_maj_at_n_is_the_plurality_and_ties_share():
    assert maj_at_k(["a", "a", "b"], [1, 1, 0], 3) == 1
    assert maj_at_k(["a", "b"], [1, 0], 2) == 0.5
    assert maj_at_k(["a", "b", None, None, None], [1, 1, 0, 0, 0], 5) == 1  # silence is no vote
    assert maj_at_k([None, None], [0.25, 0.75], 2) == 0.5
    assert math.isnan(maj_at_k(["a"], [1], 2))


def test_many_subsets_are_drawn_by_a_seed():
    rng = np.random.default_rng(0)
    answers = [str(a) for a in rng.integers(0, 4, 14)]
    rewards = [float(a == "2") for a in answers]
    assert math.comb(14, 5) > evaluation_stats.SUBSETS
    drawn = maj_at_k(answers, rewards, 5, seed=3)
    assert drawn == maj_at_k(answers, rewards, 5, seed=3)
    # 1000 subsets of values in [0, 1]: a standard deviation of at most .016.
    assert drawn == pytest.approx(brute_majority(answers, rewards, 5), abs=0.065)
    assert maj_at_k(answers, rewards, 14, seed=1) == maj_at_k(answers, rewards, 14, seed=2)


def test_majority_mistakes():
    with pytest.raises(ValueError, match="k=0"):
        maj_at_k(["a"], [1], 0)
    with pytest.raises(ValueError, match="2 answers and 1 rewards"):
        maj_at_k(["a", "b"], [1], 1)


def test_powers():
    assert [powers(n) for n in (1, 2, 3, 8, 12)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="samples=0"):
        powers(0)


def test_one_resampling_serves_all_statistics(monkeypatch):
    rng = np.random.default_rng(1)
    a = rng.random(20)
    values = np.stack([a, 2 * a + 1, np.full(20, 0.1), np.where(np.arange(20) < 5, a, NAN)], 1)
    means, drawn = bootstrap(values, 7)
    assert means[:3] == pytest.approx([a.mean(), 2 * a.mean() + 1, 0.1], rel=1e-14)
    assert means[3] == pytest.approx(a[:5].mean(), rel=1e-14)
    # The same prompts in every column: a linear map of a statistic stays one.
    assert drawn[:, 1] == pytest.approx(2 * drawn[:, 0] + 1, rel=1e-13)
    assert (drawn[:, 2] == 0.1).all()  # equal values have no width, whatever rounding does
    assert (bootstrap(values, 7)[1] == drawn)[~np.isnan(drawn)].all()
    assert not np.array_equal(bootstrap(values, 8)[1], drawn)
    # sd of a mean of 20 uniform numbers .065; the resamples' own sd has an error of a sixth.
    assert drawn[:, 0].std() == pytest.approx(a.std() / math.sqrt(20), rel=0.1)
    monkeypatch.setattr(evaluation_stats, "BLOCK", 100)  # blocks of 5 resamples: the same kind
    assert bootstrap(values, 7)[1].shape == drawn.shape


def test_details_of_known_samples():
    details = describe(
        [
            outcome([1, 1, 0, NAN], ["a", "a", "b", "b"], lengths=[1, 2, 3, 4],
                    truncated=[False, False, False, True]),
            outcome([0, 0, 0, 0], [None] * 4, empty=[True, False, False, False]),
            outcome([1, 1, 1, 1], ["c"] * 4),
            outcome([NAN] * 4, ["d"] * 4),
        ]
    )  # fmt: skip
    json.dumps(details, allow_nan=False)
    whole = details["overall"]
    assert (whole["prompts"], whole["samples"]) == (3, 11)
    assert (whole["lost"], whole["lost_prompts"]) == (5, 1)
    assert whole["mean"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert whole["low"] <= whole["mean"] <= whole["high"]
    assert whole["std"] == pytest.approx(math.sqrt((1 / 3 + 0 + 0) / 3))
    assert details["ks"] == [1, 2, 4]
    assert whole["pass"]["1"]["mean"] == pytest.approx(whole["mean"])
    assert whole["pass"]["2"] == whole["pass"]["2"] | {"prompts": 3, "mean": pytest.approx(2 / 3)}
    # The first prompt has three scored samples left: no pass@4, no maj@4.
    assert whole["pass"]["4"] == whole["pass"]["4"] | {"prompts": 2, "mean": 0.5}
    assert whole["majority"]["4"] == whole["majority"]["4"] | {"prompts": 2, "mean": 0.5}
    assert whole["length"] == {"mean": 46 / 16, "p50": 3, "p90": 3, "max": 4}
    assert (whole["truncated"], whole["empty"], whole["answered"]) == (1 / 16, 1 / 16, 12 / 16)
    assert whole["solved"] == {"never": 1 / 3, "sometimes": 1 / 3, "always": 1 / 3}
    assert details["domains"] == {}
    assert details["blended"]["mean"] == whole["mean"]


def test_success_is_a_threshold():
    rows = [outcome([0.5, 0.2]), outcome([0.8, 0.1])]
    solved = [describe(rows, success=s)["overall"]["pass"]["1"]["mean"] for s in (0.1, 0.5, 1.0)]
    assert solved == [1.0, 0.5, 0.0]
    for bad in (NAN, math.inf):
        with pytest.raises(ValueError, match="success="):
            describe(rows, success=bad)


def test_domains_and_their_blend():
    rows = [outcome([1.0, 0.0], domain="math"), outcome([1, 1], domain="math"),
            outcome([0, 0], domain="code"), outcome([0, 0.5], domain="")]  # fmt: skip
    details = describe(rows)
    assert list(details["domains"]) == ["math", "code", ""]
    assert [t["mean"] for t in details["domains"].values()] == [0.75, 0, 0.25]
    assert details["overall"]["mean"] == 0.4375
    assert details["blended"]["mean"] == pytest.approx(1 / 3)
    # A domain's table does not depend on which others there are.
    assert describe([rows[1], rows[0]])["domains"]["math"] == details["domains"]["math"]
    weighted = describe(rows, weights={"math": 3, "code": 1})["blended"]
    assert weighted["mean"] == pytest.approx(0.75 * 0.75)
    assert weighted["weights"] == {"math": 0.75, "code": 0.25, "": 0}
    assert 0.375 <= weighted["low"] <= weighted["high"] <= 0.75


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"maths": 1}, r"weights\['maths'\]: the domains are math, code"),
        ({"math": -1}, r"weights\['math'\]=-1"),
        ({"math": NAN}, r"weights\['math'\]=nan"),
        ({"math": 0}, "every weight is 0"),
    ],
)
def test_weight_mistakes(weights, message):
    rows = [outcome([1.0], domain="math"), outcome([0.0], domain="code")]
    with pytest.raises(ValueError, match=message):
        describe(rows, weights=weights)


def test_a_domain_without_a_score_leaves_no_blend():
    rows = [outcome([1.0], domain="math"), outcome([NAN], domain="code")]
    details = describe(rows)
    assert details["domains"]["code"]["mean"] is None and details["blended"]["mean"] is None
    assert describe(rows, weights={"math": 1})["blended"]["mean"] == 1


def test_everything_lost_and_nothing_at_all():
    for rows in ([outcome([NAN, NAN], ["a", "b"])] * 3, []):
        details = describe(rows)
        json.dumps(details, allow_nan=False)
        whole = details["overall"]
        assert whole["mean"] is whole["low"] is whole["std"] is whole["majority"] is None
        assert whole["lost"] == 2 * len(rows) and whole["solved"]["never"] is None


def test_one_sample_of_one_prompt():
    details = describe([outcome([0.5], ["a"])])
    whole = details["overall"]
    assert details["ks"] == [1] and whole["std"] is None
    assert whole["mean"] == whole["low"] == whole["high"] == 0.5
    assert whole["majority"]["1"]["mean"] == 0.5


def test_answers_that_could_not_be_told_leave_the_vote():
    rows = [outcome([1, 0, 1], ["a", None, "a"], unread=[False, True, False])]
    whole = describe(rows)["overall"]
    assert whole["majority"]["2"]["mean"] == 1 and whole["answered"] == 1
    assert whole["majority"]["3"]["mean"] is None and whole["pass"]["3"]["prompts"] == 1
    nobody = describe([outcome([1, 0], [None, None], unread=[True, True])])["overall"]
    assert nobody["majority"] is None and nobody["answered"] is None
