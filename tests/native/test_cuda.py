"""csrc/cuda on a GPU against the CPU kernels, which the other files hold against float64."""

from __future__ import annotations

import math

import pytest
import torch

from pyrl import _native
from pyrl.ops.spec import LossSpec

pytestmark = pytest.mark.gpu
if _native.cuda_reason() is not None:
    pytest.skip(_native.cuda_reason(), allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

ops = torch.ops.pyrl_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Two fp32 roundings of the same number; the dtype's own spacing for what is written to 16 bits.
SPACING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def on_gpu(*tensors):
    return [None if t is None else t.cuda() for t in tensors]


def close(actual, expected, rtol=2e-6, atol=2e-6):
    torch.testing.assert_close(actual.cpu(), expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("transform", ((1.0, 0.0), (-2.0, 5.0)), ids=str)
@pytest.mark.parametrize("V", (1, 3, 17, 4096, 32001, 151936))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype, V, transform):
    torch.manual_seed(V)
    n = 9
    z = (torch.randn(n, V) * 4).to(dtype)
    z[0, ::3], z[1] = -math.inf, -math.inf
    target, inv_temperature = torch.randint(V, (n,)), torch.rand(n) + 0.5
    c, h, g = torch.randn(3, n)
    c[2] = h[2] = g[2] = 0
    expected = ops.logits_stats(z, target, inv_temperature, *transform)
    gpu = on_gpu(z, target, inv_temperature)
    actual = ops.logits_stats(*gpu, *transform)
    for a, e in zip(actual, expected, strict=True):
        close(a, e)
    _, entropy, lse = expected
    ops.logits_grad_(z, target, inv_temperature, *transform, lse, entropy, c, h, g)
    ops.logits_grad_(*gpu, *transform, *on_gpu(lse, entropy, c, h, g))
    close(gpu[0], z, rtol=SPACING[dtype], atol=1e-6)
    assert (gpu[0][2] == 0).all()


def test_a_matrix_of_more_than_two_billion_logits():
    """Offsets are 64-bit: the last rows of a chunk beyond 2^31 elements."""
    n, V = 70_000, 32_000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n * V:
        pytest.skip("needs 13 GB")
    z = torch.zeros(n, V, dtype=torch.bfloat16, device="cuda")
    target, one = torch.full((n,), V - 1, device="cuda"), torch.ones(n, device="cuda")
    z[-1, -1] = 5
    logprob, entropy, lse = ops.logits_stats(z, target, one, 1.0, 0.0)
    close(lse[:-1], torch.full((n - 1,), math.log(V)))
    close(lse[-1], torch.tensor(math.log(V - 1 + math.exp(5))))
    ops.logits_grad_(z, target, one, 1.0, 0.0, lse, entropy, one, 0 * one, None)
    assert z[-1, -1].item() == pytest.approx(1 - math.exp(logprob[-1].item()), rel=2**-7)


@pytest.mark.parametrize("T", (0, 1, 700, 3_000_001))
def test_objective(T):
    generator = torch.Generator().manual_seed(T)
    logprob, entropy, old, ref, advantage, weight = torch.randn(6, T, generator=generator)
    keep = torch.rand(T, generator=generator) < 0.7
    old[::9], ref[::11] = math.nan, math.nan
    inputs = (logprob, entropy, old, ref, advantage, weight, keep)
    params = LossSpec(dual_clip=2.0, kl_coef=0.05, entropy_coef=0.01).params()
    expected = ops.objective_terms(*inputs, params)
    actual = ops.objective_terms(*on_gpu(*inputs), params)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, rtol=1e-6 if e.dtype == torch.float32 else 1e-10, atol=1e-9)
    again = ops.objective_terms(*on_gpu(*inputs), params)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def test_objective_on_several_streams_at_once():
    inputs = on_gpu(*torch.randn(6, 300_000), torch.ones(300_000, dtype=torch.bool))
    params = LossSpec(kl_coef=0.05).params()
    expected = ops.objective_terms(*inputs, params)
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream() for _ in range(8)] * 20:
        with torch.cuda.stream(stream):
            results.append(ops.objective_terms(*inputs, params))
    torch.cuda.synchronize()
    for r in results:
        assert torch.equal(r[0], expected[0]) and torch.equal(r[3], expected[3])


@pytest.mark.parametrize("method", range(9))
# 30 000 samples in 4286 groups; one group of 5000; two million: more groups than warps.
@pytest.mark.parametrize(
    "n, size", ((0, 7), (1, 7), (17, 7), (30_000, 7), (5000, 5000), (2**21, 8))
)
def test_group_advantage(n, size, method):
    rewards = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + 1e3
    rewards[::13] = math.nan
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    offsets = torch.arange(0, n + size, size).clamp(max=n)
    for filters, drop in ((0, False), (5, True)):
        rest = (method, True, 1e-6, filters, drop, -1.0, 2.0)
        expected = ops.group_advantage_terms(rewards, order, offsets, *rest)
        gpu = on_gpu(rewards, order, offsets)
        actual = ops.group_advantage_terms(*gpu, *rest)
        close(actual[0], expected[0], rtol=1e-6, atol=1e-7)
        assert torch.equal(actual[1].cpu(), expected[1])
        close(actual[2], expected[2], rtol=1e-12, atol=1e-12)
        again = ops.group_advantage_terms(*gpu, *rest)
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize("gamma, lam", ((1.0, 0.95), (0.9, 0.0), (1.0, 1.0)))
# A warp takes 32 tokens at a time; 70 000 sequences are more than one wave of blocks.
@pytest.mark.parametrize("lengths", ([], [0, 1, 31, 32, 33, 4097], [3] * 70_000), ids=len)
def test_gae(lengths, gamma, lam):
    g = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    rewards, values = torch.randn(2, tokens, generator=g).unbind()
    keep = torch.rand(tokens, generator=g) < 0.7
    rewards[~keep], values[~keep] = math.nan, math.inf
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = (rewards, values, keep, bounds, torch.randn(len(lengths), generator=g))
    expected = ops.gae_terms(*inputs, gamma, lam)
    for a, e in zip(ops.gae_terms(*on_gpu(*inputs), gamma, lam), expected, strict=True):
        close(a, e, rtol=1e-6, atol=1e-6)
