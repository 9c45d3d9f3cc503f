"""allocate_budget against its formula, its optimality under bounds, and its properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrl
from pyrl.algorithms.allocate import allocate_budget

rates = st.floats(0, 1, allow_subnormal=True)
norms = st.one_of(st.just(0.0), st.floats(1e-3, 1e3), st.floats(0, 1e300))
prompts = st.lists(st.tuples(rates, norms), min_size=1, max_size=12)
few = settings(max_examples=150, deadline=None)


def weights(p, g, alpha=1e-3, beta=2.0):
    """The formula, one prompt at a time."""
    return [
        0.0 if pi == 0 or gi == 0 else gi / math.sqrt(pi + alpha / pi ** (beta - 1))
        for pi, gi in zip(p, g, strict=True)
    ]


def split(items):
    return [list(column) for column in zip(*items, strict=True)]


def test_the_formula():
    p, g = [0.5, 0.25, 0.0, 1.0, 0.1], [1.0, 2.0, 9.0, 0.0, 0.3]
    for alpha, beta in ((1e-3, 2.0), (0.1, 3.5)):
        w = weights(p, g, alpha, beta)
        total = 10_000_000
        n = allocate_budget(p, g, total, alpha=alpha, beta=beta)
        assert n.dtype == np.int64 and n.sum() == total
        assert np.abs(n - total * np.array(w) / sum(w)).max() < 1
        assert n[2] == n[3] == 0


def test_largest_remainders_and_ties_by_index():
    ones = [1.0] * 4
    assert allocate_budget(ones, ones, 6).tolist() == [2, 2, 1, 1]
    # shares 1.2, 2.4, 2.4 of 6: the two larger remainders are equal, the lower index has it
    assert allocate_budget([1, 1, 1], [1, 2, 2], 6).tolist() == [1, 3, 2]
    assert allocate_budget([1, 1, 1], [2, 1, 2], 6).tolist() == [3, 1, 2]


def test_no_weight_at_all_is_uniform():
    assert allocate_budget([0, 0, 0], [1, 2, 3], 7).tolist() == [3, 2, 2]
    assert allocate_budget([1, 1], [0, 0], 4).tolist() == [2, 2]
    assert allocate_budget([1, 0], [0, 1], 0).tolist() == [0, 0]
    assert allocate_budget([], [], 0).tolist() == []


@few
@given(prompts, st.integers(0, 10_000), st.sampled_from([(1e-3, 2.0), (0.5, 2.0), (1e-6, 5.0)]))
def test_it_sums_to_the_total_and_follows_the_weights(items, total, damping):
    p, g = split(items)
    alpha, beta = damping
    n = allocate_budget(p, g, total, alpha=alpha, beta=beta)
    assert n.sum() == total and (n >= 0).all()
    zero = [i for i, (pi, gi) in enumerate(items) if pi == 0 or gi == 0]
    if len(zero) < len(items) and all(pi > 1e-3 and 1e-3 <= gi <= 1e3 for pi, gi in items):
        w = np.array(weights(p, g, alpha, beta))
        assert np.abs(n - total * w / w.sum()).max() < 1
    largest = max(gi for _, gi in items)
    if largest > 0 and any(pi > 0.01 and gi == largest for pi, gi in items):
        assert not n[zero].any()


@few
@given(rates, st.lists(norms, min_size=2, max_size=10), st.integers(0, 500))
def test_monotone_in_the_norm_at_equal_rates(p, g, total):
    n = allocate_budget([p] * len(g), sorted(g), total)
    if p > 1e-100 and any(g):  # else uniform: the remainder goes to the lower index
        assert (np.diff(n)[np.diff(sorted(g)) > 0] >= 0).all()


@pytest.mark.parametrize(("alpha", "beta"), [(1e-3, 2.0), (0.05, 2.0), (0.01, 3.0), (1e-4, 4.5)])
def test_the_weight_peaks_where_the_formula_says(alpha, beta):
    p = np.arange(1, 2001) / 2000
    n = allocate_budget(p, np.ones_like(p), 10**11, alpha=alpha, beta=beta)
    assert abs(p[n.argmax()] - (alpha * (beta - 1)) ** (1 / beta)) <= 1 / 2000
    assert (np.diff(n[: n.argmax() + 1]) > 0).all() and (np.diff(n[n.argmax() :]) < 0).all()


@few
@given(prompts, st.integers(0, 1000), st.integers(-300, 300))
def test_the_scale_of_the_norms_says_nothing(items, total, exponent):
    """Bit for bit for powers of two, which do not round."""
    p, g = split([(pi, gi if 1e-3 <= gi <= 1e3 else 1.0) for pi, gi in items])
    scaled = [gi * 2.0**exponent for gi in g]
    assert (allocate_budget(p, scaled, total) == allocate_budget(p, g, total)).all()


@few
@given(prompts, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_the_order_of_the_prompts_says_nothing_but_for_ties(items, total, random):
    order = list(range(len(items)))
    random.shuffle(order)
    a = allocate_budget(*split(items), total)
    b = allocate_budget(*split([items[i] for i in order]), total)
    assert np.abs(a[order] - b).max() <= 1
    if len(set(weights(*split([(p, min(g, 1e3)) for p, g in items])))) == len(items):
        assert sorted(a) == sorted(b)


@few
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), min_size=1, max_size=8),
    st.integers(0, 5),
    st.integers(0, 20),
    st.floats(0, 1),
)
def test_bounds(items, low, room, where):
    p, g = split(items)
    n, high = len(items), low + room
    total = round(low * n + where * room * n)
    found = allocate_budget(p, g, total, minimum=low, maximum=high)
    assert found.sum() == total and found.min() >= low and found.max() <= high
    free = allocate_budget(p, g, total)
    if free.min() >= low + 1 and free.max() <= high - 1:
        assert (found == free).all(), "bounds that do not bind change nothing"


def test_the_bounded_shares_are_the_best_there_are():
    """No exchange of one sample lowers sum of w²/n under the bounds, up to the rounding."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, g = rng.uniform(0.05, 1, 9), rng.uniform(0.1, 5, 9)
        total, low, high = 90_000, 3000, 20_000
        n = allocate_budget(p, g, total, minimum=low, maximum=high).astype(float)
        w = np.array(weights(p, g))
        gain = (w / n) ** 2  # what one more sample is worth
        up, down = gain[n < high - 1], gain[n > low + 1]
        # one sample in 3000 is what rounding may have moved
        assert up.max(initial=0) <= down.min(initial=np.inf) * (1 + 2e-3)


