"""objective_terms against the float64 oracle and its autograd, metric by metric."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrl.kernels import objective, objective_sums, objective_terms, tuning
from pyrl.ops import objective as oracle
from pyrl.ops import spec as layouts
from pyrl.ops.spec import LossSpec

VECTORS = ("logprob", "entropy", "old", "ref", "rollout", "advantage", "weight")
MISSING = ("old", "ref", "rollout")  # may be NaN in a kept token
INF = math.inf
BLOCK = tuning.OBJECTIVE.block


def test_layouts_are_those_of_the_spec() -> None:
    assert objective.PARAMS == layouts.PARAMS and objective_sums.METRICS == layouts.METRICS
    for name in ("OBJECTIVES", "RATIO_LEVELS", "KLS", "CORRECTIONS", "CORRECTION_LEVELS"):
        assert getattr(objective_terms, name) == getattr(layouts, name)
    assert objective_terms.DIVERGENCES == layouts.DIVERGENCES
    assert set(itertools.chain(*objective_terms.NUMBERS.values())) < set(layouts.PARAMS)
    assert objective_terms._LOG_TINY.value == oracle.LOG_TINY
    assert objective_terms._LOG_HUGE.value == oracle.LOG_HUGE
    assert objective_terms._EXP_CAP.value == oracle.EXP_CAP[torch.float64]


Result = tuple[Tensor, Tensor, Tensor, dict]


def run(vectors: dict, spec: LossSpec, device: torch.device, bounds=None, **numbers) -> Result:
    """`bounds` count where the spec couples tokens; `numbers` replace those of the spec."""
    params = spec.params().clone()
    for name, number in numbers.items():
        params[layouts.PARAMS.index(name)] = number
    arguments = {k: None if v is None else v.to(device) for k, v in vectors.items()}
    couples = spec.couples_tokens and bounds is not None
    loss, c, h, metrics = objective.objective_terms(
        **arguments, bounds=bounds.to(device) if couples else None, params=params
    )
    assert loss.shape == () and loss.dtype == c.dtype == h.dtype == torch.float32
    assert metrics.dtype == torch.float64
    return loss.cpu(), c.cpu(), h.cpu(), dict(zip(layouts.METRICS, metrics.tolist(), strict=True))


def exact(vectors: dict, spec: LossSpec, bounds: Tensor | None = None) -> Result:
    v = {k: v if v is None or k == "keep" else v.double() for k, v in vectors.items()}
    leaves = [v["logprob"].requires_grad_()]
    if v["entropy"] is not None:
        leaves.append(v["entropy"].requires_grad_())
    bounds = bounds if spec.couples_tokens else None
    loss, metrics = oracle.policy_objective_terms(**v, bounds=bounds, spec=spec)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    c, h = (torch.zeros(v["keep"].numel(), dtype=torch.float64) if g is None else g
            for g in (*grads, None)[:2])  # fmt: skip
    return loss.detach(), c, h, dict(zip(layouts.METRICS, metrics.tolist(), strict=True))


def check(
    vectors: dict, spec: LossSpec, device: torch.device, bounds: Tensor | None = None
) -> dict:
    loss, c, h, metrics = run(vectors, spec, device, bounds)
    exact_loss, exact_c, exact_h, exact_metrics = exact(vectors, spec, bounds)
    # Arithmetic is float64 and the outputs are rounded to fp32 once.
    close = {"rtol": 2.0**-23, "atol": 1e-12, "equal_nan": True}
    torch.testing.assert_close(loss.double(), exact_loss, **close)
    torch.testing.assert_close(c.double(), exact_c, **close)
    torch.testing.assert_close(h.double(), exact_h, **close)
    near = {
        k: pytest.approx(v, rel=1e-11, abs=1e-11, nan_ok=True) for k, v in exact_metrics.items()
    }
    assert metrics == near
    return metrics


def random_vectors(T: int, seed: int, kept: float = 0.7, missing: float = 0.2) -> dict:
    """Every value that nothing may read is NaN; a share `missing` of old, ref and rollout is."""
    draw = torch.Generator().manual_seed(seed)
    logprob = -3 * torch.rand(T, generator=draw)
    vectors = {"logprob": logprob, "entropy": torch.rand(T, generator=draw)}
    for name in MISSING:
        vectors[name] = logprob + 0.4 * torch.randn(T, generator=draw)
        vectors[name][torch.rand(T, generator=draw) < missing] = math.nan
    vectors["advantage"] = torch.randint(-2, 3, (T,), generator=draw) * 0.7
    vectors["weight"] = torch.rand(T, generator=draw)
    keep = torch.rand(T, generator=draw) < kept
    for values in vectors.values():
        values[~keep] = math.nan
    return {**vectors, "keep": keep}


def random_bounds(T: int, sequences: int, seed: int) -> Tensor:
    """Sequences of any length, 0 included."""
    draw = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, T + 1, (sequences - 1,), generator=draw).sort().values
    return torch.cat([torch.tensor([0]), inner, torch.tensor([T])])


#: Every objective at every ratio level it has.
RATIOS = [
    {"objective": o, "ratio_level": level}
    for o in layouts.OBJECTIVES
    for level in layouts.RATIO_LEVELS
    if level == "token" or o not in ("gmpo", "vespo", "dppo")
]
#: Every KL with the clamp and the ratio weight on and off.
ANCHORS = [
    {"kl": kl, "kl_coef": 0.3, "kl_clamp": bound, "kl_ratio_weighted": weighted}
    for bound, weighted, kl in itertools.product((None, 0.08), (False, True), layouts.KLS)
]
#: Every correction at every level, with the off-policy mask on and off.
CORRECTED = [
    {"correction": name, "correction_level": level, "off_policy_threshold": threshold}
    for threshold, level, name in itertools.product(
        (None, 0.05), layouts.CORRECTION_LEVELS, layouts.CORRECTIONS[1:]
    )
]
#: All of them met once, and most pairs: the lists' lengths 15, 20 and 18 have few common factors.
COMBINATIONS = [
    {
        **RATIOS[i % len(RATIOS)],
        **ANCHORS[(7 * i) % len(ANCHORS)],
        **CORRECTED[(5 * i) % len(CORRECTED)],
        "clip_low": 0.1,
        "dual_clip": (None, 1.3)[i // 3 % 2],
        "delta": (1.15, None)[i // 2 % 2],
        "dppo_divergence": layouts.DIVERGENCES[i % 2],
        "dppo_low": 0.03,
        "dppo_high": 0.03,
        "cispo_low": 0.8,
        "cispo_high": 1.2,
        "correction_low": 0.7,
        "correction_high": 1.3,
        "entropy_coef": 0.02,
    }
    for i in range(36)
]


def spec_of(options: dict) -> LossSpec:
    if options["objective"] != "clip":  # which alone has these bounds
        options = {k: v for k, v in options.items() if k not in ("dual_clip", "delta")}
    if options["objective"] == "vespo":
        options = {**options, "correction_level": "token"}
    return LossSpec(**options)


def test_the_combinations_meet_every_option() -> None:
    for options in (RATIOS, ANCHORS, CORRECTED):
        assert all(any(o.items() <= c.items() for c in COMBINATIONS) for o in options)


@pytest.mark.parametrize("i", range(len(COMBINATIONS)))
def test_every_option_matches_float64(i: int, device: torch.device) -> None:
    # 30 tokens in 4 sequences, one empty: enough for both sides of every bound.
    check(random_vectors(30, i), spec_of(COMBINATIONS[i]), device, torch.tensor([0, 9, 9, 13, 30]))


NUMBERS = st.fixed_dictionaries(
    {
        "clip_low": st.sampled_from([0.0, 0.2, 1.0]),
        "clip_high": st.sampled_from([0.0, 0.28]),
        "dual_clip": st.sampled_from([None, 1.3, 3.0]),
        "delta": st.sampled_from([None, 0.9, 1.5]),
        "dppo_divergence": st.sampled_from(layouts.DIVERGENCES),
        "entropy_coef": st.sampled_from([0.0, 0.01, -0.5]),
        "correction_low": st.sampled_from([0.0, 0.9]),
    }
)
OPTIONS = (*(st.sampled_from(o) for o in (RATIOS, [{}, *ANCHORS], [{}, *CORRECTED])), NUMBERS)


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 40),
    sequences=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    absent=st.sets(st.sampled_from(["entropy", *MISSING])),
    parts=st.tuples(*OPTIONS),
)
def test_matches_float64(
    T: int, sequences: int, seed: int, kept: float, absent: set, parts: tuple, device: torch.device
) -> None:
    options = {k: v for part in parts for k, v in part.items()}
    if "entropy" in absent:
        options["entropy_coef"] = 0.0
    vectors = {**random_vectors(T, seed, kept), **dict.fromkeys(absent)}
    check(vectors, spec_of(options), device, random_bounds(T, sequences, seed))


@pytest.mark.parametrize("T", [BLOCK, BLOCK + 1, 40 * BLOCK + 3])
def test_many_programs_add_up(T: int, device: torch.device) -> None:
    # The last needs more than one round over the programs' partial sums.
    spec = LossSpec(clip_high=0.28, dual_clip=1.5, kl_coef=0.1, entropy_coef=0.02)
    check(random_vectors(T, T), spec, device)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "clip", "ratio_level": "sequence", "kl_ratio_weighted": True},
        {"objective": "gmpo"},
        {"objective": "vespo", "correction": "tis"},
        {"objective": "sapo", "correction": "mis", "correction_level": "geometric"},
    ],
    ids=lambda o: o["objective"],
)
def test_sequences_longer_than_a_block(options: dict, device: torch.device) -> None:
    block = tuning.SEQUENCE_OBJECTIVE.block
    bounds = torch.tensor([0, 2 * block + 3, 2 * block + 3, 3 * block + 3, 3 * block + 4])
    vectors = random_vectors(int(bounds[-1]), 1)
    # Advantages of one sign a sequence, small steps: a long sequence's ratio stays of order 1.
    vectors["old"] = vectors["logprob"] + 0.02 * (vectors["old"] - vectors["logprob"])
    vectors["rollout"] = vectors["old"] + 0.02 * (vectors["rollout"] - vectors["logprob"])
    spec = LossSpec(**options, off_policy_threshold=0.0, kl_coef=0.1, clip_low=1e-3, clip_high=1e-3)
    check(vectors, spec, device, bounds)


def test_many_sequences_add_up(device: torch.device) -> None:
    # 35 programs: more than one round over their partial sums.
    spec = LossSpec(objective="reinforce", off_policy_threshold=0.0)
    check(random_vectors(70, 2), spec, device, random_bounds(70, 35, 3))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_repeated_launches_agree_bit_for_bit(level: str, device: torch.device) -> None:
    # The second launch finds the counter as the first left it.
    vectors, bounds = random_vectors(5 * BLOCK, 3), torch.tensor([0, 900, 5 * BLOCK])
    spec = LossSpec(ratio_level=level, kl_coef=0.1)
    first, second = (run(vectors, spec, device, bounds) for _ in range(2))
    assert first[0] == second[0] and first[3] == second[3]
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("bounds", [[0], [0, 0, 0], [0, 5], [0, 0, 2, 5]])
@pytest.mark.parametrize("objective_name", ["clip", "gmpo"])
def test_nothing_kept(objective_name: str, bounds: list[int], device: torch.device) -> None:
    T = bounds[-1]
    vectors = random_vectors(T, 0, kept=0.0)
    level = "sequence" if len(bounds) > 2 and objective_name == "clip" else "token"
    more = {"ratio_level": level, "kl_coef": 0.1, "entropy_coef": 0.1, "correction": "tis"}
    spec = spec_of({"objective": objective_name, "dual_clip": 3.0, **more})
    loss, c, h, metrics = run(vectors, spec, device, torch.tensor(bounds))
    assert loss == 0 and c.tolist() == h.tolist() == [0.0] * T
    assert metrics.pop("ratio_min") == -metrics.pop("ratio_max") == INF
    assert metrics.pop("correction_max") == -INF
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF, 1e30])
def test_unkept_tokens_are_not_read(garbage: float, device: torch.device) -> None:
    clean = {name: torch.tensor([-1.0, -1.0]) for name in VECTORS}
    dirty = {name: torch.tensor([-1.0, garbage]) for name in VECTORS}
    keep, bounds = {"keep": torch.tensor([True, False])}, torch.tensor([0, 2])
    for i in range(0, len(COMBINATIONS), 5):
        spec = spec_of(COMBINATIONS[i])
        mine = run({**dirty, **keep}, spec, device, bounds)
        expected = run({**clean, **keep}, spec, device, bounds)
        assert mine[0] == expected[0] and mine[3] == expected[3] and mine[0].isfinite()
        assert mine[1].tolist() == expected[1].tolist() and mine[2].tolist() == expected[2].tolist()


def tokens(A: float, *deltas: float, **more: float) -> dict:
    """Tokens of one advantage with logprob -1 and the given logprob - old."""
    values = {"logprob": -1.0, "advantage": A, "weight": 1.0, **more}
    vectors = {k: torch.full((len(deltas),), v) for k, v in values.items()}
    vectors.setdefault("old", vectors["logprob"] - torch.tensor(deltas))
    keep = torch.ones(len(deltas), dtype=torch.bool)
    return {**dict.fromkeys(VECTORS), **vectors, "keep": keep}


@pytest.mark.parametrize("A", [1.5, -1.5, 0.0])
def test_a_ratio_on_the_bound_keeps_its_gradient(A: float, device: torch.device) -> None:
    # ratio 1 lies on both bounds, exactly; there torch.clamp and torch.minimum give -A.
    spec = LossSpec(clip_low=0.0, clip_high=0.0)
    metrics = check(tokens(A, 0.0), spec, device)
    _, c, _, _ = run(tokens(A, 0.0), spec, device)
    assert c.item() == -A and metrics["clip_low"] == metrics["clip_high"] == 0


@pytest.mark.parametrize(("A", "delta"), [(1.0, 1e-6), (-1.0, -1e-6)])
def test_a_ratio_just_outside_has_none(A: float, delta: float, device: torch.device) -> None:
    spec = LossSpec(clip_low=0.0, clip_high=0.0)
    _, c, _, metrics = run(tokens(A, delta), spec, device)
    assert c.item() == 0 and metrics["clip_low"] + metrics["clip_high"] == 1


def test_a_tie_with_the_dual_clip_halves_the_gradient(device: torch.device) -> None:
    # dual_clip = ratio = 1: torch.minimum's subgradient. LossSpec asks for more than 1, where a
    # tie needs exp(delta) to hit the bound to the last bit.
    _, c, _, metrics = run(tokens(-2.0, 0.0), LossSpec(dual_clip=2.0), device, dual_clip=1.0)
    assert c.item() == 1.0 and metrics["dual_clip"] == 0


#: Values that lie exactly on a bound: deltas whose exp or mean is exact, gaps and weights of 1.
AT_ONE = {"clip_low": 0.0, "clip_high": 0.0}
ONLY_ONE = {"correction_low": 1.0, "correction_high": 1.0}
TIES = {
    "delta caps at the ratio": ({"delta": 1.0, "clip_high": 0.0}, [0.0], {}),
    "delta is the clip's edge": ({"delta": 1.25, "clip_high": 0.25}, [2.0], {}),
    "delta is the dual clip": ({"delta": 2.0, "dual_clip": 2.0}, [2.0], {}),
    "delta inside the clip": ({"delta": 0.9}, [0.0, -0.05, 0.05], {}),
    "delta above the dual clip": ({"delta": 4.0, "dual_clip": 3.0}, [2.0], {}),
    "sequence": ({"ratio_level": "sequence", **AT_ONE}, [0.5, -0.5], {}),
    "sequence_token": ({"ratio_level": "sequence_token", **AT_ONE}, [0.5, -0.5], {}),
    "gmpo": ({"objective": "gmpo", "clip_low": 0.25, "clip_high": 0.25}, [0.25, -0.25, 0.5], {}),
    "cispo": ({"objective": "cispo", "cispo_low": 1.0, "cispo_high": 1.0}, [0.0, 0.1, -0.1], {}),
    "dppo": ({"objective": "dppo", "dppo_low": 0.0, "dppo_high": 0.0}, [0.0, 0.1, -0.1], {}),
    "kl clamp": ({"kl": "k1", "kl_coef": 1.0, "kl_clamp": 0.5}, [0.0], {"ref": -1.5}),
    "kl abs at 0": ({"kl": "abs", "kl_coef": 1.0}, [0.0], {"ref": -1.0}),
    "tis": ({"correction": "tis", "correction_high": 1.0}, [0.0], {"rollout": -1.0}),
    "mis": ({"correction": "mis", **ONLY_ONE}, [0.0], {"rollout": -1.0}),
    "icepop, just outside": ({"correction": "icepop", **ONLY_ONE}, [0.0], {"rollout": -1.0000001}),
    "off-policy": ({"off_policy_threshold": 0.5}, [0.0, 0.0], {"rollout": -0.5}),
    "off-policy, old for rollout": ({"off_policy_threshold": 0.5}, [-0.75, -0.25], {}),
}


@pytest.mark.parametrize("A", [1.5, -1.5, 0.0])
@pytest.mark.parametrize("name", TIES)
def test_ties_follow_the_oracle(name: str, A: float, device: torch.device) -> None:
    options, deltas, fields = TIES[name]
    vectors = tokens(A, *deltas, **fields)
    check(vectors, LossSpec(**options), device, torch.tensor([0, len(deltas)]))


@pytest.mark.parametrize("A", [0.7, -0.7])
@pytest.mark.parametrize("ratio", RATIOS, ids=lambda r: "-".join(r.values()))
def test_an_impossible_token(ratio: dict, A: float, device: torch.device) -> None:
    # A logprob of -inf (a masked logit) has ratio 0; k3 of an infinite log-ratio is nan.
    vectors = tokens(A, 0.1, 0.2, -0.3)
    vectors["logprob"][1] = -INF
    _, c, _, metrics = run(vectors, LossSpec(**ratio), device, torch.tensor([0, 3]))
    assert c.isfinite().all() and metrics["ratio_min"] < 1
    if ratio["ratio_level"] != "sequence_token":  # where the oracle's mean + delta - delta is nan
        check(vectors, LossSpec(**ratio), device, torch.tensor([0, 3]))


def test_missing_ref_has_no_kl_and_missing_old_is_on_policy(device: torch.device) -> None:
    vectors = tokens(2.0, 0.0, old=math.nan, ref=math.nan, rollout=math.nan)
    for options in ({}, {"kl_ratio_weighted": True, "ratio_level": "sequence"}):
        spec = LossSpec(kl_coef=0.5, correction="tis", **options)
        loss, c, _, metrics = run(vectors, spec, device, torch.tensor([0, 1]))
        assert loss.item() == -2.0 and c.item() == -2.0
        assert metrics["nan_old"] == metrics["nan_ref"] == metrics["nan_rollout"] == 1
        assert metrics["kl_loss"] == metrics["correction_sum"] == 0


def test_an_option_that_is_off_cannot_poison_the_loss(device: torch.device) -> None:
    # k3 against ref = inf is inf; with kl_coef = 0 it must not enter as 0 * inf.
    vectors = tokens(2.0, 0.0, ref=INF, entropy=INF)
    loss, c, h, _ = run(vectors, LossSpec(), device)
    assert (loss.item(), c.item(), h.item()) == (-2.0, -2.0, 0.0)


def test_large_ratio_overflows_only_where_it_is_used(device: torch.device) -> None:
    loss, c, _, metrics = run(tokens(1.0, 200.0), LossSpec(clip_high=0.28), device)
    assert loss.item() == pytest.approx(-1.28) and c.item() == 0  # exp(200) > fp32's range
    assert metrics["ratio_max"] == pytest.approx(math.exp(200), rel=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["logprob", "advantage", "weight"])
def test_nan_in_a_kept_token_stays_visible(name: str, level: str, device: torch.device) -> None:
    vectors = tokens(-2.0, 0.3)
    vectors[name] = torch.tensor([math.nan])
    spec = LossSpec(dual_clip=3.0, ratio_level=level)
    loss, c, _, _ = run(vectors, spec, device, torch.tensor([0, 1]))
    assert loss.isnan() and c.isnan().all()


def test_refuses_what_it_would_misread(device: torch.device) -> None:
    vectors, bounds = random_vectors(4, 0), torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"entropy_coef=0\.1 needs entropy"):
        run({**vectors, "entropy": None}, LossSpec(entropy_coef=0.1), device)
    with pytest.raises(ValueError, match="old: expected a contiguous"):
        run({**vectors, "old": torch.zeros(8)[::2]}, LossSpec(), device)
    with pytest.raises(ValueError, match="keep: expected a contiguous"):
        run({**vectors, "keep": torch.ones(4)}, LossSpec(), device)
    with pytest.raises(ValueError, match="bounds: expected a contiguous"):
        run(vectors, LossSpec(objective="gmpo"), device, bounds.int())
    for options in (
        {"ratio_level": "sequence"},
        {"objective": "vespo"},
        {"correction": "mis", "correction_level": "geometric"},
        {"off_policy_threshold": 0.0},
    ):
        with pytest.raises(ValueError, match="couples the tokens of a sequence: bounds expected"):
            run(vectors, LossSpec(**options), device)
    with pytest.raises(NotImplementedError, match=r"'triton': kl number 9 is none of \['k1'"):
        run(vectors, LossSpec(), device, kl=9)
