"""policy_objective at its edges: padding, splits, masks, missing log-probs, bounds, bad input."""

import pytest
import torch

import pyrl
from pyrl import LossSpec
from pyrl.ops.spec import METRICS
from pyrl.parity import DEVICE, MARGIN, relative, serving

# A ragged batch: an empty completion, a single token, an all-masked sequence (the last).
BOUNDS = torch.tensor([0, 7, 7, 8, 20, 23])
T, B = 23, 5

SPECS = [
    LossSpec(clip_high=0.28, dual_clip=3.0, kl=kl, kl_coef=0.1, entropy_coef=0.03, **aggregation)
    for kl, aggregation in (
        ("k1", {"aggregation": "token_mean"}),
        ("k2", {"aggregation": "sequence_mean"}),
        ("k3", {"aggregation": "sequence_sum"}),
        ("abs", {"aggregation": "constant", "max_length": 9}),
        ("k3_st", {"aggregation": "weighted"}),
    )
]


def inputs(seed=0, spread=0.4):
    g = torch.Generator().manual_seed(seed)

    def normal(scale=1.0, shift=0.0):
        return (shift + scale * torch.randn(T, generator=g)).to(DEVICE)

    logprob = normal(1.0, -3.0)
    mask = torch.rand(T, generator=g).to(DEVICE) > 0.3
    mask[20:] = False
    fields = {
        "old_logprob": logprob + spread * normal(),
        "ref_logprob": logprob + spread * normal(),
        "entropy": normal().abs().requires_grad_(),
        "weights": normal().abs(),
        "mask": mask,
        "cu_seqlens": BOUNDS.to(DEVICE),
    }
    return logprob.requires_grad_(), normal(), fields


def run(backend, logprob, advantages, spec, fields):
    leaves = [x for x in (logprob, fields.get("entropy")) if x is not None]
    for leaf in leaves:
        leaf.grad = None
    out = pyrl.policy_objective(logprob, advantages, spec, backend=backend, **fields)
    out.loss.backward()
    return out, [x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves]


