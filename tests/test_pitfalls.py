"""One named test for every pitfall of other RL losses that these must be immune to."""

import dataclasses
from pathlib import Path

import pytest
import torch

import pyrl
from pyrl import LossSpec
from pyrl.certify.batches import Shape
from pyrl.certify.measure import linear_row
from pyrl.parity import DEVICE, MARGIN, relative, serving

backends = pytest.mark.parametrize("backend", serving())
COUPLED = LossSpec.preset("gspo")
SPECS = {
    "clip": LossSpec(kl_coef=0.1, entropy_coef=0.02),
    "sequence": dataclasses.replace(COUPLED, kl_coef=0.1, entropy_coef=0.02),
}
both = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def batch(lengths=(6, 0, 1, 9), vocabulary=101, width=8, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE)

    hidden = normal(tokens, width).to(dtype).requires_grad_()
    weight = normal(vocabulary, width).to(dtype).requires_grad_()
    target = torch.randint(0, vocabulary, (tokens,), generator=g).to(DEVICE)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    logp = pyrl.linear_logprob(hidden, weight, target, backend="torch").logprob.detach()
    fields = {
        "old_logprob": logp + 0.3 * normal(tokens),
        "ref_logprob": logp + 0.3 * normal(tokens),
        "mask": torch.rand(tokens, generator=g).to(DEVICE) > 0.25,
        "cu_seqlens": bounds,
    }
    return hidden, weight, target, normal(len(lengths)), fields


def gradients(loss, *leaves):
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


@both
@backends
def test_masked_positions_select_and_never_multiply(backend, spec):
    hidden, weight, target, advantages, fields = batch()
    dirty = hidden.detach().clone()
    dirty[~fields["mask"]] = torch.inf
    soiled = {**fields}
    for name in ("old_logprob", "ref_logprob"):
        soiled[name] = torch.where(fields["mask"], fields[name], -torch.inf)
    target_out = torch.where(fields["mask"], target, -100)
    a, b = hidden.detach().requires_grad_(), dirty.requires_grad_()
    clean = pyrl.linear_policy_loss(a, weight, target, advantages, spec, backend=backend, **fields)
    other = pyrl.linear_policy_loss(
        b, weight, target_out, advantages, spec, backend=backend, **soiled
    )
    assert clean.loss.equal(other.loss)
    for x, y in zip(
        gradients(clean.loss, a, weight), gradients(other.loss, b, weight), strict=True
    ):
        assert x.equal(y)


@both
@backends
def test_an_all_masked_batch_has_loss_0_and_gradient_0(backend, spec):
    hidden, weight, target, advantages, fields = batch()
    fields["mask"] = torch.zeros_like(fields["mask"])
    out = pyrl.linear_policy_loss(
        hidden, weight, target, advantages, spec, backend=backend, **fields
    )
    assert out.loss == 0
    assert all((g == 0).all() for g in gradients(out.loss, hidden, weight))


@both
@backends
def test_infinite_logits_of_banned_tokens(backend, spec):
    hidden, weight, target, advantages, fields = batch()
    bias = torch.zeros(weight.shape[0], device=DEVICE)
    bias[::3] = -torch.inf
    bias[target] = 0.0
    out = pyrl.linear_policy_loss(
        hidden, weight, target, advantages, spec, bias=bias, backend=backend, **fields
    )
    found = gradients(out.loss, hidden, weight)
    exact = pyrl.linear_policy_loss(
        hidden, weight, target, advantages, spec, bias=bias, backend="reference", **fields
    )
    for a, b in zip(found, gradients(exact.loss, hidden, weight), strict=True):
        assert relative(a, b) < 5e-6
    assert (found[1][bias == -torch.inf] == 0).all()


@both
@backends
@pytest.mark.parametrize(
    ("lengths", "vocabulary"),
    [
        ((), 7),  # no sequence
        ((0, 0), 7),  # no token
        ((1,), 7),  # one token
        ((3, 0, 2), 32001),  # divisible by no tile
        ((2, 1), 151936),  # past 2^17
        ((65537, 1), 3),  # past a grid's y axis
    ],
)
def test_awkward_shapes(backend, lengths, vocabulary, spec):
    shape = Shape(name="awkward", lengths=lengths, vocabulary=vocabulary, width=4)
    row = linear_row("shapes", "awkward", spec, shape, torch.float32, [backend])
    assert not row.failures


