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


#: Both kernels and every function of csrc/objective.h.
SPECS = {
    "clip": LossSpec(dual_clip=2.0, delta=4.0, kl_coef=0.05, entropy_coef=0.01),
    "reinforce": LossSpec(objective="reinforce", kl="k2", kl_coef=0.05, correction="tis"),
    "cispo": LossSpec.preset("cispo", cispo_high=1.2, kl="abs", kl_coef=0.1, correction="icepop"),
    "sapo": LossSpec.preset("sapo", kl="k3_st", kl_coef=0.1, kl_clamp=0.2),
    "dppo": LossSpec.preset("dppo", dppo_divergence="kl", kl="k1", kl_coef=0.1),
    "gspo": LossSpec.preset("gspo", kl_coef=0.05, kl_ratio_weighted=True, entropy_coef=0.01),
    "gspo_token": LossSpec.preset("gspo_token", correction="mis", correction_level="geometric"),
    "gmpo": LossSpec.preset("gmpo", correction="mis", correction_level="sequence"),
    "vespo": LossSpec.preset("vespo", correction="tis", off_policy_threshold=0.1),
}


def objective_inputs(T, spec, seed):
    """Ragged sequences of up to 3000 tokens; NaN in every vector that may hold it."""
    g = torch.Generator().manual_seed(seed)
    logprob = -torch.rand(T, generator=g) * 5
    old, ref, rollout = (logprob + 0.3 * torch.randn(T, generator=g) for _ in range(3))
    old[::9], ref[::11], rollout[::13] = math.nan, math.nan, math.nan
    entropy, advantage, weight = torch.randn(3, T, generator=g)
    keep = torch.rand(T, generator=g) < 0.7
    bounds = torch.randint(0, 3001, (T // 1000 + 2,), generator=g).cumsum(0).clamp(max=T)
    bounds[0], bounds[-1] = 0, T
    fields = (logprob, entropy, old, ref, rollout, advantage, weight, keep)
    return (*fields, bounds if spec.couples_tokens else None)


@pytest.mark.parametrize("T", (0, 1, 700, 3_000_001))
@pytest.mark.parametrize("name", SPECS)
def test_objective(name, T):
    spec = SPECS[name]
    inputs, params = objective_inputs(T, spec, seed=T), spec.params()
    expected = ops.objective_terms(*inputs, params)
    actual = ops.objective_terms(*on_gpu(*inputs), params)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, rtol=1e-6 if e.dtype == torch.float32 else 1e-10, atol=1e-9)
    again = ops.objective_terms(*on_gpu(*inputs), params)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize("bounds", ([0, 200_001], [0, 0, 65_537, 65_537, 200_001]), ids=str)
def test_objective_of_sequences_far_longer_than_a_block(bounds):
    inputs = (*objective_inputs(200_001, SPECS["clip"], 0)[:-1], torch.tensor(bounds))
    params = SPECS["gspo"].params()
    expected = ops.objective_terms(*inputs, params)
    for a, e in zip(ops.objective_terms(*on_gpu(*inputs), params), expected, strict=True):
        close(a, e, rtol=1e-6 if e.dtype == torch.float32 else 1e-10, atol=1e-9)


@pytest.mark.parametrize("name", ("clip", "gspo"))
def test_objective_on_several_streams_at_once(name):
    spec = SPECS[name]
    inputs, params = on_gpu(*objective_inputs(300_000, spec, 0)), spec.params()
    expected = ops.objective_terms(*inputs, params)
    torch.cuda.synchronize()
    results = []
    for stream in [torch.cuda.Stream() for _ in range(8)] * 20:
        with torch.cuda.stream(stream):
            results.append(ops.objective_terms(*inputs, params))
    torch.cuda.synchronize()
    for r in results:
        assert torch.equal(r[0], expected[0]) and torch.equal(r[3], expected[3])


@pytest.mark.parametrize("method", range(5))
@pytest.mark.parametrize("n", (0, 1, 17, 30_000))
def test_group_advantage(n, method):
    rewards = torch.randn(n, generator=torch.Generator().manual_seed(n))
    rewards[::13] = math.nan
    order = torch.arange(n)
    offsets = torch.full((n + 1,), n)
    starts = torch.arange(0, n, 7) if n else torch.zeros(1, dtype=torch.int64)
    offsets[: len(starts)] = starts
    expected = ops.group_advantage_terms(rewards, order, offsets, method, True, 1e-6)
    actual = ops.group_advantage_terms(*on_gpu(rewards, order, offsets), method, True, 1e-6)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, rtol=1e-6, atol=1e-7)
