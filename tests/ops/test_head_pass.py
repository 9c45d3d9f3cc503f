"""The fused pass of a head: how it cuts rows and memory, and that it is the torch pass' equal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrl
from pyrl.ops import head_pass
from pyrl.ops.backends import cpu
from pyrl.ops.head_pass import CACHED_ROWS, LANES, LINE, SUMMED_ROWS, plan
from pyrl.ops.linear_logprob import CHUNK_BYTES, _linear_logprob_backward
from pyrl.parity import MARGIN, relative

MIB = 1 << 20
fused = pytest.mark.skipif(
    cpu.unavailable_reason() is not None or not cpu.has_head_kernels(torch.float32),
    reason="no kernels of whole heads for this CPU",
)


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(0, 5000), vocab=st.integers(1, 200_000), dim=st.integers(1, 4096),
    size=st.sampled_from([2, 4]), scratch=st.integers(1, 128 * MIB),
    threads=st.sampled_from([1, 2, 64]), weight=st.booleans(),
)  # fmt: skip
def test_plan_covers_every_row_once(n, vocab, dim, size, scratch, threads, weight):
    cut = plan(n, vocab, dim, size, scratch, threads, weight)
    assert [i for c in cut.chunks for i in (c.start, c.stop)][1:-1:2] == [
        c.start for c in cut.chunks[1:]
    ]
    assert (cut.chunks[0].start, cut.chunks[-1].stop) == (0, n) if n else cut.chunks == []
    summed = weight and size == 2
    least = (-(-dim // LINE) * LINE if summed else 0) + size * (SUMMED_ROWS if summed else LANES)
    assert cut.width * vocab <= max(scratch, least * vocab)
    assert cut.near <= dim and cut.near % LANES == 0 and (weight or cut.near == 0)
    assert bool(cut.low) == (weight and size == 2 and len(cut.chunks) > 1)
    assert cut.low % LINE == 0 and cut.width % LINE == 0
    for c in cut.chunks:
        assert c.start % LANES == 0 and c.start < c.stop <= c.start + CACHED_ROWS
        inside = cut.near if c.start == 0 else 0
        room = cut.width - (cut.low if c.start else 0)
        assert -(-max(c.stop - c.start - inside, 0) // LANES) * LANES * size <= room


def test_plan_of_the_benchmarked_shapes():
    budget = CHUNK_BYTES["cpu"]
    for size, n, chunks in ((4, 2048, 6), (2, 2048, 5), (4, 1024, 2), (2, 1024, 1)):
        assert len(plan(n, 49152, 576, size, budget, 2, True).chunks) == chunks
    # A small head: equal chunks, and no more scratch than they take.
    small = plan(8191, 4000, 256, 2, budget, 2, True)
    assert [c.stop - c.start for c in small.chunks] == [1312, *[1376] * 4, 1375]
    assert small.width == 256 + 2 * 1376
    # One chunk of a wide vocabulary needs no bits beside dweight's own.
    assert plan(1024, 151936, 896, 2, budget, 2, True).low == 0


def inputs(dtype, t=150, d=65, v=203):
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(t, d, generator=rng).to(dtype)
    weight = torch.randn(v, d, generator=rng).to(dtype)
    bias = torch.randn(v, generator=rng).to(dtype)
    target = torch.randint(v - 20, (t,), generator=rng)
    mask = torch.rand(t, generator=rng) > 0.3
    return hidden, weight, bias, target, mask, torch.randn(3, t, generator=rng)


def gradients(hidden, weight, bias, target, mask, coefficients, backend="cpu", **options):
    leaves = [None if v is None else v.detach() for v in (hidden, weight, bias)]
    needs = options.pop("needs", (True, True, True))
    for leaf, wanted in zip(leaves, needs, strict=True):
        if leaf is not None:
            leaf.requires_grad_(wanted)
    out = pyrl.linear_logprob(
        leaves[0], leaves[1], target, bias=leaves[2], mask=mask, backend=backend, **options
    )
    sum((c * v).sum() for c, v in zip(coefficients, out, strict=True)).backward()
    return [*(v.detach() for v in out), *(None if v is None else v.grad for v in leaves)]


def assert_as_good(monkeypatch, args, dtype, **options):
    """By the rule: the fused pass' error against the torch pass' own."""
    ours = gradients(*args, **options)
    exact = gradients(*args, backend="reference", **options)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "has_head_kernels", lambda dtype: False)
        usual = gradients(*args, **options)
    for a, b, c in zip(ours, usual, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape
            assert relative(a, c) <= relative(b, c) + MARGIN[dtype]


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [1, 203 * 100, 1 << 26], ids=str)
def test_as_good_as_the_torch_pass(monkeypatch, dtype, budget):
    monkeypatch.setattr("pyrl.ops.linear_logprob.CHUNK_BYTES", {"cpu": budget})
    args = inputs(dtype)
    assert_as_good(monkeypatch, args, dtype, vocab_size=190, softcap=20.0, temperature=0.7)
    assert_as_good(monkeypatch, args, dtype, needs=(True, False, False))
    assert_as_good(monkeypatch, args, dtype, needs=(False, True, False))
    hidden, weight, _, *rest = args
    across = hidden.T.contiguous().T, weight.T.contiguous().T
    assert_as_good(monkeypatch, (*across, None, *rest), dtype, needs=(True, True, False))


@fused
def test_a_weight_of_another_dtype_keeps_its_own(monkeypatch):
    hidden, weight, *rest = inputs(torch.bfloat16)
    args = (hidden, weight.float(), *rest)
    used = []
    fused_pass = head_pass.FusedPass
    monkeypatch.setattr(head_pass, "FusedPass", lambda *a: used.append(a[3]) or fused_pass(*a))
    assert gradients(*args)[4].dtype == torch.float32
    assert not any(used)  # the forward alone


@pytest.mark.skipif(
    cpu.unavailable_reason() is not None or not cpu.has_head_kernels(torch.bfloat16),
    reason="no bf16 kernels of whole heads for this CPU",
)
def test_one_ranks_part_is_fp32():
    hidden, weight, bias, target, mask, (c, h, g) = inputs(torch.bfloat16)
    none = (None, None)
    entropy = lse = torch.full(target.shape, 4.0)
    one = torch.ones(target.shape)

    def run(partial):
        return _linear_logprob_backward(
            hidden, weight, target, bias, *none, one, mask, *none, entropy, lse, c, h, g, 1.0, 0.0,
            1.0, len(weight), "cpu", [True, True, True, False, False], partial,
        )  # fmt: skip

    part, whole = run(True), run(False)
    assert [v.dtype for v in part[:4]] == [torch.float32, *[torch.bfloat16] * 2, torch.float32]
    assert torch.equal(part[0].bfloat16(), whole[0])


@fused
def test_nothing_kept():
    hidden, weight, bias, target, mask, c = inputs(torch.float32)
    _, _, _, dx, dw, db = gradients(hidden, weight, bias, target, mask & False, c)
    assert not dx.any() and not dw.any() and not db.any()