@backends
def test_the_sequence_ratio_counts_kept_tokens_only(backend):
    # Two kept tokens with log-ratios 0.2 and 0.4; the masked ones must not pull the mean.
    logprob = torch.tensor([-1.0, -2.0, -3.0, -4.0], device=DEVICE)
    shift = torch.tensor([0.2, 9.0, 0.4, -9.0], device=DEVICE)
    mask = torch.tensor([True, False, True, False], device=DEVICE)
    spec = LossSpec(ratio_level="sequence", clip_high=5.0)
    out = pyrl.policy_objective(
        logprob, torch.ones(1, device=DEVICE), spec, old_logprob=logprob - shift, mask=mask,
        cu_seqlens=torch.tensor([0, 4], device=DEVICE), backend=backend,
    )  # fmt: skip
    assert out.metrics["ratio_max"].item() == pytest.approx(torch.tensor(0.3).exp().item(), 1e-6)


@backends
def test_gspo_is_not_gspo_token_under_per_token_advantages(backend):
    _, _, _, _, fields = batch()
    logprob = (fields["old_logprob"] + 0.1).requires_grad_()
    advantages = torch.linspace(-1, 1, logprob.numel(), device=DEVICE)
    found = {}
    for level in ("sequence", "sequence_token"):
        spec = LossSpec(ratio_level=level, clip_high=5.0)
        out = pyrl.policy_objective(
            logprob, advantages, spec, old_logprob=fields["old_logprob"],
            cu_seqlens=fields["cu_seqlens"], backend=backend,
        )  # fmt: skip
        found[level] = (out.loss.item(), gradients(out.loss, logprob)[0])
    assert found["sequence"][0] == pytest.approx(found["sequence_token"][0], rel=1e-6)
    assert relative(found["sequence"][1], found["sequence_token"][1]) > 0.1


