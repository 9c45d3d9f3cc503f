"""linear_policy_loss with every kind of head: LoRA, padding, temperatures, a reference's head."""

import pytest
import torch

import pyrl
from pyrl import LoRA, LossSpec
from pyrl.parity import DEVICE, MARGIN, relative, serving

T, D, V, R = 29, 16, 211, 3
BOUNDS = torch.tensor([0, 9, 9, 10, 29])

#: One pass, and composed because the sequence couples its tokens.
SPECS = {
    "clip": LossSpec(kl_coef=0.1, entropy_coef=0.05, softcap=20.0, logit_scale=0.8),
    "gspo": LossSpec.preset("gspo", clip_low=0.2, clip_high=0.2, kl_coef=0.1),
}


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return (torch.randn(*shape, generator=g) / 2).to(DEVICE, dtype)

    leaves = {
        "hidden": normal(T, D),
        "weight": normal(V, D),
        "bias": normal(V),
        "a": normal(R, D),
        "b": normal(V, R),
    }
    now = normal(T, dtype=torch.float32).abs() - 5
    fields = {
        "target": torch.randint(0, V - 3, (T,), generator=g).to(DEVICE),
        "advantages": normal(4, dtype=torch.float32),
        "old_logprob": now,
        "ref_logprob": now + 0.1 * normal(T, dtype=torch.float32),
        "mask": torch.rand(T, generator=g).to(DEVICE) > 0.3,
        "cu_seqlens": BOUNDS.to(DEVICE),
    }
    return {k: v.requires_grad_() for k, v in leaves.items()}, fields


def run(backend, spec, leaves, fields, **options):
    for leaf in leaves.values():
        leaf.grad = None
    hidden, weight, bias, a, b = leaves.values()
    out = pyrl.linear_policy_loss(
        hidden, weight, spec=spec, bias=bias, lora=LoRA(a, b, 0.7), backend=backend, **fields,
        **options,
    )  # fmt: skip
    (2 * out.loss).backward()
    return {"loss": out.loss.detach(), "logprob": out.logprob, "entropy": out.entropy,
            **{k: v.grad for k, v in leaves.items()}}  # fmt: skip


