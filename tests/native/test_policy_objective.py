"""csrc/objective.h through its CPU kernel, against autograd of the float64 definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pyrl import _native
from pyrl.ops.objective import policy_objective_terms
from pyrl.ops.spec import (
    CORRECTION_LEVELS,
    CORRECTIONS,
    DIVERGENCES,
    KLS,
    METRICS,
    OBJECTIVES,
    PARAMS,
    RATIO_LEVELS,
    LossSpec,
)

if _native.native_reason() is not None:
    pytest.skip(_native.native_reason(), allow_module_level=True)

objective_terms = torch.ops.pyrl_native.objective_terms
NAMES = ["logprob", "entropy", "old", "ref", "rollout", "advantage", "weight", "keep", "bounds"]
OWN_RATIO = ("gmpo", "vespo", "dppo")
#: Every objective at every ratio level it has, and both divergences of dppo.
POLICIES = {
    f"{objective}-{level}": {"objective": objective, "ratio_level": level}
    for objective, level in itertools.product(OBJECTIVES, RATIO_LEVELS)
    if level == "token" or objective not in OWN_RATIO
} | {f"dppo-{d}": {"objective": "dppo", "dppo_divergence": d} for d in DIVERGENCES[1:]}
#: Bounds that the batch below crosses on both sides, per token and per sequence.
NARROW = {
    "clip_low": 0.05,
    "clip_high": 0.06,
    "cispo_low": 0.95,
    "cispo_high": 1.06,
    "dppo_low": 0.01,
    "dppo_high": 0.01,
    "correction_low": 0.96,
    "correction_high": 1.05,
}


def batch(T, seed=0):
    """Ragged sequences of up to 30 tokens: none, one or all of them masked; empty ones around."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 31, (T // 8 + 2,), generator=g)
    bounds = torch.cat([torch.zeros(2, dtype=torch.int64), lengths.cumsum(0).clamp(max=T)])
    bounds[-1] = T
    logprob = -torch.rand(T, generator=g) * 5
    old = logprob + torch.randn(T, generator=g) * 0.3
    rollout = old + torch.randn(T, generator=g) * 0.2
    ref = logprob + torch.randn(T, generator=g) * 0.3
    advantage = torch.randn(T, generator=g)
    advantage[::7] = 0
    entropy, weight = torch.rand(2, T, generator=g)
    keep = torch.rand(T, generator=g) < 0.7
    masked = len(bounds) // 3
    keep[bounds[masked] : bounds[masked + 1]] = False
    fields = (logprob, entropy, old, ref, rollout, advantage, weight, keep, bounds)
    return dict(zip(NAMES, fields, strict=True))


def terms(inputs, spec):
    """The kernel's outputs; sequences are given exactly where the spec couples tokens."""
    inputs = inputs if spec.couples_tokens else {**inputs, "bounds": None}
    return objective_terms(*inputs.values(), spec.params())


def definition(inputs, spec):
    """Loss, d loss / d logprob, d loss / d entropy where one is given, and metrics in float64."""
    doubles = [
        v.double() if v is not None and v.is_floating_point() else v for v in inputs.values()
    ]
    if not spec.couples_tokens:
        doubles[-1] = None
    leaves = [v.requires_grad_() for v in doubles[:2] if v is not None]
    loss, metrics = policy_objective_terms(*doubles, spec)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), *grads, metrics


def check(inputs, spec):
    expected = definition(inputs, spec)
    actual = terms(inputs, spec)
    compared = actual
    if inputs["entropy"] is None:
        assert (actual[2] == 0).all()
        compared = (*actual[:2], actual[3])
    # The kernel computes in double: what remains is the rounding of its fp32 outputs.
    for name, a, e in zip(("loss", "c", "h"), compared[:-1], expected[:-1], strict=False):
        note = f"{spec}\n{name}: {{}}".format
        torch.testing.assert_close(a.double(), e, rtol=1e-6, atol=1e-12, msg=note)
    for name, a, e in zip(METRICS, actual[-1], expected[-1], strict=True):
        # atol: exp(d) - d - 1 of the float64 definition cancels at d near 0.
        note = f"{spec}\n{name}: {{}}".format
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, msg=note)
    return dict(zip(METRICS, actual[-1].tolist(), strict=True)), actual


