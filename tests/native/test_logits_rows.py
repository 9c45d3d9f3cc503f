"""csrc/cpu/logits_rows*.cpp against float64 torch.

Runs for the instruction set that this CPU would choose; test_instruction_sets.py runs this file
again for the others.
"""

from __future__ import annotations

import math

import pytest
import torch

from pyrl import _native

if _native.native_reason() is not None:
    pytest.skip(_native.native_reason(), allow_module_level=True)

ops = torch.ops.pyrl_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 1 and 3: less than a vector. 64, 1024: whole vectors and blocks. The rest end in between.
VOCABULARIES = (1, 3, 17, 64, 1023, 1024, 1025, 32001)
# (logit_scale, softcap, temperature): none, Gemma-like, Cohere-like, and negative scales, the last
# with exponentials that a cap of 300 away from the row's maximum would lose.
TRANSFORMS = (
    (1.0, 0.0, 1.0), (1.0, 30.0, 0.7), (0.0625, 0.0, 1.3), (-2.0, 5.0, 1.0), (-0.5, 0.0, 1.0),
    (-0.1, 300.0, 1.0),
)  # fmt: skip


def oracle(z, target, inv_temperature, logit_scale, softcap):
    """float64 logprob, entropy, lse of raw logits, differentiable."""
    u = z * logit_scale
    s = softcap * torch.tanh(u / softcap) if softcap else u
    x = s * inv_temperature.double()[:, None]
    lse = x.logsumexp(1)
    logp = x - lse[:, None]
    p = logp.exp()
    entropy = -torch.where(p > 0, p * torch.where(p > 0, logp, 0.0), 0.0).sum(1)
    return logp.gather(1, target[:, None])[:, 0], entropy, lse


def oracle_grad(z, target, inv_temperature, logit_scale, softcap, c, h, g):
    z = z.double().requires_grad_()
    logprob, entropy, lse = oracle(z, target, inv_temperature, logit_scale, softcap)
    (grad,) = torch.autograd.grad((logprob * c + entropy * h + lse * g).sum(), z)
    return grad


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def rows(n, V, dtype, seed=0, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randn(n, V, generator=generator) * 4).to(dtype)
    target = torch.randint(V, (n,), generator=generator)
    # Every row has its own temperature.
    inv_temperature = 1 / (temperature * (1 + 0.1 * torch.rand(n, generator=generator)))
    c, h, g = torch.randn(3, n, generator=generator)
    return z, target, inv_temperature, c, h, g


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_and_gradient(dtype, V, transform):
    scale, softcap, temperature = transform
    z, target, inv_temperature, c, h, g = rows(5, V, dtype, temperature=temperature)
    expected = oracle(z.double(), target, inv_temperature, scale, softcap)
    stats = ops.logits_stats(z, target, inv_temperature, scale, softcap)
    # fp32 sums whatever the logits' dtype: the bound of fp32, plus the rounding of a number of the
    # size of the logits (a certain row's logprob and entropy are 0).
    for name, a, e in zip(("logprob", "entropy", "lse"), stats, expected, strict=True):
        assert (a.double() - e).norm() <= 5e-6 * e.norm() + 1e-6 * math.sqrt(len(z)), name

    grad = oracle_grad(z, target, inv_temperature, scale, softcap, c, h, g)
    written = z.clone()
    _, entropy, lse = stats
    ops.logits_grad_(written, target, inv_temperature, scale, softcap, lse, entropy, c, h, g)
    # Nothing but the rounding of the result to its dtype, and fp32's own bound.
    rounding = (grad.to(dtype).double() - grad).norm()
    assert (written.double() - grad).norm() <= rounding + 5e-6 * grad.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_g_and_without_h(dtype):
    z, target, inv_temperature, c, h, g = rows(4, 301, dtype)
    _, entropy, lse = ops.logits_stats(z, target, inv_temperature, 1.0, 0.0)
    for bonus in (h, torch.zeros_like(h)):
        a, b = z.clone(), z.clone()
        zero = torch.zeros_like(g)
        ops.logits_grad_(a, target, inv_temperature, 1.0, 0.0, lse, entropy, c, bonus, None)
        ops.logits_grad_(b, target, inv_temperature, 1.0, 0.0, lse, entropy, c, bonus, zero)
        assert torch.equal(a, b)
        grad = oracle_grad(z, target, inv_temperature, 1.0, 0.0, c, bonus, zero)
        assert (a.double() - grad).norm() <= (grad.to(dtype) - grad).norm() + 5e-6 * grad.norm()