def assert_parity(backend, logprob, advantages, spec, fields):
    exact, exact_grads = run("reference", logprob, advantages, spec, fields)
    plain, plain_grads = run("torch", logprob, advantages, spec, fields)
    ours, grads = run(backend, logprob, advantages, spec, fields)
    margin = MARGIN[torch.float32]
    assert relative(ours.loss, exact.loss) <= relative(plain.loss, exact.loss) + margin
    for a, b, c in zip(grads, plain_grads, exact_grads, strict=True):
        assert relative(a, c) <= relative(b, c) + margin
    bounded = "cu_seqlens" in fields
    assert set(ours.metrics) == {*METRICS, *(["sequences"] if bounded else [])}
    for name, value in exact.metrics.items():
        # fp32 inputs, float64 sums: the metrics agree to fp32 rounding of each term.
        torch.testing.assert_close(ours.metrics[name], value, rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("backend", serving())
def test_padded_equals_packed_and_per_sequence_advantages(backend):
    g = torch.Generator().manual_seed(1)
    logprob, old = (torch.randn(4, 6, generator=g).to(DEVICE) for _ in range(2))
    lengths = torch.tensor([6, 0, 3, 5])
    mask = (torch.arange(6) < lengths[:, None]).to(DEVICE)
    advantages = torch.randn(4, generator=g).to(DEVICE)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    for aggregation in ("token_mean", "sequence_mean", "sequence_sum", "constant"):
        spec = LossSpec(aggregation=aggregation, max_length=6)
        padded_in, packed_in = logprob.clone().requires_grad_(), logprob[mask].requires_grad_()
        padded = pyrl.policy_objective(
            padded_in, advantages, spec, old_logprob=old, mask=mask, backend=backend
        )
        packed = pyrl.policy_objective(
            packed_in, advantages, spec, old_logprob=old[mask], cu_seqlens=bounds, backend=backend
        )
        (padded.loss + packed.loss).backward()
        assert relative(packed.loss, padded.loss) <= 1e-6
        assert relative(packed_in.grad, padded_in.grad[mask]) <= 1e-6
        assert not padded_in.grad[~mask].any()


@pytest.mark.parametrize("backend", serving())
def test_any_split_of_a_batch_gives_the_same_gradient(backend):
    logprob, advantages, fields = inputs()
    fields["mask"][18:] = True
    for spec in SPECS:
        whole = dict(fields, denominator=11)
        _, grads = run(backend, logprob, advantages, spec, whole)
        logprob.grad = fields["entropy"].grad = None
        for s in (slice(0, 3), slice(3, 5)):
            lo, hi = int(BOUNDS[s.start]), int(BOUNDS[s.stop])
            part = {k: v[lo:hi] for k, v in fields.items() if k != "cu_seqlens"}
            bounds = fields["cu_seqlens"][s.start : s.stop + 1] - lo
            pyrl.policy_objective(
                logprob[lo:hi], advantages[lo:hi], spec,
                cu_seqlens=bounds, denominator=11, backend=backend, **part,
            ).loss.backward()  # fmt: skip
        assert relative(logprob.grad, grads[0]) <= 1e-6
        assert relative(fields["entropy"].grad, grads[1]) <= 1e-6


@pytest.mark.parametrize("backend", serving())
def test_masked_garbage_and_all_masked(backend):
    logprob, advantages, fields = inputs()
    spec = SPECS[-1]
    clean, clean_grads = run(backend, logprob, advantages, spec, fields)
    dropped = ~fields["mask"]
    with torch.no_grad():
        for garbage, name in ((torch.nan, "old_logprob"), (torch.inf, "ref_logprob")):
            fields[name][dropped] = garbage
        logprob[dropped] = -torch.inf
        fields["entropy"][dropped] = torch.nan
        advantages[dropped] = torch.nan
    dirty, grads = run(backend, logprob, advantages, spec, fields)
    assert torch.equal(dirty.loss, clean.loss)
    for a, b in zip(grads, clean_grads, strict=True):
        assert torch.equal(a, b)
    fields["mask"] = torch.zeros_like(fields["mask"])
    empty, grads = run(backend, logprob, advantages, spec, fields)
    assert empty.loss == 0 and not any(g.any() for g in grads)
    assert empty.metrics["tokens"] == 0 and empty.metrics["sequences"] == 0


@pytest.mark.parametrize("backend", serving())
def test_missing_old_and_ref(backend):
    logprob, advantages, fields = inputs()
    del fields["entropy"]
    fields["old_logprob"][::2] = torch.nan
    fields["ref_logprob"][1::2] = torch.nan
    spec = LossSpec(kl_coef=0.2)
    assert_parity(backend, logprob, advantages, spec, fields)
    out, _ = run(backend, logprob, advantages, spec, fields)
    assert out.metrics["nan_old"] == fields["mask"][::2].sum()
    assert out.metrics["nan_ref"] == fields["mask"][1::2].sum()
    _, (grad_none,) = run(backend, logprob, advantages, LossSpec(), {"mask": fields["mask"]})
    # On-policy the clipped surrogate's gradient is Reinforce's.
    expected = torch.where(fields["mask"], -advantages, 0.0) / fields["mask"].sum()
    assert relative(grad_none, expected) <= 1e-6


@pytest.mark.parametrize("backend", serving())
def test_clip_edges_follow_torch(backend):
    # A ratio of 1 is the one exp gives exactly on every backend: put both bounds there. clamp and
    # min pass the gradient at equality, so on-policy tokens learn even with a clip range of zero.
    logprob = torch.full((4,), -1.5, device=DEVICE).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0], device=DEVICE)
    fields = {"old_logprob": logprob.detach()}
    spec = LossSpec(clip_low=0.0, clip_high=0.0)
    assert_parity(backend, logprob, advantages, spec, fields)
    out, (grad,) = run(backend, logprob, advantages, spec, fields)
    assert torch.equal(grad, -advantages / 4)
    assert out.metrics["clip_low"] == out.metrics["clip_high"] == 0


