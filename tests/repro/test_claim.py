"""The rule, the intervals, and what is kept of a result."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.repro.claim import Arm, Chart, Claim, Line, Result, Table, Verdict, judge, rounded
from pyrl.repro.statistics import Estimate, t_cdf, t_interval, t_quantile

#: Two-sided 95% and 99% points of Student's t, from printed tables (three digits after the point).
TABLE = {
    (0.975, 1): 12.706, (0.975, 2): 4.303, (0.975, 3): 3.182, (0.975, 4): 2.776, (0.975, 5): 2.571,
    (0.975, 7): 2.365, (0.975, 10): 2.228, (0.975, 30): 2.042, (0.975, 120): 1.980,
    (0.995, 1): 63.657, (0.995, 4): 4.604, (0.995, 9): 3.250,
}  # fmt: skip


@pytest.mark.parametrize(("p", "dof"), TABLE)
def test_t_quantiles_are_those_of_printed_tables(p, dof):
    assert t_quantile(p, dof) == pytest.approx(TABLE[p, dof], abs=5e-4)  # their last digit


@settings(deadline=None, max_examples=20)
@given(x=st.floats(0, 8), dof=st.integers(1, 60))
def test_t_cdf_is_the_integral_of_the_density(x, dof):
    scale = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(dof * math.pi)
    steps = 2000
    height = [
        scale * (1 + (x * i / steps) ** 2 / dof) ** (-(dof + 1) / 2) for i in range(steps + 1)
    ]
    simpson = height[0] + height[-1] + 4 * sum(height[1:-1:2]) + 2 * sum(height[2:-1:2])
    # Simpson's error at 2,000 steps over a width of 8 at most
    assert t_cdf(x, dof) == pytest.approx(0.5 + x * simpson / steps / 3, abs=1e-9)


def test_an_interval_by_hand():
    # mean 2, s = 1, s / sqrt(3) * t(.975, 2) = 4.303 / 1.732
    mean, low, high, seeds = t_interval([1.0, 2.0, 3.0])
    assert (mean, seeds) == (2.0, 3)
    assert high - 2 == pytest.approx(2 - low) == pytest.approx(2.4843, abs=1e-3)


def test_one_seed_says_nothing_of_spread():
    assert t_interval([0.25]) == Estimate(0.25, -math.inf, math.inf, 1)


def test_an_interval_of_nothing_or_of_nan_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        t_interval([])
    with pytest.raises(ValueError, match=r"values\[1\] = nan"):
        t_interval([0.0, math.nan])
    with pytest.raises(ValueError, match=r"p=1\.5"):
        t_quantile(1.5, 3)


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [
        (0.1, 0.2, Verdict.AGREES, Verdict.DISAGREES),
        (-0.2, -0.1, Verdict.DISAGREES, Verdict.AGREES),
        (-0.1, 0.2, Verdict.UNDECIDED, Verdict.UNDECIDED),
        (0.0, 0.2, Verdict.UNDECIDED, Verdict.UNDECIDED),  # holds 0
        (0.0, 0.0, Verdict.UNDECIDED, Verdict.UNDECIDED),
        (-math.inf, math.inf, Verdict.UNDECIDED, Verdict.UNDECIDED),
    ],
)
def test_the_rule(low, high, above, below):
    difference = Estimate((low + high) / 2, low, high, 5)
    assert judge(difference, "above") is above
    assert judge(difference, "below") is below
    assert judge(difference, "reported") is Verdict.REPORTED


def test_differences_are_taken_seed_by_seed():
    # Seeds spread by 10, the arms by 1 on every one of them: paired, that is certain.
    result = Result("x", "X", "paper", "claimed")
    result.arms = [Arm("q", "a", [0.0, 10.0, 20.0]), Arm("q", "b", [1.0, 11.1, 21.0])]
    assert result.verdict(Claim("q", "b", "above", "a")) is Verdict.AGREES
    assert result.verdict(Claim("q", "b", "below", "a")) is Verdict.DISAGREES
    assert result.verdict(Claim("q", "b", "above", 5.0)) is Verdict.UNDECIDED


def test_a_claim_about_what_was_not_measured_is_refused():
    result = Result("x", "X", "paper", "claimed", arms=[Arm("q", "a", [1.0, 2.0])])
    with pytest.raises(ValueError, match=r"no arm 'b' of 'q'; there are \['q: a'\]"):
        result.verdict(Claim("q", "b", "above", "a"))
    result.arms.append(Arm("q", "b", [1.0]))
    with pytest.raises(ValueError, match="1 seeds against 2"):
        result.verdict(Claim("q", "b", "above", "a"))
    with pytest.raises(ValueError, match="direction='higher'"):
        Claim("q", "a", "higher", "b")


def test_results_survive_json():
    result = Result(
        "x", "X", "paper", "claimed", "run", "figure", ["caveat"],
        [Arm("q", "a", [1.0, 2.0])], [Claim("q", "a", "above", 0.5, "note")],
        [Chart("c", "y", "x", [Line("a", [0.0, 1.0], [[0.1, 0.2], [0.3, 0.4]])], mark=1.0)],
        [Table("t", ["c"], [["1"]], "n")], ["images/x.png"], "text", {"seeds": 2},
    )  # fmt: skip
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    least = {"name": "y", "title": "Y", "paper": "p", "published": "c"}
    assert Result.from_dict(least) == Result("y", "Y", "p", "c")


def test_an_unknown_key_is_named():
    values = Result("x", "X", "p", "c", arms=[Arm("q", "a", [1.0])]).to_dict()
    with pytest.raises(ValueError, match="unknown key 'versoin'"):
        Result.from_dict({**values, "versoin": 1})
    values["arms"][0]["colour"] = "red"
    with pytest.raises(ValueError, match="arms: unknown key 'colour'"):
        Result.from_dict(values)


def test_rounding_keeps_significant_digits():
    assert rounded([123456.7, 0.000123456, -2.0, 0.0], 3) == [123000.0, 0.000123, -2.0, 0.0]