@pytest.mark.parametrize("name", POLICIES)
def test_policy_and_kl(name):
    """Every policy term with every KL estimate, clamped, weighted by the ratio, or both."""
    inputs = batch(700)
    kls = [{}] + [
        {"kl": kl, "kl_coef": 0.05, "kl_clamp": clamp, "kl_ratio_weighted": weighted}
        for kl, clamp, weighted in itertools.product(KLS, (None, 0.03), (False, True))
    ]
    for kl, bonus in itertools.product(kls, (0.0, 0.01)):
        values, _ = check(inputs, LossSpec(**POLICIES[name], **NARROW, **kl, entropy_coef=bonus))
        assert values["tokens"] == inputs["keep"].sum() > 400
        if name.startswith(("clip", "cispo", "gmpo", "dppo")):
            assert values["clip_low"] > 20 and values["clip_high"] > 20
        else:
            assert values["clip_low"] == values["clip_high"] == 0


@pytest.mark.parametrize("name", POLICIES)
def test_corrections_and_off_policy_sequences(name):
    inputs = batch(700, seed=1)
    inputs["rollout"][::9] = math.nan
    unscored = slice(*inputs["bounds"][10:12])
    inputs["rollout"][unscored] = math.nan
    for kind, level, threshold in itertools.product(
        CORRECTIONS, CORRECTION_LEVELS, (None, 0.02, -0.05)
    ):
        if level != "token" and (kind == "none" or name.startswith("vespo")):
            continue
        correction = {"correction": None if kind == "none" else kind, "correction_level": level}
        spec = LossSpec(
            **POLICIES[name], **NARROW, **correction, off_policy_threshold=threshold,
            kl_coef=0.05, kl_ratio_weighted=True,
        )  # fmt: skip
        values, _ = check(inputs, spec)
        assert (values["correction_masked"] > 20) == (kind in ("mis", "icepop"))
        assert (values["off_policy_masked"] > 20) == (threshold is not None)
        assert values["nan_rollout"] == (inputs["keep"] & inputs["rollout"].isnan()).sum()


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_dual_clip_and_delta_together(level):
    inputs = batch(700, seed=2)
    for dual, delta in itertools.product((None, 1.02, 1.04), (None, 0.5, 1.01, 1.03)):
        spec = LossSpec(**NARROW, ratio_level=level, dual_clip=dual, delta=delta)
        values, _ = check(inputs, spec)
        assert (values["dual_clip"] > 0) == (dual is not None and (delta or 9) > dual)


@pytest.mark.parametrize("name", POLICIES)
def test_absent_vectors(name):
    for k in range(1, 5):
        for absent in itertools.combinations(("entropy", "old", "ref", "rollout"), k):
            inputs = batch(300, seed=3) | dict.fromkeys(absent)
            spec = LossSpec(
                **POLICIES[name],
                **NARROW,
                entropy_coef=0.0 if "entropy" in absent else 0.01,
                kl_coef=0.0 if "ref" in absent else 0.05,
                correction=None if "rollout" in absent else "icepop",
                off_policy_threshold=0.01,
            )
            values, _ = check(inputs, spec)
            assert values["nan_old"] == values["nan_ref"] == values["nan_rollout"] == 0
            if "old" in absent:
                assert values["ratio_min"] == values["ratio_max"] == 1


@pytest.mark.parametrize("name", POLICIES)
def test_missing_log_probs_at_some_tokens(name):
    inputs = batch(400, seed=4)
    for step, field in ((3, "old"), (5, "ref"), (4, "rollout")):
        inputs[field][::step] = math.nan
    for level in CORRECTION_LEVELS[: 1 if "vespo" in name else 3]:
        spec = LossSpec(
            **POLICIES[name], kl_coef=0.05, kl_ratio_weighted=True, correction="mis",
            correction_level=level, off_policy_threshold=0.0,
        )  # fmt: skip
        values, _ = check(inputs, spec)
        for step, field in ((3, "old"), (5, "ref"), (4, "rollout")):
            assert values[f"nan_{field}"] == inputs["keep"][::step].sum()


#: Every branch of the kernel in a few specs.
MIXED = {
    "clip": LossSpec(dual_clip=2.0, kl_coef=0.05, entropy_coef=0.01),
    "reinforce": LossSpec(objective="reinforce", kl="k1", kl_coef=0.05, correction="tis"),
    "gspo": LossSpec.preset("gspo", kl_coef=0.05, kl_ratio_weighted=True, entropy_coef=0.01),
    "gmpo": LossSpec.preset("gmpo", correction="mis", correction_level="sequence"),
    "vespo": LossSpec.preset("vespo", correction="tis", off_policy_threshold=0.1),
    "dppo": LossSpec.preset("dppo", correction="icepop", correction_level="geometric"),
}


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("name", MIXED)
def test_unkept_tokens_are_never_computed_with(name, garbage):
    clean, dirty = batch(600, seed=5), batch(600, seed=5)
    for field in NAMES[:-2]:
        dirty[field][~dirty["keep"]] = garbage
    expected, actual = (terms(i, MIXED[name]) for i in (clean, dirty))
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    _, c, h, _ = actual
    assert (c[~dirty["keep"]] == 0).all() and (h[~dirty["keep"]] == 0).all()