def test_what_the_kl_estimators_estimate():
    """Expectations over the whole vocabulary: k1's gradient vanishes, k2's is the reverse KL's,
    k3's is another divergence's; their values are KL, nearly KL, KL."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(50, generator=g, dtype=torch.float64).requires_grad_()
    ref = torch.randn(50, generator=g, dtype=torch.float64).log_softmax(0)
    logp = z.log_softmax(0)
    p = logp.detach().exp()
    kl = (logp.exp() * (logp - ref)).sum()
    (true,) = torch.autograd.grad(kl, z, retain_graph=True)

    def expected(kind):
        from pyrl.ops.objective import kl_term

        value = (p * kl_term(logp, ref, kind)).sum()
        return value.detach(), torch.autograd.grad(value, z, retain_graph=True)[0]

    assert expected("k1")[0].allclose(kl) and expected("k3")[0].allclose(kl)
    assert expected("k1")[1].norm() < 1e-12
    assert expected("k2")[1].allclose(true)
    assert expected("k3_st")[1].allclose(true) and expected("k3_st")[0].allclose(kl)
    assert relative(expected("k3")[1], true) > 0.1
    for word in ("k1\n    has zero expected gradient", "not the reverse KL's"):
        assert word in Path(pyrl.ops.spec.__file__).read_text()


@backends
def test_cispo_bounds_the_ratio_and_delta_is_not_dual_clip(backend):
    logprob = torch.zeros(1, device=DEVICE).requires_grad_()
    old = -torch.tensor([3.0], device=DEVICE).log()  # ratio 3

    def loss(advantage, **spec):
        a = torch.tensor([advantage], device=DEVICE)
        out = pyrl.policy_objective(
            logprob - 1, a, LossSpec(**spec), old_logprob=old - 1, backend=backend
        )
        return out.loss.item(), gradients(out.loss, logprob)[0].item()

    assert loss(1.0, objective="cispo", cispo_high=2.0) == pytest.approx((2.0, -2.0))
    assert loss(-1.0) == pytest.approx((3.0, 3.0))  # the pessimistic side is unbounded
    assert loss(-1.0, delta=2.5) == pytest.approx((2.5, 0.0))
    assert loss(-1.0, dual_clip=2.0) == pytest.approx((2.0, 0.0))
    assert loss(1.0, delta=2.5) == loss(1.0)  # and the clipped branch knows no delta


@backends
def test_ties_at_the_clip_edges_have_torchs_subgradients(backend):
    ratio = torch.tensor([0.75, 1.25, 1.0, 2.0, 0.75, 1.25], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0], device=DEVICE)
    spec = LossSpec(clip_low=0.25, clip_high=0.25, dual_clip=2.0)
    found = []
    for name in (backend, "reference"):
        logprob = torch.zeros(6, device=DEVICE).requires_grad_()
        out = pyrl.policy_objective(
            logprob, advantages, spec, old_logprob=-ratio.log().float().to(DEVICE), backend=name
        )
        found.append(gradients(out.loss, logprob)[0])
    assert relative(found[0], found[1]) < 1e-6


def test_what_a_backend_cannot_do_is_an_error_and_not_another_loss():
    with pytest.raises(ValueError, match="objective='gmp0'"):
        LossSpec(objective="gmp0")
    with pytest.raises(ValueError, match="ratio_level"):
        LossSpec(objective="gmpo", ratio_level="sequence")
    logprob = torch.zeros(4, device=DEVICE)
    with pytest.raises(ValueError, match="rollout_logprob"):
        pyrl.policy_objective(logprob, logprob, LossSpec(correction="tis"))
    with pytest.raises(ValueError, match="cu_seqlens"):
        pyrl.policy_objective(logprob, logprob, LossSpec.preset("gspo"))


@both
@backends
def test_chunks_do_not_shift_or_lose_targets(backend, spec, monkeypatch):
    hidden, weight, target, advantages, fields = batch()
    found = []
    for rows in (1, 3, 5, 1000):
        limit = dict.fromkeys(("cpu", "cuda"), rows * weight.shape[0] * 4)
        monkeypatch.setattr("pyrl.ops.linear_logprob.CHUNK_BYTES", limit)
        out = pyrl.linear_policy_loss(
            hidden, weight, target, advantages, spec, backend=backend, **fields
        )
        found.append([out.loss, *gradients(out.loss, hidden, weight)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert relative(b, a) < MARGIN[torch.float32]


@backends
def test_the_entropy_bonus_has_a_gradient(backend):
    hidden, weight, target, advantages, fields = batch()
    advantages = torch.zeros_like(advantages)
    spec = LossSpec(entropy_coef=0.5)
    out = pyrl.linear_policy_loss(
        hidden, weight, target, advantages, spec, backend=backend, **fields
    )
    found = gradients(out.loss, hidden)[0]
    kept = fields["mask"]
    logits = hidden @ weight.T
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    mean = -0.5 * entropy[kept].mean()
    assert relative(found, gradients(mean, hidden)[0]) < 5e-6 and found.norm() > 1e-3


@both
@backends
def test_accumulation_needs_no_division(backend, spec):
    """Micro-batches of whole sequences with the step's denominator add up to the whole batch."""
    lengths = (6, 0, 1, 9, 4)
    hidden, weight, target, advantages, fields = batch(lengths)
    kept = fields["mask"].sum()
    for aggregation, denominator in (("token_mean", kept), ("sequence_mean", len(lengths))):
        spec = dataclasses.replace(spec, aggregation=aggregation)
        whole = pyrl.linear_policy_loss(
            hidden, weight, target, advantages, spec, backend=backend, **fields
        )
        expected = gradients(whole.loss, hidden, weight)
        hidden.grad = weight.grad = None
        for first, last in ((0, 2), (2, 5)):
            a, b = (int(fields["cu_seqlens"][i]) for i in (first, last))
            part = {k: v[a:b] for k, v in fields.items() if k != "cu_seqlens"}
            part["cu_seqlens"] = fields["cu_seqlens"][first : last + 1] - a
            out = pyrl.linear_policy_loss(
                hidden[a:b], weight, target[a:b], advantages[first:last], spec,
                denominator=denominator, backend=backend, **part,
            )  # fmt: skip
            out.loss.backward()
        for x, y in zip((hidden.grad, weight.grad), expected, strict=True):
            assert relative(x, y) < 2e-6


@backends
def test_truncated_completions_stay_in_no_denominator_but_their_own(backend):
    """Masking a truncated completion's tokens takes them out of token_mean's N, not out of B."""
    _, _, _, _, fields = batch((4, 4))
    logprob, advantages = fields["old_logprob"], torch.ones(2, device=DEVICE)
    mask = torch.tensor([True] * 4 + [False] * 4, device=DEVICE)
    whole = {"cu_seqlens": fields["cu_seqlens"], "mask": mask, "backend": backend}
    alone = {"cu_seqlens": fields["cu_seqlens"][:2], "backend": backend}
    for aggregation, share in (("token_mean", 1.0), ("sequence_mean", 0.5)):
        spec = LossSpec(objective="reinforce", aggregation=aggregation)
        a = pyrl.policy_objective(logprob, advantages, spec, **whole).loss
        b = pyrl.policy_objective(logprob[:4], advantages[:1], spec, **alone).loss
        assert relative(a, share * b) < 1e-6


