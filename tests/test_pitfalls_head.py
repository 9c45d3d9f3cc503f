"""Pitfalls of the losses that start from hidden states; the table is in test_pitfalls.py."""

import dataclasses

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
def test_awkward_shapes(backend, lengths, vocabulary, spec, monkeypatch):
    kept = 0.7
    if backend == "triton" and DEVICE.type == "cpu" and sum(lengths) > 1000:
        # The interpreter pays by the row and by the block: few rows carry loss, blocks are large.
        from pyrl.kernels import objective

        kept = 0.0005
        for name in ("OBJECTIVE", "SEQUENCE_OBJECTIVE"):
            tile = getattr(objective, name)._replace(block=8192)
            monkeypatch.setattr(objective, name, tile)
    shape = Shape(name="awkward", lengths=lengths, vocabulary=vocabulary, width=4, kept=kept)
    row = linear_row("shapes", "awkward", spec, shape, torch.float32, [backend])
    assert not row.failures


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


@backends
def test_entropy_without_a_bonus_is_reported_and_trains_nothing(backend):
    hidden, weight, target, advantages, fields = batch()
    logp = (hidden.detach().double() @ weight.detach().double().T).log_softmax(-1)
    entropy = torch.where(fields["mask"], -(logp.exp() * logp).sum(-1), 0.0)
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            out = pyrl.linear_policy_loss(
                hidden, weight, target, torch.zeros_like(advantages), LossSpec(),
                backend=backend, **fields,
            )  # fmt: skip
        assert out.loss == 0 and out.loss.requires_grad == recording
        assert not out.entropy.requires_grad and relative(out.entropy, entropy) < 5e-6
        assert out.metrics["entropy_sum"].item() == pytest.approx(entropy.sum().item(), rel=5e-6)
        if recording:
            assert not any(g.any() for g in gradients(out.loss, hidden, weight))


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


@both
@backends
def test_a_nan_hidden_state_is_seen(backend, spec):
    hidden, weight, target, advantages, fields = batch()
    broken = hidden.detach().clone()
    broken[fields["mask"].nonzero()[2]] = torch.nan
    broken.requires_grad_()
    for old in (None, fields["old_logprob"]):
        out = pyrl.linear_policy_loss(
            broken, weight, target, advantages, spec, backend=backend,
            **{**fields, "old_logprob": old},
        )  # fmt: skip
        assert out.loss.isnan() and gradients(out.loss, weight)[0].isnan().any()


@both
@backends
def test_a_bf16_weight_gradient_is_summed_in_fp32(backend, spec, monkeypatch):
    """Chunks of two rows are as good as one GEMM; sums rounded to bf16 would be off by 3e-3."""
    hidden, weight, target, advantages, fields = batch((30, 18), 31, dtype=torch.bfloat16)
    fields["mask"] = torch.ones_like(fields["mask"])
    found = []
    for rows in (1000, 2):
        limit = dict.fromkeys(("cpu", "cuda"), rows * 31 * 2)
        monkeypatch.setattr("pyrl.ops.linear_logprob.CHUNK_BYTES", limit)
        out = pyrl.linear_policy_loss(
            hidden, weight, target, advantages, spec, backend=backend, **fields
        )
        found.append(gradients(out.loss, weight)[0])
    assert relative(found[1], found[0]) <= MARGIN[torch.bfloat16]


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
