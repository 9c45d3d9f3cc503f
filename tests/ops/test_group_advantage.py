"""group_advantage: the oracle against plain Python, every backend against the oracle."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrl
from pyrl.ops.group_advantage import FILTERS, METHODS, METRICS
from pyrl.parity import DEVICE, MARGIN, relative, serving

NAN = float("nan")
BATCH_METHODS = ("batch_std", "whiten", "whiten_baseline")

rewards_of_a_group = st.lists(
    st.sampled_from([0.0, 1.0, -1.0, 0.25, 0.1, 100.5, NAN]), min_size=1, max_size=9
)
options = st.fixed_dictionaries(
    {
        "method": st.sampled_from(METHODS),
        "unbiased": st.booleans(),
        "eps": st.sampled_from([1e-6, 1e-4, 0.0]),
        "filter": st.lists(st.sampled_from(FILTERS), unique=True).map(tuple),
        "filter_mode": st.sampled_from(["zero", "drop"]),
        "reward_map": st.sampled_from([None, (-1.0, 1.0), (2.0, -1.0), (0.0, 10.0)]),
    }
)


def flat(groups, seed=0):
    """Rewards and ids of the groups, shuffled; ids neither dense nor sorted."""
    rewards = torch.tensor([r for g in groups for r in g])
    ids = torch.tensor([5 - 37 * i for i, g in enumerate(groups) for _ in g], dtype=torch.int64)
    shuffle = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    return rewards[shuffle].to(DEVICE), ids[shuffle].to(DEVICE)


def spread(values, unbiased):
    """Standard deviation; 1 for one value, as its mean is 0."""
    if len(values) < 2:
        return 1.0
    return (statistics.stdev if unbiased else statistics.pstdev)(values)


def normalised(value, mean, std, eps):
    return 0.0 if value == mean else (value - mean) / (std + eps)


def within_group(r, x, method, unbiased, eps):
    """The value of one mapped reward among the mapped rewards x of its group."""
    mean = statistics.fmean(x) if len(x) > 1 else 0.0  # of equal fp32 numbers: exact
    if method == "grpo":
        return normalised(r, mean, spread(x, unbiased), eps)
    if method == "scaled":
        equal = len(x) > 1 and min(x) == max(x)
        return 0.0 if equal else r / (spread(x, unbiased) + eps)
    if method == "rloo":
        return 0.0 if len(x) == 1 else r - (math.fsum(x) - r) / (len(x) - 1)
    if method == "positive":
        return float(r == max(x))
    if method == "correct":
        return float(r > 0)
    return r if method in ("raw", "whiten") else r - mean


def is_filtered(given, filter):
    return bool(given) and (
        ("drop_all_correct" in filter and min(given) > 0)
        or ("drop_all_wrong" in filter and max(given) <= 0)
        or ("drop_zero_std" in filter and min(given) == max(given))
    )


def naive(groups, method, unbiased, eps, filter, filter_mode, reward_map):
    """Advantages and keep of lists of rewards, as the papers write them, in Python floats."""
    a, b = reward_map or (0.0, 1.0)
    rows = []  # reward as given, mapped, value within its group, filtered
    for group in groups:
        given = [r for r in group if not math.isnan(r)]
        x = [a + (b - a) * r for r in given]
        gone = is_filtered(given, filter)
        for r in group:
            mapped = a + (b - a) * r
            value = NAN if math.isnan(r) else within_group(mapped, x, method, unbiased, eps)
            rows.append((r, mapped, value, gone))
    keep = [not math.isnan(r) and not (gone and filter_mode == "drop") for r, _, _, gone in rows]
    values = [value for _, _, value, _ in rows]
    if method in BATCH_METHODS:
        batch = [
            mapped if method == "batch_std" else value
            for kept, (_, mapped, value, _) in zip(keep, rows, strict=True)
            if kept
        ]
        equal = len(batch) > 1 and min(batch) == max(batch)
        mean = statistics.fmean(batch) if len(batch) > 1 and method != "batch_std" else 0.0
        std = spread(batch, unbiased)
        values = [0.0 if equal else normalised(value, mean, std, eps) for value in values]
    return [
        0.0 if gone or math.isnan(r) else value
        for value, (r, _, _, gone) in zip(values, rows, strict=True)
    ], keep


@settings(max_examples=150, deadline=None)
@given(groups=st.lists(rewards_of_a_group, max_size=7), options=options)
def test_the_oracle_is_the_papers(groups, options):
    # As fp32 holds them: 0.1 has two values otherwise.
    groups = [torch.tensor(g).tolist() for g in groups]
    rewards = torch.tensor([r for g in groups for r in g], dtype=torch.float64)
    offsets = torch.tensor([0, *(len(g) for g in groups)]).cumsum(0)
    got = pyrl.group_advantage(rewards, group_offsets=offsets, backend="reference", **options)
    advantages, keep = naive(groups, **options)
    assert got.keep.tolist() == keep
    # One rounding to fp32; a whitened value is exact to the spread of the batch.
    torch.testing.assert_close(got.advantages, torch.tensor(advantages), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", serving())
@settings(max_examples=60, deadline=None)
@given(groups=st.lists(rewards_of_a_group, max_size=7), options=options, seed=st.integers(0, 99))
def test_property_parity(backend, groups, options, seed):
    rewards, ids = flat(groups, seed)
    exact = pyrl.group_advantage(rewards, ids, backend="reference", **options)
    plain = pyrl.group_advantage(rewards, ids, backend="torch", **options)
    ours = pyrl.group_advantage(rewards, ids, backend=backend, **options)
    bound = relative(plain.advantages, exact.advantages) + MARGIN[torch.float32]
    assert relative(ours.advantages, exact.advantages) <= bound
    assert torch.equal(ours.keep, exact.keep)
    for name, value in exact.metrics.items():
        torch.testing.assert_close(ours.metrics[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("method", METHODS)
def test_offsets_equal_ids_bit_for_bit(backend, method):
    groups = [[0.3, 0.7, 0.1], [], [1.0], [0.2] * 5, [NAN, 0.4], [], [NAN]]
    rewards = torch.tensor([r for g in groups for r in g], device=DEVICE)
    offsets = torch.tensor([0, *(len(g) for g in groups)], device=DEVICE).cumsum(0)
    ids = torch.arange(len(groups), device=DEVICE).repeat_interleave(offsets.diff())
    by_offsets = pyrl.group_advantage(
        rewards, group_offsets=offsets, method=method, backend=backend
    )
    by_ids = pyrl.group_advantage(rewards, ids, method=method, backend=backend)
    backwards = pyrl.group_advantage(rewards.flip(0), -ids.flip(0), method="raw", backend=backend)
    assert torch.equal(by_offsets.advantages, by_ids.advantages)
    assert torch.equal(by_offsets.keep, by_ids.keep)
    # Empty groups do not count.
    assert by_offsets.metrics == by_ids.metrics and by_ids.metrics["groups"] == 5
    assert torch.equal(backwards.keep.flip(0), by_ids.keep)


@pytest.mark.parametrize("backend", serving())
def test_closed_forms(backend):
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 7.0, NAN, 2.0], device=DEVICE)
    ids = torch.tensor([0, 0, 0, 0, 4, 4, 2], device=DEVICE)
    out = pyrl.group_advantage(rewards, ids, backend=backend)
    a = 0.5 / ((1 / 3) ** 0.5 + 1e-6)
    # A group of one has mean 0 and std 1, whether born so or left so by a NaN.
    expected = torch.tensor([a, -a, -a, a, 7.0 / (1 + 1e-6), 0.0, 2.0 / (1 + 1e-6)])
    torch.testing.assert_close(out.advantages.cpu(), expected)
    assert out.keep.tolist() == [True] * 5 + [False, True]
    values = [out.metrics[name].item() for name in METRICS]
    assert values == [7, 3, 2, 0, 1, 11, 1 + 1 + 49 + 4, 6]


@pytest.mark.parametrize("backend", serving())
def test_closed_forms_of_the_batch(backend):
    # Groups (0, 2) and (4, 4): all four have mean 2.5 and squared deviations 6.25 + .25 + 2 2.25.
    rewards = torch.tensor([0.0, 2.0, 4.0, 4.0], device=DEVICE)
    ids = torch.tensor([0, 0, 1, 1], device=DEVICE)
    of_all, of_x = (11 / 3) ** 0.5, (2 / 3) ** 0.5
    for method, expected in {
        "batch_std": [-1 / of_all, 1 / of_all, 0, 0],
        "whiten": [-2.5 / of_all, -0.5 / of_all, 1.5 / of_all, 1.5 / of_all],
        "whiten_baseline": [-1 / of_x, 1 / of_x, 0, 0],
    }.items():
        out = pyrl.group_advantage(rewards, ids, method=method, eps=0.0, backend=backend)
        torch.testing.assert_close(out.advantages.cpu(), torch.tensor(expected))


@pytest.mark.parametrize("backend", serving())
def test_as_verl_defines_them(backend):
    """verl's outcome estimators with responses of one token: group mean 0 where the group has one
    sample, and whitening by the unbiased variance + 1e-8 (here added to eps's place: none)."""
    g = torch.Generator().manual_seed(3)
    rewards = torch.randn(24, generator=g).to(DEVICE)
    ids = torch.randint(7, (24,), generator=g).to(DEVICE)
    ids[0] = 99  # alone
    r = rewards.double()
    mean = torch.stack([r[ids == i].mean() if (ids == i).sum() > 1 else 0 * r[0] for i in ids])
    size = torch.stack([(ids == i).sum() for i in ids])

    def whitened(x):
        return (x - x.mean()) * (x.var(correction=1) + 1e-8).rsqrt()

    for method, expected in {
        "whiten": whitened(r),
        "whiten_baseline": whitened(r - mean),
        "rloo": torch.where(size > 1, (r - mean) * size / (size - 1).clamp(min=1), 0.0),
    }.items():
        out = pyrl.group_advantage(rewards, ids, method=method, eps=0.0, backend=backend)
        # 1e-8 in the variance moves the result by half of that, relatively.
        torch.testing.assert_close(out.advantages.double(), expected, rtol=1e-6, atol=1e-7)
