"""csrc/objective.h through its CPU kernel, against autograd of the float64 definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pyrl import _native
from pyrl.ops.objective import policy_objective_terms
from pyrl.ops.spec import KLS, METRICS, PARAMS, LossSpec

if _native.native_reason() is not None:
    pytest.skip(_native.native_reason(), allow_module_level=True)

objective_terms = torch.ops.pyrl_native.objective_terms
SPECS = {
    f"{o}-{dual}-{kl}-{kl_coef}-{bonus}": LossSpec(
        objective=o, clip_high=0.28, dual_clip=dual, kl=kl, kl_coef=kl_coef, entropy_coef=bonus
    )
    for o, dual, kl, kl_coef, bonus in itertools.product(
        ("reinforce", "clip"), (None, 2.0), KLS, (0.0, 0.05), (0.0, 0.01)
    )
    if not (o == "reinforce" and dual) and (kl_coef or kl == "k3")
}
NAMES = ("logprob", "entropy", "old", "ref", "advantage", "weight", "keep")


def batch(T, seed=0):
    g = torch.Generator().manual_seed(seed)
    logprob = -torch.rand(T, generator=g) * 5
    old = logprob + torch.randn(T, generator=g) * 0.6  # ratios on both sides of every bound
    ref = logprob + torch.randn(T, generator=g) * 0.3
    advantage = torch.randn(T, generator=g)
    advantage[::7] = 0
    entropy, weight = torch.rand(2, T, generator=g)
    keep = torch.rand(T, generator=g) < 0.7
    return dict(zip(NAMES, (logprob, entropy, old, ref, advantage, weight, keep), strict=True))


def check(inputs, spec):
    doubles = [
        None if v is None else v.clone() if v.dtype == torch.bool else v.double()
        for v in inputs.values()
    ]
    leaves = [v.requires_grad_() for v in doubles[:2] if v is not None]
    loss, metrics = policy_objective_terms(*doubles, spec)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    expected = (loss.detach(), *grads, metrics)
    actual = objective_terms(*inputs.values(), spec.params())
    if inputs["entropy"] is None:
        assert (actual[2] == 0).all()
        actual = (*actual[:2], actual[3])
    # The kernel computes in double: what remains is the rounding of its fp32 outputs.
    for name, a, e in zip(("loss", "c", "h"), actual[:-1], expected[:-1], strict=False):
        note = f"{name}: {{}}".format
        torch.testing.assert_close(a.double(), e, rtol=1e-6, atol=1e-12, msg=note)
    for name, a, e in zip(METRICS, actual[-1], metrics, strict=True):
        # atol: exp(d) - d - 1 of the float64 definition cancels at d near 0.
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, msg=f"{name}: {{}}".format)
    return dict(zip(METRICS, actual[-1].tolist(), strict=True)), actual


@pytest.mark.parametrize("name", SPECS)
def test_against_float64(name):
    values, _ = check(batch(3001), SPECS[name])
    assert values["tokens"] > 2000
    if SPECS[name].objective == "clip":
        assert values["clip_low"] > 20 and values["clip_high"] > 20
        assert (values["dual_clip"] > 20) == (SPECS[name].dual_clip is not None)
    else:
        assert values["clip_low"] == values["clip_high"] == values["dual_clip"] == 0


@pytest.mark.parametrize("objective", ("reinforce", "clip"))
@pytest.mark.parametrize("absent", list(itertools.chain(*(
    itertools.combinations(("entropy", "old", "ref"), k) for k in range(1, 4)
))), ids=str)  # fmt: skip
def test_absent_vectors(absent, objective):
    inputs = batch(500, seed=1)
    for name in absent:
        inputs[name] = None
    bonus = 0.01 if "entropy" not in absent else 0.0
    kl_coef = 0.05 if "ref" not in absent else 0.0
    spec = LossSpec(objective=objective, kl_coef=kl_coef, entropy_coef=bonus)
    values, _ = check(inputs, spec)
    assert values["nan_old"] == values["nan_ref"] == 0
    if "old" in absent:
        assert values["ratio_min"] == values["ratio_max"] == 1


def test_missing_old_and_ref_at_some_tokens():
    inputs = batch(400, seed=2)
    inputs["old"][::3] = math.nan
    inputs["ref"][::5] = math.nan
    values, _ = check(inputs, LossSpec(kl_coef=0.05))
    assert values["nan_old"] == inputs["keep"][::3].sum()
    assert values["nan_ref"] == inputs["keep"][::5].sum()


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("name", ("clip-2.0-k3-0.05-0.01", "reinforce-None-k1-0.05-0.01"))
def test_unkept_tokens_are_never_computed_with(name, garbage):
    clean, dirty = batch(600, seed=3), batch(600, seed=3)
    for field in NAMES[:-1]:
        dirty[field][~dirty["keep"]] = garbage
    params = SPECS[name].params()
    expected, actual = (objective_terms(*i.values(), params) for i in (clean, dirty))
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    _, c, h, _ = actual
    assert (c[~dirty["keep"]] == 0).all() and (h[~dirty["keep"]] == 0).all()


@pytest.mark.parametrize("T", (0, 1, 9000))
def test_nothing_kept(T):
    inputs = batch(T)
    inputs["keep"] = torch.zeros(T, dtype=torch.bool)
    loss, c, h, metrics = objective_terms(*inputs.values(), LossSpec(kl_coef=0.1).params())
    assert loss.item() == 0 and not c.any() and not h.any()
    expected = dict.fromkeys(METRICS, 0.0) | {"ratio_min": math.inf, "ratio_max": -math.inf}
    assert dict(zip(METRICS, metrics.tolist(), strict=True)) == expected


def one(advantage, ratio, **spec):
    """c of one token whose ratio is exactly `ratio` (where it is 1)."""
    inputs = batch(1)
    inputs |= {
        "logprob": torch.tensor([math.log(ratio) if ratio != 1 else 0.0]),
        "old": torch.zeros(1),
        "advantage": torch.tensor([float(advantage)]),
        "weight": torch.ones(1),
        "keep": torch.ones(1, dtype=torch.bool),
    }
    values, actual = check(inputs, LossSpec(**spec))
    return actual[1].item(), values


@pytest.mark.parametrize("advantage", (1.0, -1.0))
def test_the_bounds_themselves_carry_the_whole_gradient(advantage):
    """clip_low = clip_high = 0: a ratio of exactly 1 is on both bounds."""
    c, values = one(advantage, 1, clip_low=0.0, clip_high=0.0)
    assert c == -advantage
    assert values["clip_low"] == values["clip_high"] == 0


@pytest.mark.parametrize(
    ("advantage", "ratio", "clipped"),
    ((1, 1.5, True), (1, 0.5, False), (-1, 0.5, True), (-1, 1.5, False)),
)
def test_only_the_pessimistic_side_is_clipped(advantage, ratio, clipped):
    c, values = one(advantage, ratio)
    assert (c == 0) == clipped
    assert values["clip_high"] == (advantage > 0 and clipped)
    assert values["clip_low"] == (advantage < 0 and clipped)


def test_dual_clip_counts_and_stops_the_gradient():
    c, values = one(-1, 4.0, dual_clip=3.0)
    assert c == 0 and values["dual_clip"] == 1 and values["policy_loss"] == 3
    c, values = one(-1, 2.0, dual_clip=3.0)
    assert c == pytest.approx(2.0) and values["dual_clip"] == 0


def test_blocks_and_threads_do_not_change_the_sums():
    """More tokens than several blocks, any number of threads: the same bits."""
    inputs, params = batch(50_001), LossSpec(kl_coef=0.1).params()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(objective_terms(*inputs.values(), params))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_overflowing_kl_that_is_off_leaves_the_loss_finite():
    inputs = batch(4)
    inputs["keep"][:] = True
    inputs["ref"] = inputs["logprob"] + 1e4
    loss, c, _, metrics = objective_terms(*inputs.values(), LossSpec(kl_coef=0.0).params())
    assert loss.isfinite() and c.isfinite().all()
    assert metrics[METRICS.index("kl_k3_sum")] == math.inf


def test_the_layout_is_the_spec_s():
    """csrc/objective.h counts both vectors; a longer spec.py must not be read short."""
    inputs = batch(3)
    with pytest.raises(RuntimeError, match=rf"params must have shape \[{len(PARAMS)}\]"):
        objective_terms(*inputs.values(), torch.zeros(len(PARAMS) + 1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="params must be float64"):
        objective_terms(*inputs.values(), torch.zeros(len(PARAMS)))
    assert objective_terms(*inputs.values(), LossSpec().params())[3].shape == (len(METRICS),)
    with pytest.raises(RuntimeError, match=r"weight must have shape \[3\]"):
        objective_terms(*{**inputs, "weight": torch.ones(2)}.values(), LossSpec().params())


def test_opcheck():
    for inputs in (batch(5), {**batch(5), "entropy": None, "old": None, "ref": None}):
        torch.library.opcheck(objective_terms, (*inputs.values(), LossSpec().params()))