@pytest.mark.parametrize("backend", serving())
def test_clipped_sides(backend):
    # r = e^0.5 and e^-0.5 with both signs of A: only the pessimistic side loses its gradient.
    logprob = torch.tensor([0.5, 0.5, -0.5, -0.5, 2.0], device=DEVICE).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], device=DEVICE)
    spec = LossSpec(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    out, (grad,) = run(
        backend, logprob, advantages, spec, {"old_logprob": torch.zeros(5, device=DEVICE)}
    )
    ratio = logprob.detach().exp()
    kept = torch.tensor([False, True, True, False, False], device=DEVICE)
    assert relative(grad, torch.where(kept, -advantages * ratio, 0.0) / 5) <= 1e-6
    counted = {name: int(out.metrics[name]) for name in ("clip_high", "clip_low", "dual_clip")}
    assert counted == {"clip_high": 1, "clip_low": 1, "dual_clip": 1}


@pytest.mark.parametrize("backend", serving())
def test_fullgraph(backend):
    logprob, advantages, fields = inputs()
    spec = LossSpec(kl_coef=0.1, entropy_coef=0.1, aggregation="sequence_mean")
    compiled = torch.compile(pyrl.policy_objective, fullgraph=True, backend="aot_eager")
    eager, grads = run(backend, logprob, advantages, spec, fields)
    logprob.grad = fields["entropy"].grad = None
    out = compiled(logprob, advantages, spec, backend=backend, **fields)
    out.loss.backward()
    assert relative(out.loss, eager.loss) <= 1e-6
    assert relative(logprob.grad, grads[0]) <= 1e-6


def test_the_entropy_bonus_has_a_gradient():
    logprob, advantages, fields = inputs()
    _, (_, dentropy) = run(None, logprob, advantages, LossSpec(entropy_coef=0.5), fields)
    expected = torch.where(fields["mask"], -0.5 / fields["mask"].sum(), 0.0)
    assert relative(dentropy, expected) <= 1e-6


def test_bad_input_names_itself():
    logprob, advantages, fields = inputs()
    spec = LossSpec()
    if DEVICE.type == "cpu":
        bad = advantages.clone()
        position = int(fields["mask"].nonzero()[3])
        bad[position] = torch.nan
        with pytest.raises(ValueError, match=rf"advantages\[{position}\] = nan"):
            pyrl.policy_objective(logprob, bad, spec, **fields)
        with pytest.raises(ValueError, match="cu_seqlens must run from 0 to T=23"):
            pyrl.policy_objective(logprob, advantages, spec, cu_seqlens=torch.tensor([0, 9]))
        with pytest.raises(ValueError, match="cu_seqlens falls at 2: 9 → 4"):
            bounds = torch.tensor([0, 9, 4, 23])
            pyrl.policy_objective(logprob, advantages, spec, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="needs ref_logprob"):
        pyrl.policy_objective(logprob, advantages, LossSpec(kl_coef=0.1))
    with pytest.raises(ValueError, match="needs entropy"):
        pyrl.policy_objective(logprob, advantages, LossSpec(entropy_coef=0.1))
    with pytest.raises(ValueError, match="needs cu_seqlens"):
        pyrl.policy_objective(logprob, advantages, LossSpec(aggregation="sequence_mean"))
    with pytest.raises(ValueError, match="needs max_length"):
        pyrl.policy_objective(logprob[None], advantages[None], LossSpec.preset("dr_grpo"))
    with pytest.raises(
        ValueError, match=r"advantages: expected shape \(23,\) or \(5,\), got \(4,\)"
    ):
        pyrl.policy_objective(logprob, advantages[:4], spec, **fields)
    with pytest.raises(ValueError, match="correction='tis' needs rollout_logprob"):
        pyrl.policy_objective(logprob, advantages, LossSpec(correction="tis"), **fields)


def test_spec_validates_and_round_trips():
    for spec in SPECS:
        assert LossSpec.from_json(spec.to_json()) == spec
    for bad, message in (
        ({"objective": "ppo"}, "objective='ppo': expected one of"),
        ({"kl": "k9"}, "kl='k9'"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"clip_high": -0.1}, "clip_high=-0.1"),
        ({"dual_clip": 1.0}, "dual_clip=1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"kl_coef": float("nan")}, "kl_coef=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            LossSpec(**bad)
    with pytest.raises(ValueError, match="no field 'clip_hi'"):
        LossSpec.from_dict({"clip_hi": 0.3})
    with pytest.raises(ValueError, match="expected one of"):
        LossSpec.preset("grpoo")


@pytest.mark.parametrize("name", ["dual_clip", "delta"])
def test_a_bound_that_the_objective_has_not_is_refused(name):
    with pytest.raises(ValueError, match=f"LossSpec.{name}=2.0: objective 'cispo' has no such"):
        LossSpec(objective="cispo", **{name: 2.0})


def test_bounds_at_any_stride_and_an_infinite_reference():
    spec = LossSpec.preset("gspo", kl_coef=0.1)
    logprob, advantages = -torch.ones(9), torch.ones(3)
    strided = torch.tensor([0, 9, 3, 9, 6, 9, 9])[::2]
    fields = {"ref_logprob": logprob - 0.1, "cu_seqlens": strided}
    out = pyrl.policy_objective(logprob, advantages, spec, **fields)
    fields["cu_seqlens"] = strided.contiguous()
    assert torch.equal(out.loss, pyrl.policy_objective(logprob, advantages, spec, **fields).loss)
    fields["ref_logprob"] = torch.full((9,), -torch.inf)
    with pytest.raises(ValueError, match=r"ref_logprob\[0\] = -inf is not finite"):
        pyrl.policy_objective(logprob, advantages, spec, **fields)
