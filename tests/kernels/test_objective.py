"""objective_terms against float64 torch and autograd, metric by metric."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrl.kernels import objective
from pyrl.kernels.tuning import OBJECTIVE as TILE
from pyrl.ops import spec

VECTORS = ("logprob", "entropy", "old", "ref", "advantage", "weight")


def test_layouts_are_those_of_the_spec() -> None:
    assert objective.PARAMS == spec.PARAMS and objective.METRICS == spec.METRICS
    assert objective.OBJECTIVES == spec.OBJECTIVES and objective.KLS == spec.KLS


def options(**changes: float | str) -> dict:
    plain = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 0.0, "kl_coef": 0.0}
    return {"objective": "clip", "kl": "k3", "entropy_coef": 0.0, **plain, **changes}


def run(vectors: dict, o: dict, device: torch.device) -> tuple[Tensor, Tensor, Tensor, dict]:
    numbers = {
        **o,
        "objective": spec.OBJECTIVES.index(o["objective"]),
        "kl": spec.KLS.index(o["kl"]),
    }
    params = torch.tensor([float(numbers[name]) for name in spec.PARAMS], dtype=torch.float64)
    arguments = {k: None if v is None else v.to(device) for k, v in vectors.items()}
    loss, c, h, metrics = objective.objective_terms(**arguments, params=params)
    assert loss.shape == () and loss.dtype == c.dtype == h.dtype == torch.float32
    assert metrics.dtype == torch.float64
    named = dict(zip(spec.METRICS, metrics.tolist(), strict=True))
    return loss.cpu(), c.cpu(), h.cpu(), named


def reference(vectors: dict, o: dict) -> tuple[Tensor, Tensor, Tensor, dict]:
    """The kept tokens alone, in float64: gradients from autograd, put back into [T]."""
    keep = vectors["keep"]
    v = {k: None if vectors[k] is None else vectors[k][keep].double() for k in VECTORS}
    logp = v["logprob"].requires_grad_()
    entropy = torch.zeros_like(logp) if v["entropy"] is None else v["entropy"]
    entropy.requires_grad_()
    A, w = v["advantage"], v["weight"]

    given_old = torch.full_like(logp, math.nan).detach() if v["old"] is None else v["old"]
    old = torch.where(given_old.isnan(), logp.detach(), given_old)
    given_ref = torch.full_like(logp, math.nan).detach() if v["ref"] is None else v["ref"]
    has_ref = ~given_ref.isnan()
    d = torch.where(has_ref, torch.nan_to_num(given_ref) - logp, 0.0)
    ratio = (logp - old).exp()
    low, high = 1 - o["clip_low"], 1 + o["clip_high"]
    if o["objective"] == "reinforce":
        policy = -A * logp
    else:
        policy = -torch.minimum(ratio * A, ratio.clamp(low, high) * A)
        if o["dual_clip"]:
            policy = torch.where(A < 0, torch.minimum(policy, -o["dual_clip"] * A), policy)
    k3 = d.exp() - d - 1
    kl = torch.where(has_ref, {"k1": -d, "k2": d * d / 2, "k3": k3}[o["kl"]], 0.0)
    terms = {
        "policy_loss": (w * policy).sum(),
        "kl_loss": o["kl_coef"] * (w * kl).sum(),
        "entropy_loss": -o["entropy_coef"] * (w * entropy).sum(),
    }
    loss = sum(terms.values())
    grads = torch.autograd.grad(loss, (logp, entropy))
    c, h = (torch.zeros(keep.numel(), dtype=torch.float64) for _ in range(2))
    c[keep], h[keep] = grads

    clips = o["objective"] == "clip"
    d_old = old - logp
    metrics = {
        "tokens": keep.sum(),
        **terms,
        "logprob_sum": logp.sum(),
        "entropy_sum": entropy.sum(),
        "kl_k1_sum": -d.sum(),
        "kl_k3_sum": k3.sum(),
        "old_kl_sum": (d_old.exp() - d_old - 1).sum(),
        "ratio_sum": ratio.sum(),
        "ratio_sq_sum": (ratio * ratio).sum(),
        "ratio_min": ratio.min() if logp.numel() else math.inf,
        "ratio_max": ratio.max() if logp.numel() else -math.inf,
        "clip_low": clips * ((A < 0) & (ratio < low)).sum(),
        "clip_high": clips * ((A > 0) & (ratio > high)).sum(),
        "dual_clip": clips
        * bool(o["dual_clip"])
        * ((A < 0) & (-ratio * A > -o["dual_clip"] * A)).sum(),
        "zero_advantage": (A == 0).sum(),
        "nan_old": 0 if v["old"] is None else given_old.isnan().sum(),
        "nan_ref": 0 if v["ref"] is None else given_ref.isnan().sum(),
    }
    return loss.detach(), c, h, {k: float(torch.as_tensor(v).detach()) for k, v in metrics.items()}


def check(vectors: dict, o: dict, device: torch.device) -> None:
    loss, c, h, metrics = run(vectors, o, device)
    exact_loss, exact_c, exact_h, exact_metrics = reference(vectors, o)
    # Arithmetic is float64 and the outputs are rounded to fp32 once.
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2.0**-23, atol=1e-12)
    torch.testing.assert_close(c.double(), exact_c, rtol=2.0**-23, atol=1e-12)
    torch.testing.assert_close(h.double(), exact_h, rtol=2.0**-23, atol=1e-12)
    assert metrics == {k: pytest.approx(v, rel=1e-11, abs=1e-11) for k, v in exact_metrics.items()}


def random_vectors(T: int, seed: int, kept: float = 0.7, missing: float = 0.2) -> dict:
    """Every value that nothing may read is NaN; `missing` of old and ref are NaN where kept."""
    draw = torch.Generator().manual_seed(seed)
    logprob = -3 * torch.rand(T, generator=draw)
    vectors = {
        "logprob": logprob,
        "entropy": torch.rand(T, generator=draw),
        "old": logprob + 0.4 * torch.randn(T, generator=draw),
        "ref": logprob + 0.4 * torch.randn(T, generator=draw),
        "advantage": torch.randint(-2, 3, (T,), generator=draw) * 0.7,
        "weight": torch.rand(T, generator=draw),
    }
    for name in ("old", "ref"):
        vectors[name][torch.rand(T, generator=draw) < missing] = math.nan
    keep = torch.rand(T, generator=draw) < kept
    for values in vectors.values():
        values[~keep] = math.nan
    return {**vectors, "keep": keep}


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
    absent=st.sets(st.sampled_from(["entropy", "old", "ref"])),
    o=st.fixed_dictionaries(
        {
            "objective": st.sampled_from(spec.OBJECTIVES),
            "clip_low": st.sampled_from([0.0, 0.2, 1.0]),
            "clip_high": st.sampled_from([0.0, 0.28]),
            "dual_clip": st.sampled_from([0.0, 1.3, 3.0]),
            "kl": st.sampled_from(spec.KLS),
            "kl_coef": st.sampled_from([0.0, 0.04]),
            "entropy_coef": st.sampled_from([0.0, 0.01, -0.5]),
        }
    ),
)
def test_matches_float64(
    T: int, seed: int, kept: float, absent: set, o: dict, device: torch.device
) -> None:
    vectors = random_vectors(T, seed, kept)
    if "entropy" in absent:
        o = {**o, "entropy_coef": 0.0}
    check({**vectors, **dict.fromkeys(absent)}, o, device)


@pytest.mark.parametrize("T", [TILE.block, TILE.block + 1, 40 * TILE.block + 3])
def test_many_programs_add_up(T: int, device: torch.device) -> None:
    # The last needs more than one round over the programs' partial sums.
    o = options(dual_clip=1.5, kl_coef=0.1, entropy_coef=0.02)
    check(random_vectors(T, T), o, device)


def test_repeated_launches_agree_bit_for_bit(device: torch.device) -> None:
    # The second launch finds the counter as the first left it.
    vectors, o = random_vectors(5 * TILE.block, 3), options(kl_coef=0.1)
    first, second = run(vectors, o, device), run(vectors, o, device)
    assert first[0] == second[0] and first[3] == second[3]
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("T", [0, 5])
def test_nothing_kept(T: int, device: torch.device) -> None:
    vectors = random_vectors(T, 0, kept=0.0)
    o = options(dual_clip=3.0, kl_coef=0.1, entropy_coef=0.1)
    loss, c, h, metrics = run(vectors, o, device)
    assert loss == 0 and c.tolist() == h.tolist() == [0.0] * T
    assert metrics.pop("ratio_min") == math.inf and metrics.pop("ratio_max") == -math.inf
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_unkept_tokens_are_not_read(garbage: float, device: torch.device) -> None:
    clean = {name: torch.tensor([-1.0, -1.0]) for name in VECTORS}
    dirty = {name: torch.tensor([-1.0, garbage]) for name in VECTORS}
    keep = {"keep": torch.tensor([True, False])}
    for objective_name in spec.OBJECTIVES:
        o = options(objective=objective_name, dual_clip=2.0, kl_coef=0.1, entropy_coef=0.1)
        mine, expected = run({**dirty, **keep}, o, device), run({**clean, **keep}, o, device)
        assert mine[0] == expected[0] and mine[3] == expected[3] and mine[0].isfinite()
        assert mine[1].tolist() == expected[1].tolist() and mine[2].tolist() == expected[2].tolist()


def one_token(A: float, delta: float = 0.0, **more: float) -> dict:
    values = {"logprob": -1.0, "old": -1.0 - delta, "advantage": A, "weight": 1.0, **more}
    vectors = {name: torch.tensor([values[name]]) if name in values else None for name in VECTORS}
    return {**vectors, "keep": torch.tensor([True])}


@pytest.mark.parametrize("A", [1.5, -1.5, 0.0])
def test_a_ratio_on_the_bound_keeps_its_gradient(A: float, device: torch.device) -> None:
    # ratio 1 lies on both bounds, exactly; there torch.clamp and torch.minimum give -A.
    o = options(clip_low=0.0, clip_high=0.0)
    check(one_token(A), o, device)
    _, c, _, metrics = run(one_token(A), o, device)
    assert c.item() == -A and metrics["clip_low"] == metrics["clip_high"] == 0


@pytest.mark.parametrize(("A", "delta"), [(1.0, 1e-6), (-1.0, -1e-6)])
def test_a_ratio_just_outside_has_none(A: float, delta: float, device: torch.device) -> None:
    _, c, _, metrics = run(one_token(A, delta), options(clip_low=0.0, clip_high=0.0), device)
    assert c.item() == 0 and metrics["clip_low"] + metrics["clip_high"] == 1


def test_a_tie_with_the_dual_clip_halves_the_gradient(device: torch.device) -> None:
    # dual_clip = ratio = 1: torch.minimum's subgradient. LossSpec asks for more than 1, where a
    # tie needs exp(delta) to hit the bound to the last bit.
    o = options(dual_clip=1.0)
    check(one_token(-2.0), o, device)
    _, c, _, metrics = run(one_token(-2.0), o, device)
    assert c.item() == 1.0 and metrics["dual_clip"] == 0


def test_missing_ref_has_no_kl_and_missing_old_is_on_policy(device: torch.device) -> None:
    vectors = one_token(2.0, old=math.nan, ref=math.nan)
    loss, c, _, metrics = run(vectors, options(kl_coef=0.5), device)
    assert loss.item() == -2.0 and c.item() == -2.0
    assert metrics["nan_old"] == metrics["nan_ref"] == 1 and metrics["kl_loss"] == 0


def test_an_option_that_is_off_cannot_poison_the_loss(device: torch.device) -> None:
    # k3 against ref = inf is inf; with kl_coef = 0 it must not enter as 0 * inf.
    vectors = one_token(2.0, ref=math.inf, entropy=math.inf)
    loss, c, h, _ = run(vectors, options(), device)
    assert (loss.item(), c.item(), h.item()) == (-2.0, -2.0, 0.0)


def test_large_ratio_overflows_only_where_it_is_used(device: torch.device) -> None:
    loss, c, _, metrics = run(one_token(1.0, 200.0), options(), device)  # exp(200) > fp32's range
    assert loss.item() == pytest.approx(-1.28) and c.item() == 0
    assert metrics["ratio_max"] == pytest.approx(math.exp(200), rel=1e-12)


@pytest.mark.parametrize("name", ["logprob", "advantage", "weight"])
def test_nan_in_a_kept_token_stays_visible(name: str, device: torch.device) -> None:
    vectors = one_token(-2.0, 0.3)
    vectors[name] = torch.tensor([math.nan])
    loss, c, _, _ = run(vectors, options(dual_clip=3.0), device)
    assert loss.isnan() and c.isnan().all()


def test_refuses_what_it_would_misread(device: torch.device) -> None:
    vectors = random_vectors(4, 0)
    with pytest.raises(ValueError, match=r"entropy_coef=0\.1 needs entropy"):
        run({**vectors, "entropy": None}, options(entropy_coef=0.1), device)
    with pytest.raises(ValueError, match="old: expected a contiguous"):
        run({**vectors, "old": torch.zeros(8)[::2]}, options(), device)
    with pytest.raises(ValueError, match="keep: expected a contiguous"):
        run({**vectors, "keep": torch.ones(4)}, options(), device)