@pytest.mark.parametrize("softcap", (0.0, 30.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity(dtype, softcap):
    """-inf logits have p = 0 and no gradient; a capped one is only -softcap, as in torch."""
    z, target, inv_temperature, c, h, g = rows(6, 1500, dtype, seed=1)
    z[:, ::3] = -math.inf
    target[:3] = torch.tensor([3, 4, 1499])  # row 0's target is impossible
    expected = oracle(z.double(), target, inv_temperature, 1.0, softcap)
    logprob, entropy, lse = ops.logits_stats(z, target, inv_temperature, 1.0, softcap)
    torch.testing.assert_close(logprob.double(), expected[0], rtol=5e-6, atol=0)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=5e-6, atol=0)
    torch.testing.assert_close(lse.double(), expected[2], rtol=5e-6, atol=0)
    assert (logprob[0] == -math.inf) == (softcap == 0)

    written = z.clone()
    ops.logits_grad_(written, target, inv_temperature, 1.0, softcap, lse, entropy, c, h, g)
    assert written.isfinite().all()
    masked = torch.zeros_like(z, dtype=torch.bool)
    masked[:, ::3] = True
    masked[0, 3] = False
    assert (written[masked] == 0).all()
    if softcap == 0:  # the impossible target still gets c, as 1[v = target] - p_v says
        assert written[0, 3] == (c[0] * inv_temperature[0]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", (1, 17, 3000))
def test_a_row_of_minus_infinity(V, dtype):
    z = torch.full((2, V), -math.inf, dtype=dtype)
    z[1] = 0
    target, one = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    logprob, entropy, lse = ops.logits_stats(z, target, one, 1.0, 0.0)
    assert lse[0] == logprob[0] == -math.inf and entropy[0] == 0
    assert lse[1].item() == pytest.approx(math.log(V), rel=1e-6, abs=1e-7)
    written = z.clone()
    ops.logits_grad_(written, target, one, 1.0, 0.0, lse, entropy, one * 0.5, one, one)
    assert written[0, 0] == 0.5 and (written[0, 1:] == 0).all()


def test_a_certain_row_has_exact_zeros():
    z = torch.full((1, 5000), -1e4)
    z[0, 4321] = 1e4
    target, one = torch.tensor([4321]), torch.ones(1)
    logprob, entropy, lse = ops.logits_stats(z, target, one, 1.0, 0.0)
    assert logprob.item() == 0 and entropy.item() == 0 and lse.item() == 1e4
    ops.logits_grad_(z, target, one, 1.0, 0.0, lse, entropy, one, one, None)
    assert (z == 0).all()


@pytest.mark.parametrize("softcap", (0.0, 10.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_coefficients_are_exact_zeros(dtype, softcap):
    """Whatever they and their statistics hold; other rows are untouched by it."""
    z, target, inv_temperature, c, h, g = rows(4, 1030, dtype, seed=2)
    _, entropy, lse = ops.logits_stats(z, target, inv_temperature, 1.0, softcap)
    clean = z.clone()
    arguments = (target, inv_temperature, 1.0, softcap)
    ops.logits_grad_(clean, *arguments, lse, entropy, c, h, g)
    for v in (c, h, g):
        v[2] = 0
    z[2] = math.nan
    lse[2], entropy[2] = math.inf, math.nan
    ops.logits_grad_(z, *arguments, lse, entropy, c, h, g)
    assert (z[2] == 0).all()
    kept = [0, 1, 3]
    assert torch.equal(z[kept], clean[kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", (0, 700, 1300))
def test_nan_logits_are_not_hidden(dtype, position):
    z, target, inv_temperature, *_ = rows(2, 1301, dtype)
    z[0, :] = -math.inf
    z[0, position] = math.nan
    logprob, entropy, lse = ops.logits_stats(z, target, inv_temperature, 1.0, 0.0)
    assert lse[0].isnan() and entropy[0].isnan() and logprob[0].isnan()
    assert lse[1].isfinite()


def test_exp_is_accurate_to_two_in_ten_million():
    """c = h = 0, g = 1, lse = 0: the gradient is exp(z) itself."""
    z = torch.linspace(-87.33, 0, 1_000_001)[None]
    expected = z[0].double().exp()
    zero, one = torch.zeros(1), torch.ones(1)
    ops.logits_grad_(
        z, torch.zeros(1, dtype=torch.int64), one, 1.0, 0.0, zero, zero, zero, zero, one
    )
    error = ((z[0].double() - expected) / expected).abs().max().item()
    assert error <= 2e-7


def test_tanh_is_accurate_to_four_in_ten_million():
    """Through lse of a one-token vocabulary: softcap * tanh(z / softcap)."""
    z = torch.cat([torch.linspace(-12, 12, 200_001), torch.logspace(-30, 1, 10_001)])[:, None]
    expected = z[:, 0].double().tanh()
    one = torch.ones(len(z))
    _, _, lse = ops.logits_stats(z, torch.zeros(len(z), dtype=torch.int64), one, 1.0, 1.0)
    nonzero = expected != 0
    error = ((lse.double() - expected) / expected)[nonzero].abs().max().item()
    assert error <= 4e-7
    assert lse[~nonzero].eq(0).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_16_bit_logit_is_read_exactly(dtype):
    z = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None].contiguous()
    one = torch.ones(len(z))
    _, _, lse = ops.logits_stats(z, torch.zeros(len(z), dtype=torch.int64), one, 1.0, 0.0)
    finite = z[:, 0].isfinite()
    assert torch.equal(lse[finite], z[finite, 0].float())
    assert lse[z[:, 0].isnan()].isnan().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_gradients_are_rounded_as_torch_rounds(dtype):
    """z = lse = 0: p is 1 and the gradient is g, bit for bit, ties, subnormals and NaN included."""
    bits = torch.randint(-(2**31), 2**31 - 1, (40_000,), generator=torch.Generator().manual_seed(3))
    ties = torch.arange(0, 2**16) * 2**16 + 2**15 - 2**31  # half-way between bf16 neighbours
    ties16 = torch.arange(0, 2**14) * 2**13 + 2**12 + (0x38000000 - 2**26)
    g = torch.cat([bits, ties, ties16]).to(torch.int32).view(torch.float32)
    canonical = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # a GPU's NaN
    g = torch.cat([g, canonical, torch.tensor([math.inf, -math.inf, 0.0, 65519.0, 65520.0])])
    g = g[g != 0]
    n = len(g)
    z, zero = torch.zeros(n, 33, dtype=dtype), torch.zeros(n)
    target = torch.arange(n) % 33
    ops.logits_grad_(z, target, torch.ones(n), 1.0, 0.0, zero, zero, zero, zero, g)
    expected = g.to(dtype)[:, None].expand(-1, 33)
    assert torch.equal(z.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(z[number].view(torch.int16), expected[number].contiguous().view(torch.int16))


def test_threads_do_not_change_bits():
    z, target, inv_temperature, c, h, g = rows(37, 9001, torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            stats = ops.logits_stats(z, target, inv_temperature, 1.0, 0.0)
            w = z.clone()
            ops.logits_grad_(w, target, inv_temperature, 1.0, 0.0, stats[2], stats[1], c, h, g)
            results.append((*stats, w))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_rows():
    z = torch.empty(0, 32001, dtype=torch.bfloat16)
    target, none = torch.empty(0, dtype=torch.int64), torch.empty(0)
    assert [t.shape for t in ops.logits_stats(z, target, none, 1.0, 0.0)] == [(0,)] * 3
    ops.logits_grad_(z, target, none, 1.0, 0.0, none, none, none, none, None)


def test_bad_arguments_are_named():
    z, target, one = torch.zeros(3, 7), torch.zeros(3, dtype=torch.int64), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"target\[1\]=7: expected a token id in \[0, 7\)"):
        ops.logits_stats(z, torch.tensor([0, 7, 0]), one, 1.0, 0.0)
    with pytest.raises(RuntimeError, match=r"target\[2\]=-100"):
        ops.logits_grad_(z, torch.tensor([0, 6, -100]), one, 1.0, 0.0, one, one, one, one, None)
    with pytest.raises(RuntimeError, match="z must be float32, bfloat16 or float16"):
        ops.logits_stats(z.double(), target, one, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="z must be a contiguous"):
        ops.logits_stats(torch.zeros(7, 3).T, target, one, 1.0, 0.0)
    with pytest.raises(RuntimeError, match=r"inv_temperature must have shape \[3\]"):
        ops.logits_stats(z, target, torch.ones(4), 1.0, 0.0)
    with pytest.raises(RuntimeError, match="h must be float32"):
        ops.logits_grad_(z, target, one, 1.0, 0.0, one, one, one, one.double(), None)
    with pytest.raises(RuntimeError, match="empty vocabulary"):
        ops.logits_stats(torch.zeros(3, 0), target, one, 1.0, 0.0)


def test_opcheck():
    z, target, inv_temperature, c, h, g = rows(3, 40, torch.float32)
    torch.library.opcheck(ops.logits_stats, (z, target, inv_temperature, 1.0, 0.0))
    _, entropy, lse = ops.logits_stats(z, target, inv_temperature, 1.0, 0.0)
    for last in (g, None):
        torch.library.opcheck(
            ops.logits_grad_, (z, target, inv_temperature, 1.0, 0.0, lse, entropy, c, h, last)
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("inv_temperature", (0.5, 1.0))
def test_tokens_masked_by_the_least_finite_number(dtype, inv_temperature):
    """As models mask padded vocabularies. Sums begun at -3e38 add 0, not 0 * inf, to the next."""
    z, target, inv, c, h, g = rows(3, 5000, dtype)
    z[:, :4000], target = torch.finfo(dtype).min, target % 1000 + 4000
    inv, h = torch.full_like(inv, inv_temperature), 4 * h
    stats = ops.logits_stats(z, target, inv, 1.0, 0.0)
    for ours, theirs in zip(stats, oracle(z.double(), target, inv, 1.0, 0.0), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6)
    exact = oracle_grad(z, target, inv, 1.0, 0.0, c, h, g)
    ops.logits_grad_(z, target, inv, 1.0, 0.0, stats[2], stats[1], c, h, g)
    rounding = (exact.to(dtype).double() - exact).norm()
    assert (z.double() - exact).norm() <= rounding + 5e-6 * exact.norm()