def merged(spec, leaves, fields, **options):
    """The oracle with the adapter merged into the weight, in float64."""
    exact = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    hidden, weight, bias, a, b = exact.values()
    weight = weight + 0.7 * b @ a
    size = options.pop("vocab_size", V)
    target, mask = fields["target"], fields["mask"]
    z = (hidden @ weight[:size].T + bias[:size]) * spec.logit_scale
    z = z if spec.softcap is None else spec.softcap * torch.tanh(z / spec.softcap)
    t = options.pop("temperature", spec.temperature)
    assert not options
    logp = (z / (t.double()[:, None] if isinstance(t, torch.Tensor) else t)).log_softmax(1)
    logprob = logp.gather(1, target[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(1)
    rest = {k: v for k, v in fields.items() if k not in ("target", "advantages")}
    out = pyrl.policy_objective(
        logprob, fields["advantages"], spec, entropy=entropy, backend="reference", **rest
    )
    (2 * out.loss).backward()
    outputs = {"loss": out.loss, "logprob": logprob, "entropy": entropy}
    outputs = {k: v.detach() for k, v in outputs.items()}
    for key in ("logprob", "entropy"):
        outputs[key] = torch.where(mask, outputs[key], 0.0)
    return {**outputs, **{k: v.grad for k, v in exact.items()}}


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_every_head_option_at_once(backend, dtype, name):
    leaves, fields = inputs(dtype)
    options = {"temperature": torch.linspace(0.5, 2.0, T).to(DEVICE), "vocab_size": V - 3}
    exact = merged(SPECS[name], leaves, fields, **options)
    usual = run("torch", SPECS[name], leaves, fields, **options)
    ours = run(backend, SPECS[name], leaves, fields, **options)
    for key, truth in exact.items():
        bound = relative(usual[key], truth) + MARGIN[dtype]
        assert relative(ours[key], truth) <= bound, (key, relative(ours[key], truth), bound)
    assert not ours["weight"][V - 3 :].any()


@pytest.mark.parametrize("backend", serving())
def test_temperature_overrides_the_specs(backend):
    leaves, fields = inputs()
    spec = SPECS["clip"]
    hot = run(backend, LossSpec(**{**spec.to_dict(), "temperature": 1.7}), leaves, fields)
    for temperature in (1.7, torch.tensor(1.7), torch.full((T,), 1.7)):
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.to(DEVICE)
        ours = run(backend, spec, leaves, fields, temperature=temperature)
        for key, value in hot.items():
            assert relative(ours[key], value) <= 1e-6, key  # 1 / 1.7 rounds once more
    with pytest.raises(ValueError, match=r"temperature: expected shape \(29,\), got \(28,\)"):
        run(backend, spec, leaves, fields, temperature=torch.ones(T - 1, device=DEVICE))


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("name", SPECS)
def test_a_references_own_head(backend, name):
    leaves, fields = inputs()
    del fields["ref_logprob"]
    ref_hidden, ref_weight, ref_bias = (0.7 * leaves[k].detach() for k in list(leaves)[:3])
    spec = SPECS[name]
    head = {"softcap": spec.softcap, "logit_scale": spec.logit_scale, "backend": backend}

    def given(weight, bias):
        ref = pyrl.linear_logprob(
            ref_hidden, weight, fields["target"], bias=bias, mask=fields["mask"], **head
        )
        return run(backend, spec, leaves, {**fields, "ref_logprob": ref.logprob.detach()})

    weight, bias = leaves["weight"].detach(), leaves["bias"].detach()
    for options, expected in (
        ({}, given(weight, bias)),  # the policy's head, without its adapter
        ({"ref_weight": ref_weight}, given(ref_weight, bias)),
        ({"ref_weight": ref_weight, "ref_bias": ref_bias}, given(ref_weight, ref_bias)),
    ):
        ours = run(backend, spec, leaves, fields, ref_hidden=ref_hidden, **options)
        for key, value in expected.items():
            assert torch.equal(ours[key], value), key
    assert relative(given(weight, bias)["loss"], given(ref_weight, ref_bias)["loss"]) > 1e-4
    with pytest.raises(ValueError, match="ref_weight and ref_bias need ref_hidden"):
        run(backend, spec, leaves, fields, ref_bias=ref_bias)


@pytest.mark.parametrize("backend", serving())
def test_a_frozen_head_under_an_adapter(backend):
    leaves, fields = inputs()
    everything = run(backend, SPECS["clip"], leaves, fields)
    for key in ("weight", "bias"):
        leaves[key].requires_grad_(False)
    ours = run(backend, SPECS["clip"], leaves, fields)
    assert ours["weight"] is None and ours["bias"] is None
    for key in ("loss", "hidden", "a", "b"):
        assert torch.equal(ours[key], everything[key]), key


@pytest.mark.parametrize("backend", serving())
def test_a_tied_head_trains_the_embedding_twice(backend):
    g = torch.Generator().manual_seed(0)
    _, fields = inputs()
    table = (torch.randn(V, D, generator=g) / 2).to(DEVICE).requires_grad_()
    ids = torch.randint(0, V, (T,), generator=g).to(DEVICE)

    def gradient(embedding, head):
        table.grad = None
        hidden = torch.nn.functional.embedding(ids, embedding).tanh()
        loss = pyrl.linear_policy_loss(hidden, head, spec=SPECS["clip"], backend=backend, **fields)
        loss.loss.backward()
        return table.grad.clone()

    parts = gradient(table, table.detach()) + gradient(table.detach(), table)
    assert relative(gradient(table, table), parts) <= 1e-6  # one more fp32 addition


@pytest.mark.parametrize("backend", [b for b in serving() if b != "torch"])
def test_fullgraph_with_an_adapter(backend):
    leaves, fields = inputs()
    options = {"temperature": torch.linspace(0.5, 2.0, T).to(DEVICE), "vocab_size": V - 3}
    eager = run(backend, SPECS["clip"], leaves, fields, **options)
    compiled = torch.compile(pyrl.linear_policy_loss, fullgraph=True, backend="aot_eager")
    for leaf in leaves.values():
        leaf.grad = None
    hidden, weight, bias, a, b = leaves.values()
    out = compiled(
        hidden, weight, spec=SPECS["clip"], bias=bias, lora=LoRA(a, b, 0.7), backend=backend,
        **fields, **options,
    )  # fmt: skip
    (2 * out.loss).backward()
    assert relative(out.loss, eager["loss"]) <= 1e-6
    for key, leaf in leaves.items():
        assert relative(leaf.grad, eager[key]) <= 1e-6, key
