"""Deterministic mode: the same bits from any packing, padding, order of rows and chunk size.

B = 7 sequences of 0 to 40 tokens, 150 in all: more than one GEMM tile of 128 rows, the last one
part full. V = 301 and D = 24: odd against every block of rows, columns and depth.
"""

import dataclasses

import pytest
import torch

import pyrl
from pyrl import LossSpec, Support
from pyrl.ops import deterministic, linear_logprob
from pyrl.parity import DEVICE, serving

LENGTHS, V, D = (40, 1, 0, 33, 17, 21, 38), 301, 24
SPECS = {
    "clip": LossSpec(kl_coef=0.1, entropy_coef=0.01),
    "gspo": LossSpec(ratio_level="sequence", kl_coef=0.1, aggregation="sequence_mean"),
}
BACKENDS = [b for b in serving() if b != "reference"]


@pytest.fixture(autouse=True)
def mode():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def batch(dtype):
    g = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    tokens = {
        "hidden": torch.randn(n, D, generator=g).to(dtype),
        "target": torch.randint(V, (n,), generator=g),
        "old_logprob": -5 + torch.randn(n, generator=g) / 3,
        "ref_logprob": -5 + torch.randn(n, generator=g) / 3,
        "advantages": torch.randn(n, generator=g),
        "mask": torch.rand(n, generator=g) < 0.8,
    }
    # Equal rows, which any order may swap.
    for value in tokens.values():
        value[41:45] = value[60:64]
    weight = (torch.randn(V, D, generator=g) / D**0.5).to(dtype)
    bias = torch.randn(V, generator=g).to(dtype)
    return tokens, weight, bias


def run(tokens, weight, bias, spec, backend, sequences, support=None):
    """Every output as bits, the rows' ones gathered back to the order of `LENGTHS`."""
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    order = [torch.arange(starts[s], starts[s] + LENGTHS[s]) for s in sequences]
    order = torch.cat(order).to(DEVICE)
    lengths = torch.tensor([LENGTHS[s] for s in sequences])
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(DEVICE)
    fields = {name: value.to(DEVICE)[order] for name, value in tokens.items()}
    hidden = fields.pop("hidden").requires_grad_()
    weight, bias = (v.to(DEVICE).requires_grad_() for v in (weight, bias))
    if support is not None:
        support = Support.from_masks(support.to(DEVICE)[order])
    out = pyrl.linear_policy_loss(
        hidden, weight, fields.pop("target"), fields.pop("advantages"), spec, bias=bias,
        cu_seqlens=cu, denominator=100, support=support, backend=backend, **fields,
    )  # fmt: skip
    out.loss.backward()
    rows = [torch.empty_like(v) for v in (out.logprob, out.entropy, hidden.grad)]
    for back, value in zip(rows, (out.logprob, out.entropy, hidden.grad), strict=True):
        back[order] = value
    return [out.loss.detach(), *out.metrics.values(), *rows, weight.grad, bias.grad]


def equal(ours, theirs):
    return [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_order_of_sequences(backend, spec, dtype):
    tokens, weight, bias = batch(dtype)
    expected = run(tokens, weight, bias, spec, backend, range(7))
    for sequences in ((6, 5, 4, 3, 2, 1, 0), (3, 0, 2, 6, 1, 5, 4)):
        assert all(equal(run(tokens, weight, bias, spec, backend, sequences), expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mode_is_what_makes_it_so(backend):
    """Without it the sum over rows follows their order, and a last bit of dweight with it."""
    tokens, weight, bias = batch(torch.float32)
    torch.use_deterministic_algorithms(False)
    one = run(tokens, weight, bias, SPECS["clip"], backend, range(7))
    other = run(tokens, weight, bias, SPECS["clip"], backend, (6, 5, 4, 3, 2, 1, 0))
    assert not all(equal(one, other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_and_packed(backend):
    tokens, weight, bias = batch(torch.float32)
    spec, n = SPECS["gspo"], max(LENGTHS)
    expected = run(tokens, weight, bias, spec, backend, range(7))
    keep = torch.arange(n) < torch.tensor(LENGTHS)[:, None]
    fields = {}
    for name, value in tokens.items():
        fields[name] = value.new_zeros(*keep.shape, *value.shape[1:])
        fields[name][keep] = value
        fields[name] = fields[name].to(DEVICE)
    hidden = fields.pop("hidden").requires_grad_()
    weight, bias = (v.to(DEVICE).requires_grad_() for v in (weight, bias))
    out = pyrl.linear_policy_loss(
        hidden, weight, fields.pop("target"), fields.pop("advantages"), spec, bias=bias,
        denominator=100, backend=backend, **fields,
    )  # fmt: skip
    out.loss.backward()
    ours = [out.loss.detach(), *out.metrics.values()]
    ours += [v[keep.to(DEVICE)] for v in (out.logprob, out.entropy, hidden.grad)]
    assert all(equal([*ours, weight.grad, bias.grad], expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_a_support(backend):
    tokens, weight, bias = batch(torch.float32)
    support = torch.rand(sum(LENGTHS), V, generator=torch.Generator().manual_seed(1)) < 0.1
    support.scatter_(1, tokens["target"][:, None], True)
    support[41:45] = support[60:64]
    results = [
        run(tokens, weight, bias, SPECS["clip"], backend, order, support)
        for order in (range(7), (6, 5, 4, 3, 2, 1, 0))
    ]
    assert all(equal(*results))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others(backend):
    """Log-prob, entropy and dhidden of 20 rows alone and among 150; any chunk size."""
    tokens, weight, bias = batch(torch.float32)
    results = []
    for rows in (slice(None), slice(100, 120)):
        hidden = tokens["hidden"][rows].to(DEVICE).requires_grad_()
        target = tokens["target"][rows].to(DEVICE)
        w, b = weight.to(DEVICE), bias.to(DEVICE)
        out = pyrl.linear_logprob(hidden, w, target, bias=b, backend=backend)
        (out.logprob + 0.3 * out.entropy).sum().backward()
        results.append([v.detach() for v in (*out, hidden.grad)])
    assert all(torch.equal(a[100:120], b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("case", ["no token", "all masked", "no advantage"])
def test_nothing_to_learn_from(backend, spec, case):
    tokens, weight, bias = batch(torch.float32)
    sequences = (2,) if case == "no token" else range(7)
    if case == "all masked":
        tokens["mask"][:] = False
    if case == "no advantage":
        tokens["advantages"][:], spec = 0, dataclasses.replace(spec, kl_coef=0, entropy_coef=0)
    loss, *_, dweight, dbias = run(tokens, weight, bias, spec, backend, sequences)
    assert not loss and not dweight.any() and not dbias.any()


def test_chunk_bytes_do_not_matter(monkeypatch):
    tokens, weight, bias = batch(torch.bfloat16)
    expected = run(tokens, weight, bias, SPECS["clip"], BACKENDS[0], range(7))
    monkeypatch.setattr(linear_logprob, "CHUNK_BYTES", {DEVICE.type: 10 * V})
    assert all(equal(run(tokens, weight, bias, SPECS["clip"], BACKENDS[0], range(7)), expected))


def test_hashes_see_every_bit_and_place():
    x = torch.zeros(3, 5)
    x[1, 2] = -0.0  # equal as a number, not as bits
    x[2, 4] = -0.0
    assert len(set(deterministic.hashes(x).tolist())) == 3
    assert len(set(deterministic.hashes(torch.tensor([1, 2]), torch.tensor([2, 1])).tolist())) == 2