@pytest.mark.parametrize("T", (0, 1, 9000))
@pytest.mark.parametrize("name", MIXED)
def test_nothing_kept(name, T):
    inputs = batch(T)
    inputs["keep"] = torch.zeros(T, dtype=torch.bool)
    for bounds in (inputs["bounds"], inputs["bounds"][:1]) if T == 0 else (inputs["bounds"],):
        loss, c, h, metrics = terms(inputs | {"bounds": bounds}, MIXED[name])
        assert loss.item() == 0 and not c.any() and not h.any()
        extremes = {"ratio_min": math.inf, "ratio_max": -math.inf, "correction_max": -math.inf}
        expected = dict.fromkeys(METRICS, 0.0) | extremes
        assert dict(zip(METRICS, metrics.tolist(), strict=True)) == expected


@pytest.mark.parametrize("name", POLICIES)
def test_an_impossible_token(name):
    """A log-prob of -inf beside a finite old one: its loss may be infinite, no gradient is NaN."""
    inputs, spec = batch(60, seed=6), LossSpec(**POLICIES[name], **NARROW)
    inputs["logprob"][inputs["keep"].nonzero()[5]] = -math.inf
    loss, c, *_ = definition(inputs, spec)
    actual = terms(inputs, spec)
    assert actual[1].isfinite().all()
    if not name.endswith("sequence_token"):  # the definition itself holds -inf - -inf there
        torch.testing.assert_close(actual[0].double(), loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(actual[1].double(), c, rtol=1e-6, atol=1e-12)


def one(advantage, log_ratio, **spec):
    """c of a sequence of one token, `log_ratio` above old, ref and rollout, and the metrics."""
    inputs = dict.fromkeys(NAMES) | {
        "logprob": torch.tensor([log_ratio - 1]),
        "old": torch.tensor([-1.0]),
        "ref": torch.tensor([-1.0]) if "kl_coef" in spec else None,
        "rollout": torch.tensor([-1.0]),
        "advantage": torch.tensor([float(advantage)]),
        "weight": torch.ones(1),
        "keep": torch.ones(1, dtype=torch.bool),
        "bounds": torch.tensor([0, 1]),
    }
    values, actual = check(inputs, LossSpec(**spec))
    return actual[1].item(), values


@pytest.mark.parametrize("level", RATIO_LEVELS)
@pytest.mark.parametrize("advantage", (1.0, -1.0))
def test_the_bounds_themselves_carry_the_whole_gradient(advantage, level):
    """clip_low = clip_high = 0: a ratio of exactly 1 is on both bounds, and on delta."""
    for delta in (None, 1.0):
        c, values = one(advantage, 0.0, clip_low=0.0, clip_high=0.0, delta=delta, ratio_level=level)
        assert c == -advantage
        assert values["clip_low"] == values["clip_high"] == 0


@pytest.mark.parametrize(("advantage", "delta"), ((1, 0.5), (-1, -0.5)))
def test_gmpo_at_its_bounds(advantage, delta):
    c, values = one(advantage, delta, objective="gmpo", clip_low=0.5, clip_high=0.5)
    assert c == pytest.approx(-advantage * math.exp(delta))
    assert values["clip_low"] == values["clip_high"] == 0
    c, values = one(advantage, delta, objective="gmpo", clip_low=0.25, clip_high=0.25)
    assert c == 0 and values["clip_low"] + values["clip_high"] == 1


def test_kl_at_its_clamp():
    for kl, d in itertools.product(KLS, (0.0, 0.5, -0.5)):
        one(0, d, kl=kl, kl_coef=1.0, kl_clamp=0.5)
        one(0, d, kl=kl, kl_coef=1.0, kl_clamp=0.125)
    c, _ = one(0, 0.5, kl="k1", kl_coef=1.0, kl_clamp=0.5)
    assert c == 1
    c, _ = one(0, 0.5, kl="k1", kl_coef=1.0, kl_clamp=0.25)
    assert c == 0


@pytest.mark.parametrize("level", CORRECTION_LEVELS)
def test_a_correction_on_both_its_bounds_is_kept(level):
    for kind in CORRECTIONS[1:]:
        _, values = one(
            1, 0.3, correction=kind, correction_level=level, correction_low=1.0,
            correction_high=1.0,
        )  # fmt: skip
        assert values["correction_masked"] == 0 and values["correction_sum"] == 1


def test_a_gap_of_exactly_the_threshold_is_kept():
    for threshold, masked in ((0.5, False), (0.49, True)):
        c, values = one(-1, -0.5, clip_low=1.0, off_policy_threshold=threshold)
        assert (c == 0) == masked == values["off_policy_masked"]
    _, values = one(1, -0.5, off_policy_threshold=0.1)
    assert values["off_policy_masked"] == 0


def test_dppo_at_no_divergence():
    for advantage in (1, 0, -1):
        c, values = one(advantage, 0.0, objective="dppo", dppo_low=0.0, dppo_high=0.0)
        assert c == -advantage and values["clip_low"] == values["clip_high"] == 0


@pytest.mark.parametrize(
    ("advantage", "ratio", "clipped"),
    ((1, 1.5, True), (1, 0.5, False), (-1, 0.5, True), (-1, 1.5, False)),
)
def test_only_the_pessimistic_side_is_clipped(advantage, ratio, clipped):
    c, values = one(advantage, math.log(ratio))
    assert (c == 0) == clipped
    assert values["clip_high"] == (advantage > 0 and clipped)
    assert values["clip_low"] == (advantage < 0 and clipped)


def test_dual_clip_counts_and_stops_the_gradient():
    c, values = one(-1, math.log(4), dual_clip=3.0)
    assert c == 0 and values["dual_clip"] == 1 and values["policy_loss"] == 3
    c, values = one(-1, math.log(2), dual_clip=3.0)
    assert c == pytest.approx(2.0) and values["dual_clip"] == 0


@pytest.mark.parametrize("name", MIXED)
def test_pieces_and_threads_do_not_change_the_sums(name):
    """More tokens than several pieces, any number of threads: the same bits."""
    inputs, threads = batch(50_001), torch.get_num_threads()
    inputs["bounds"] = torch.cat([inputs["bounds"][:20], torch.tensor([12_000, 40_000, 50_001])])
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(terms(inputs, MIXED[name]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", MIXED)
def test_a_sequence_of_70_000_tokens(name):
    """Beyond 2^16 tokens, many pieces of one sequence, between two short ones."""
    inputs = batch(70_010) | {"bounds": torch.tensor([0, 5, 70_005, 70_010])}
    values, _ = check(inputs, MIXED[name])
    assert values["tokens"] == inputs["keep"].sum()


def test_an_overflowing_kl_that_is_off_leaves_the_loss_finite():
    inputs = batch(4)
    inputs["keep"][:] = True
    inputs["ref"] = inputs["logprob"] + 1e4
    loss, c, _, metrics = terms(inputs, LossSpec(kl_coef=0.0))
    assert loss.isfinite() and c.isfinite().all()
    assert 1e300 < metrics[METRICS.index("kl_k3_sum")] < math.inf


def test_the_layout_is_the_spec_s():
    """csrc/spec.h counts both vectors; a longer spec.py must not be read short."""
    inputs = batch(3)
    with pytest.raises(RuntimeError, match=rf"params must have shape \[{len(PARAMS)}\]"):
        objective_terms(*inputs.values(), torch.zeros(len(PARAMS) + 1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="params must be float64"):
        objective_terms(*inputs.values(), torch.zeros(len(PARAMS)))
    assert terms(inputs, LossSpec())[3].shape == (len(METRICS),)
    for bad, message in (
        ({"weight": torch.ones(2)}, r"weight must have shape \[3\]"),
        ({"bounds": None}, "bounds must be given"),
        ({"bounds": torch.zeros(0, dtype=torch.int64)}, r"bounds must have shape \[B \+ 1\]"),
        ({"bounds": torch.tensor([0, 2])}, "bounds must run from 0 to 3"),
        ({"bounds": torch.tensor([0, 2, 1, 3])}, r"bounds\[2\]=1 is less than"),
        ({"bounds": torch.tensor([0.0, 3.0])}, "bounds must be int64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            terms(inputs | bad, MIXED["gspo"])


@pytest.mark.parametrize(
    "name", ["objective", "ratio_level", "dppo_divergence", "kl", "correction"]
)
@pytest.mark.parametrize("number", [9.0, -1.0, 0.5, math.nan])
def test_a_name_it_does_not_have_is_refused(name, number):
    params = LossSpec().params().clone()
    params[PARAMS.index(name)] = number
    with pytest.raises(RuntimeError, match=f"{name} number {number:g} is none of 0 ..."):
        objective_terms(*batch(3).values(), params)
    assert torch.ops.pyrl_native.objectives() == len(OBJECTIVES)


@pytest.mark.parametrize("name", MIXED)
def test_opcheck(name):
    none = dict.fromkeys(("entropy", "old", "ref", "rollout"))
    for inputs in (batch(5), batch(5) | none):
        if not MIXED[name].couples_tokens:
            inputs["bounds"] = None
        torch.library.opcheck(objective_terms, (*inputs.values(), MIXED[name].params()))
    torch.library.opcheck(torch.ops.pyrl_native.objectives, ())
