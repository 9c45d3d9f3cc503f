"""Heads that are more than hidden @ weight.T: low-rank, padded, frozen, per-token temperature."""

import pytest
import torch

import pyrl
from pyrl import LoRA
from pyrl.ops import reference
from pyrl.ops.linear_logprob import inv_temperature
from pyrl.parity import DEVICE, MARGIN, relative, serving

# V: past one vector and one tile, a multiple of neither. R = 3: no power of two either.
T, D, V, R = 37, 24, 1031, 3
DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("hidden", "weight", "bias", "a", "b")


def inputs(dtype=torch.float32, adapter=None):
    """Leaves (the adapter in its own dtype), target, mask and coefficients of the outputs."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype, scale=1.0):
        return (scale * torch.randn(*shape, generator=g)).to(DEVICE, dtype).requires_grad_()

    adapter = adapter or dtype
    leaves = {
        "hidden": normal(T, D),
        "weight": normal(V, D, scale=0.5),
        "bias": normal(V),
        "a": normal(R, D, dtype=adapter),
        "b": normal(V, R, dtype=adapter, scale=0.3),
    }
    rest = {
        "target": torch.randint(0, V - 20, (T,), generator=g).to(DEVICE),
        "mask": (torch.rand(T, generator=g) > 0.3).to(DEVICE),
    }
    return leaves, rest, torch.randn(3, T, generator=g).to(DEVICE)


def backward(out, coefficients, leaves):
    for leaf in leaves.values():
        leaf.grad = None
    sum((c * v).sum() for c, v in zip(coefficients, out, strict=True)).backward()
    grads = {k: v.grad for k, v in leaves.items()}
    return {**{k: v.detach() for k, v in out._asdict().items()}, **grads}


def lora_run(backend, leaves, rest, coefficients, **options):
    hidden, weight, bias, a, b = leaves.values()
    out = pyrl.linear_logprob(
        hidden, weight, bias=bias, lora=LoRA(a, b, 0.7), backend=backend, **rest, **options
    )
    return backward(out, coefficients, leaves)


def merged_run(leaves, rest, coefficients, **options):
    """The oracle on the merged weight, in float64; a and b get their gradients from the merge."""
    exact = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    hidden, weight, bias, a, b = exact.values()
    target, mask = rest["target"], rest["mask"]
    inv = inv_temperature(options.get("temperature", 1.0), target)
    cap, scale = options.get("softcap", 0.0), options.get("logit_scale", 1.0)
    out = reference.linear_logprob(
        hidden, weight + 0.7 * b @ a, target, bias, inv, cap, scale, mask
    )
    return backward(pyrl.LogProb(*out), coefficients, exact)


def plain_run(leaves, rest, coefficients, *, temperature=1.0, softcap=None, logit_scale=1.0):
    """peft's way in plain torch, in the leaves' dtypes: its error is the yardstick."""
    copies = {k: v.detach().requires_grad_() for k, v in leaves.items()}
    hidden, weight, bias, a, b = copies.values()
    linear = torch.nn.functional.linear
    z = linear(hidden, weight, bias) + 0.7 * linear(linear(hidden, a), b)
    z = z.float() * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    logp = z.log_softmax(-1)
    chosen = logp.gather(1, rest["target"][:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    out = [torch.where(rest["mask"], v, 0.0) for v in (chosen, entropy, z.logsumexp(-1))]
    return backward(pyrl.LogProb(*out), coefficients, copies)


def assert_parity(ours, usual, exact, dtype):
    for key, truth in exact.items():
        bound = relative(usual[key], truth) + MARGIN[dtype]
        assert relative(ours[key], truth) <= bound, (key, relative(ours[key], truth), bound)


OPTIONS = {
    "plain": {},
    "all": {"temperature": torch.linspace(0.5, 2, T), "softcap": 15.0, "logit_scale": 0.5},
}


@pytest.mark.parametrize("backend", [*serving(), "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [None, 7], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("options", OPTIONS)
def test_lora_equals_the_merged_weight(backend, dtype, chunk, options, monkeypatch):
    if chunk is not None:
        size = 4 if DEVICE.type == "cuda" else dtype.itemsize
        limit = dict.fromkeys(("cpu", "cuda"), chunk * V * size)
        monkeypatch.setattr("pyrl.ops.linear_logprob.CHUNK_BYTES", limit)
    args = inputs(dtype)
    options = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[options].items()
    }
    ours = lora_run(backend, *args, **options)
    assert_parity(ours, plain_run(*args, **options), merged_run(*args, **options), dtype)


@pytest.mark.parametrize("backend", serving())
def test_fp32_adapters_over_a_bf16_model(backend):
    leaves, rest, coefficients = inputs(torch.bfloat16)
    half = lora_run(backend, leaves, rest, coefficients)
    for key in ("a", "b"):
        leaves[key] = leaves[key].detach().float().requires_grad_()
    ours = lora_run(backend, leaves, rest, coefficients)
    for key, value in half.items():
        assert ours[key].dtype == (torch.float32 if key in ("a", "b") else value.dtype), key
        assert torch.equal(ours[key].to(value.dtype), value), key  # only not rounded at the end
    assert not torch.equal(ours["b"], half["b"].float())


@pytest.mark.parametrize("backend", serving())
def test_lora_never_reads_masked_rows(backend):
    leaves, rest, coefficients = inputs()
    with torch.no_grad():
        leaves["hidden"][~rest["mask"]] = torch.nan
    out = lora_run(backend, leaves, rest, coefficients)
    assert all(bool(v.isfinite().all()) for v in out.values())


def products(events):
    """Shapes of the results of all matrix products in a profile."""
    shapes = []
    for event in events:
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            first = event.name != "aten::mm"  # addmm's own is what it adds to
            left, right = event.input_shapes[first : first + 2]
            shapes.append((left[0], right[1]))
    return shapes


@pytest.mark.parametrize("backend", serving())
@pytest.mark.parametrize("frozen", NAMES)
def test_a_frozen_part_costs_no_product(backend, frozen):
    leaves, rest, coefficients = inputs()
    everything = lora_run(backend, leaves, rest, coefficients)
    leaves[frozen].requires_grad_(False)
    with torch.profiler.profile(record_shapes=True) as seen:
        ours = lora_run(backend, leaves, rest, coefficients)
    shapes = products(seen.events())
    assert ours[frozen] is None
    for key in set(NAMES) - {frozen}:
        assert torch.equal(ours[key], everything[key]), key
    n = int(rest["mask"].sum())
    for key, shape in (("weight", (V, D)), ("a", (R, D)), ("b", (V, R))):
        assert (shape in shapes) == (key != frozen), key
    assert ((n, D) in shapes) == (frozen != "hidden")
    assert (n, V) in shapes


@pytest.mark.parametrize("backend", [*serving(), "reference"])
def test_a_padded_vocabulary_is_neither_read_nor_trained(backend):
    leaves, rest, coefficients = inputs()
    ours = lora_run(backend, leaves, rest, coefficients, vocab_size=V - 20)
    cut = {
        k: v.detach()[: V - 20].requires_grad_() if k in ("weight", "bias", "b") else v
        for k, v in leaves.items()
    }
    expected = lora_run(backend, cut, rest, coefficients)
    minus = leaves["bias"].detach().clone()
    minus[V - 20 :] = -torch.inf
    by_bias = lora_run(backend, {**leaves, "bias": minus.requires_grad_()}, rest, coefficients)
    for key, value in expected.items():
        whole = ours[key]
        if key in ("weight", "bias", "b"):
            assert not whole[V - 20 :].any()
            whole, by_bias[key] = whole[: V - 20], by_bias[key][: V - 20]
        assert torch.equal(whole, value), key
        assert relative(by_bias[key], value) <= 1e-6, key  # fp32 sums of other tiles
    with torch.no_grad():
        leaves["weight"][V - 20 :] = torch.nan  # what padding holds does not matter
    again = lora_run(backend, leaves, rest, coefficients, vocab_size=V - 20)
    assert all(torch.equal(again[key], ours[key]) for key in ours)


@pytest.mark.parametrize("backend", serving())
def test_a_target_in_the_padding_is_an_error(backend):
    leaves, rest, _ = inputs()
    rest["target"][5], rest["mask"][5] = V - 20, True
    with pytest.raises(ValueError, match=rf"target\[5\] = {V - 20} .*\[0, {V - 20}\)"):
        pyrl.linear_logprob(
            leaves["hidden"], leaves["weight"], vocab_size=V - 20, backend=backend, **rest
        )


@pytest.mark.parametrize("backend", serving())
def test_a_tied_heads_gradient_adds_to_the_embeddings(backend):
    g = torch.Generator().manual_seed(0)
    table = torch.randn(V, D, generator=g).to(DEVICE).requires_grad_()
    ids, target = (torch.randint(0, V, (T,), generator=g).to(DEVICE) for _ in range(2))

    def gradient(embedding, head):
        table.grad = None
        hidden = torch.nn.functional.embedding(ids, embedding).tanh()
        pyrl.linear_logprob(hidden, head, target, backend=backend).logprob.sum().backward()
        return table.grad.clone()

    parts = gradient(table, table.detach()) + gradient(table.detach(), table)
    assert relative(gradient(table, table), parts) <= 1e-6  # one more fp32 addition


def test_bad_heads_name_themselves():
    leaves, rest, _ = inputs()
    hidden, weight, _, a, b = (v.detach() for v in leaves.values())
    for lora, message in (
        (LoRA(a[:, 1:], b), rf"lora.a: expected shape \({R}, {D}\), got \({R}, {D - 1}\)"),
        (LoRA(a, b[1:]), rf"lora.b: expected shape \({V}, {R}\), got \({V - 1}, {R}\)"),
        (LoRA(a[1:], b), rf"lora.b: expected shape \({V}, {R - 1}\)"),
        (LoRA(a[0], b), "lora.a: expected a matrix of floats"),
        (LoRA(a.long(), b), "lora.a: .*int64"),
        (LoRA(a, b, float("nan")), "lora.scale=nan: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            pyrl.linear_logprob(hidden, weight, lora=lora, **rest)
    for size in (0, -1, V + 1):
        with pytest.raises(ValueError, match=rf"vocab_size={size}: expected 1 to {V}"):
            pyrl.linear_logprob(hidden, weight, vocab_size=size, **rest)