def test_what_the_full_cannot_take_goes_to_the_others():
    assert allocate_budget([1, 1, 0, 0], [1, 1, 1, 1], 10, maximum=3).tolist() == [3, 3, 2, 2]
    assert allocate_budget([1, 0, 0], [1, 1, 1], 9, minimum=1).tolist() == [7, 1, 1]
    assert allocate_budget([1, 0.5], [1, 0], 5, minimum=2).tolist() == [3, 2]


def test_neyman_is_the_standard_deviation_of_the_estimator():
    """Against the variance of the estimator itself, drawn."""
    rng = np.random.default_rng(1)
    accept, mean_norm, moment, spread = [], [], [], []
    for _ in range(3):
        p, draws = rng.uniform(0.2, 0.9), 200_000
        gradients = rng.normal(size=4)[None] + rng.normal(size=(draws, 4)) * rng.uniform(0.1, 2)
        accepted = rng.random(draws) < p
        kept = gradients[accepted]
        accept.append(accepted.mean())
        mean_norm.append(np.linalg.norm(kept.mean(0)))
        moment.append((kept**2).sum(1).mean())
        one = accepted[:, None] * gradients / accepted.mean()
        spread.append(math.sqrt(one.var(0).sum()))
    n = allocate_budget(accept, mean_norm, 10**6, method="neyman", second_moment=moment)
    assert np.abs(n - 10**6 * np.array(spread) / sum(spread)).max() <= 2


def test_neyman_of_certain_prompts():
    # always accepted, always the same gradient: there is nothing to average
    n = allocate_budget([1, 0.5, 0], [2, 2, 0], 10, method="neyman", second_moment=[4, 4, 0])
    assert n.tolist() == [0, 10, 0]
    tiny = allocate_budget([5e-324, 1], [0, 0], 9, method="neyman", second_moment=[1, 1])
    assert tiny.tolist() == [9, 0]


def test_any_container():
    p, g = [0.5, 0.25], [1.0, 3.0]
    expected = allocate_budget(p, g, 11).tolist()
    for kind in (tuple, np.array, lambda v: np.array(v, np.float32), torch.tensor):
        assert allocate_budget(kind(p), kind(g), np.int64(11)).tolist() == expected
    assert pyrl.allocate_budget is allocate_budget
    assert allocate_budget(torch.tensor(p).bfloat16(), g, 11).tolist() == expected


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (([0.5, math.nan], [1, 1], 4), {}, r"accept_rate\[1\]=nan: expected a number in \[0, 1\]"),
        (([1.5, 0.5], [1, 1], 4), {}, r"accept_rate\[0\]=1\.5: expected a number in \[0, 1\]"),
        (([0.5, -0.1], [1, 1], 4), {}, r"accept_rate\[1\]=-0\.1"),
        (([0.5], [-2], 4), {}, r"gradient_norm\[0\]=-2\.0: expected a finite number >= 0"),
        (([0.5], [math.inf], 4), {}, r"gradient_norm\[0\]=inf"),
        (([0.5], [1, 2], 4), {}, "gradient_norm: 2 values for 1 prompts"),
        (([[0.5]], [1], 4), {}, r"accept_rate: expected \[n\], got 2 dimensions"),
        (([0.5], [1], -1), {}, "total=-1: expected a whole number >= 0"),
        (([0.5], [1], 2.0), {}, r"total=2\.0: expected a whole number"),
        (([0.5], [1], 2**41), {}, "total=2199023255552: expected at most"),
        (([0.5], [1], 4), {"alpha": 0}, "alpha=0: expected a finite number > 0"),
        (([0.5], [1], 4), {"beta": 1.9}, r"beta=1\.9: expected a finite number >= 2"),
        (([0.5], [1], 4), {"method": "best"}, "method='best': expected one of gvm, neyman"),
        (([0.5], [1], 4), {"minimum": 5}, "total=4: below minimum=5 for each of 1 prompts"),
        (([0.5], [1], 4), {"maximum": 3}, "total=4: above maximum=3 for each of 1 prompts"),
        (([], [], 4), {}, "total=4: above maximum=4 for each of 0 prompts"),
        (([0.5], [1], 4), {"method": "neyman"}, "method='neyman' needs second_moment"),
        (([0.5], [1], 4), {"second_moment": [1]}, "second_moment belongs to method='neyman'"),
        (
            ([0.5], [2], 4),
            {"method": "neyman", "second_moment": [3.9]},
            r"second_moment\[0\]=3\.9: expected at least gradient_norm² = 4\.0",
        ),
    ],
)
def test_bad_input_is_named(args, options, message):
    with pytest.raises(ValueError, match=message):
        allocate_budget(*args, **options)
