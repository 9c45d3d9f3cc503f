import math

import numpy as np
import pytest

from pyrl.algorithms import Attempt, Group
from pyrl.trainer.evaluate import interval, sample_rows


def test_interval_of_known_prompts():
    result = interval([[1, 1], [0, 0], [1, 0]])
    assert result["mean"] == 0.5 and result["prompts"] == 3 and result["samples"] == 6
    assert 0 <= result["low"] <= 0.5 <= result["high"] <= 1


def test_prompts_are_what_is_resampled():
    # 16 prompts, each all right or all wrong: 100 samples of each add no information.
    rows = [[i % 2] * 100 for i in range(16)]
    few = interval([[i % 2] for i in range(16)])
    many = interval(rows)
    assert (many["low"], many["high"]) == (few["low"], few["high"])
    # The bootstrap quantiles are those of a binomial: sd .125, so about .5 -+ .245.
    assert many["high"] - many["low"] == pytest.approx(2 * 1.96 * 0.125, abs=0.07)


def test_coverage_is_near_95_percent():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        result = interval(rng.normal(size=(64, 1)).tolist())
        hits += result["low"] <= 0 <= result["high"]
    # The percentile bootstrap at 64 prompts covers about 94%; 200 trials have sd 1.7%.
    assert 0.89 <= hits / 200 <= 0.985


def test_lost_samples_and_prompts():
    nan = math.nan
    result = interval([[1, nan], [nan, nan], [0, 0]])
    assert result["mean"] == 0.5
    assert (result["prompts"], result["samples"], result["nan_rewards"]) == (2, 3, 3)
    nothing = interval([[nan]])
    assert math.isnan(nothing["mean"]) and nothing["prompts"] == 0


def test_equal_rewards_have_no_width():
    result = interval([[0.25, 0.25]] * 10)
    assert result["mean"] == result["low"] == result["high"] == 0.25


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(0, []), (1, ["a0"]), (2, ["a0", "b0"]), (4, ["a0", "b0", "a1", "a2"]), (9, None)],
)
def test_samples_are_spread_over_the_prompts(limit, expected):
    groups = [
        Group(name, name, [1], [Attempt([1], [0.0], "stop", f"{name}{i}", 1.0) for i in range(n)])
        for name, n in (("a", 3), ("b", 1))
    ]
    rows = sample_rows(groups, 7, "train", limit)
    assert [row["completion"] for row in rows] == (expected or ["a0", "b0", "a1", "a2"][:limit])
    assert all(row["prompt_id"] == row["completion"][0] for row in rows)
