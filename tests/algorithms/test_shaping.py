import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.algorithms import Attempt, Group, RewardTerms

LIMIT = st.integers(1, 300)
few = settings(deadline=None, max_examples=50)


def bonus(terms, length, finish="stop", limit=100, step=1):
    return terms.bonus(length, finish, max_new_tokens=limit, step=step)


def test_overlong_is_the_papers_formula():
    """arXiv 2503.14476, eq. 13, with L_max = 100 and L_cache = 20."""
    terms = RewardTerms(overlong_buffer=20)
    for length in range(101):
        expected = 0.0 if length <= 80 else (80 - length) / 20
        assert bonus(terms, length) == expected
    assert bonus(terms, 100) == bonus(terms, 120) == -1
    assert bonus(RewardTerms(overlong_buffer=20, overlong_penalty=0.5), 90) == -0.25


def test_cosine_runs_from_high_to_low():
    terms = RewardTerms(cosine_low=-0.5, cosine_high=0.5, cosine_on=1)
    assert bonus(terms, 0) == 0.5 and bonus(terms, 100) == bonus(terms, 130) == -0.5
    assert bonus(terms, 50) == pytest.approx(0, abs=1e-15)
    assert bonus(terms, 25) == pytest.approx(0.5 * math.cos(math.pi / 4))


@few
@given(
    LIMIT, st.integers(0, 300), st.floats(0, 5), st.floats(-2, 2), st.floats(0, 3), st.floats(0, 5)
)
def test_longer_never_earns_more_and_terms_are_bounded(limit, buffer, penalty, low, gap, unended):
    terms = RewardTerms(
        overlong_buffer=min(buffer, limit),
        overlong_penalty=penalty,
        cosine_low=low,
        cosine_high=low + gap,
        cosine_on=1,
        nontermination_penalty=unended,
    )
    previous = math.inf
    for length in range(limit + 1):
        parts = terms.terms(length, "stop", max_new_tokens=limit, step=1)
        assert -penalty <= parts["overlong"] <= 0
        assert low - 1e-12 <= parts["cosine"] <= low + gap + 1e-12
        assert parts["nontermination"] == 0
        ended = bonus(terms, length, limit=limit)
        assert ended <= previous + 1e-12
        assert bonus(terms, length, "length", limit=limit) == pytest.approx(ended - unended)
        previous = ended


@few
@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 60))
def test_the_cycle(on, off, step):
    terms = RewardTerms(cosine_on=on, cosine_off=off if on else 0, cosine_high=1.0)
    pattern = ([True] * on + [False] * off) if on else [False]
    assert terms.cosine_is_on(step) is (pattern * 60)[step - 1]
    assert (bonus(terms, 0, step=step) == 1.0) is terms.cosine_is_on(step)


def test_the_default_is_no_term():
    assert bonus(RewardTerms(), 100, "length") == 0


def test_apply_sets_every_bonus():
    def attempt(reward, length, finish="stop"):
        return Attempt([1] * length, [-1.0] * length, finish, "", reward, bonus=7.0)

    group = Group("", "", [1], [attempt(1.0, 5), attempt(0.0, 10, "length"), attempt(math.nan, 9)])
    terms = RewardTerms(overlong_buffer=4, cosine_high=0.5, cosine_on=2, cosine_off=1,
                        nontermination_penalty=0.25)  # fmt: skip
    metrics = terms.apply([group], max_new_tokens=10, step=2)
    assert [a.bonus for a in group.attempts] == pytest.approx([0.25, -1.25, 0.0])
    assert metrics == pytest.approx(
        {
            "bonus_mean": -0.5,
            "overlong_mean": -0.5,
            "cosine_mean": 0.125,
            "nontermination_mean": -0.125,
        }
    )
    assert terms.apply([group], max_new_tokens=10, step=3)["cosine_mean"] == 0
    lost = terms.apply([Group("", "", [1], [attempt(math.nan, 3)])], max_new_tokens=10, step=1)
    assert lost.keys() == metrics.keys() and all(map(math.isnan, lost.values()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlong_buffer": -1}, "overlong_buffer = -1"),
        ({"overlong_buffer": 1.5}, "overlong_buffer = 1.5"),
        ({"overlong_penalty": -0.1}, "overlong_penalty = -0.1"),
        ({"overlong_penalty": math.nan}, "overlong_penalty = nan"),
        ({"cosine_low": math.inf}, "cosine_low = inf: expected a finite number$"),
        ({"cosine_high": "a"}, "cosine_high = 'a'"),
        ({"cosine_low": 0.5}, "cosine_low = 0.5 is above cosine_high = 0.0"),
        ({"cosine_on": -1}, "cosine_on = -1"),
        ({"cosine_off": 3}, "cosine_off = 3: .* cosine_on = 0"),
        ({"nontermination_penalty": -1.0}, "nontermination_penalty = -1.0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RewardTerms(**options)


def test_a_buffer_above_the_limit():
    with pytest.raises(ValueError, match=r"overlong_buffer = 200: expected at most .* 100"):
        bonus(RewardTerms(overlong_buffer=200), 5)