@backends
def test_the_temperature_reaches_log_probs_entropy_and_gradient(backend):
    hidden, weight, target, advantages, fields = batch()
    spec = LossSpec(temperature=0.5, entropy_coef=0.1)
    out = pyrl.linear_policy_loss(
        hidden, weight, target, advantages, spec, backend=backend, **fields
    )
    found = gradients(out.loss, hidden, weight)
    plain = pyrl.linear_policy_loss(
        2 * hidden, weight, target, advantages, dataclasses.replace(spec, temperature=1.0),
        backend=backend, **fields,
    )  # fmt: skip
    for a, b in zip(found, gradients(plain.loss, hidden, weight), strict=True):
        assert relative(a, b) < 2e-6


@backends
def test_a_huge_ratio_poisons_no_other_token(backend):
    """One placeholder log-prob of -9999: a positive advantage clips it, a zero one ignores it."""
    logprob = torch.full((3,), -1.0, device=DEVICE).requires_grad_()
    old = torch.tensor([-9999.0, -9999.0, -1.0], device=DEVICE)
    advantages = torch.tensor([1.0, 0.0, 1.0], device=DEVICE)
    out = pyrl.policy_objective(logprob, advantages, LossSpec(), old_logprob=old, backend=backend)
    assert out.loss.item() == pytest.approx(-(1.2 + 0 + 1) / 3)
    assert gradients(out.loss, logprob)[0].tolist() == pytest.approx([0.0, 0.0, -1 / 3])


@backends
def test_a_nan_log_prob_is_seen(backend):
    """A broken model must not train on as if nothing were wrong."""
    logprob = torch.tensor([torch.nan, -1.0], device=DEVICE)
    out = pyrl.policy_objective(logprob, torch.ones(2, device=DEVICE), LossSpec(), backend=backend)
    assert out.loss.isnan()


@backends
def test_f16_gradients_survive_a_large_denominator_under_loss_scaling(backend):
    scale, denominator = 65536.0, 1e6
    found = []
    for dtype, name in ((torch.float16, backend), (torch.float32, "reference")):
        hidden, weight, target, advantages, fields = batch((40, 24), dtype=torch.float16)
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
        out = pyrl.linear_policy_loss(
            hidden, weight, target, advantages, LossSpec(), denominator=denominator,
            backend=name, **fields,
        )  # fmt: skip
        found.append(gradients(scale * out.loss, hidden, weight))
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 2e-3  # f16 has 11 bits: two roundings


@backends
def test_a_second_derivative_is_refused_and_not_0(backend):
    if backend == "torch":
        pytest.skip("torch differentiates the formula itself")
    logprob = torch.zeros(3, device=DEVICE).requires_grad_()
    out = pyrl.policy_objective(
        logprob, torch.ones(3, device=DEVICE), LossSpec(), old_logprob=logprob - 0.1,
        backend=backend,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.loss, logprob, create_graph=True)


def test_a_float64_or_integer_head_is_refused():
    hidden, weight, target, advantages, fields = batch()
    with pytest.raises(ValueError, match=r"hidden: expected one of .*float64"):
        pyrl.linear_policy_loss(hidden.double(), weight, target, advantages, LossSpec(), **fields)


@backends
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_targets_of_any_integer_dtype_and_stride(backend, dtype):
    hidden, weight, target, advantages, fields = batch()
    usual = pyrl.linear_policy_loss(
        hidden, weight, target, advantages, LossSpec(), backend=backend, **fields
    )
    strided = torch.stack([target, target], dim=1).to(dtype)[:, 0]
    other = pyrl.linear_policy_loss(
        hidden, weight, strided, advantages, LossSpec(), backend=backend, **fields
    )
    assert usual.loss.equal(other.loss)


@backends
def test_autocast_does_not_reach_into_the_ops(backend):
    hidden, weight, target, advantages, fields = batch()
    args = (hidden, weight, target, advantages, LossSpec())
    usual = gradients(
        pyrl.linear_policy_loss(*args, backend=backend, **fields).loss, hidden, weight
    )
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = pyrl.linear_policy_loss(*args, backend=backend, **fields).loss
    for a, b in zip(gradients(loss, hidden, weight), usual, strict=True):
        assert a.equal(b)
