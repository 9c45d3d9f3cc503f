"""csrc/cuda on a GPU against the CPU kernels, which the other files hold against float64."""

from __future__ import annotations

import math

import pytest
import torch

from pyrl import _native
from pyrl.ops.spec import LossSpec
from pyrl.testing import random_support

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


@pytest.mark.parametrize("ids", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("transform", ((1.0, 0.0), (-2.0, 5.0)), ids=str)
@pytest.mark.parametrize(("V", "largest"), ((1, 1), (70, 5), (32001, 3000)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_supports_and_rows_anywhere(dtype, V, largest, transform, ids):
    torch.manual_seed(V)
    n = 9
    wide = (torch.randn(n + 4, V + 3) * 4).to(dtype)
    wide[3, ::3] = -math.inf
    target, inv_temperature = torch.randint(V, (n,)), torch.rand(n) + 0.5
    support = random_support(target, V, torch.ones(n, dtype=torch.bool), largest=largest, dtype=ids)
    spans = torch.stack([support.indptr[:-1], support.indptr[1:]], dim=1)
    c, h, g = torch.randn(3, n)
    c[2] = h[2] = g[2] = 0
    index = torch.randperm(n + 4)[:n]
    for replay in (False, True):
        z, gpu_z = wide.clone()[:, 1 : V + 1], wide.cuda()[:, 1 : V + 1]
        given = {"rows": index, **({"spans": spans, "ids": support.ids} if replay else {})}
        on_device = {k: v.cuda() for k, v in given.items()}
        head, gpu_head = (target, inv_temperature), on_gpu(target, inv_temperature)
        expected = ops.logits_stats(z, *head, *transform, **given)
        actual = ops.logits_stats(gpu_z, *gpu_head, *transform, **on_device)
        for a, e in zip(actual, expected, strict=True):
            close(a, e)
        rest = (expected[2], expected[1], c, h, g)
        out = torch.empty(n, V, dtype=dtype, device="cuda")
        ops.logits_grad_(out, *gpu_head, *transform, *on_gpu(*rest), **on_device, source=gpu_z)
        ops.logits_grad_(z, *head, *transform, *rest, **given)
        ops.logits_grad_(gpu_z, *gpu_head, *transform, *on_gpu(*rest), **on_device)
        close(gpu_z, z, rtol=SPACING[dtype], atol=1e-6)
        close(out, z[index], rtol=SPACING[dtype], atol=1e-6)


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


# One CTA to the largest cluster, what is chosen (0), against two reads (-1). 4096 odd rows keep
# every ring wrapping; the last two sizes need a cluster to hold a row.
@pytest.mark.parametrize("ctas", (0, 1, 2, 4, 8, 16))
@pytest.mark.parametrize(("n", "V"), ((5, 1), (5, 7), (4096, 1001), (300, 32001), (200, 151936)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if not s.couples_tokens])
def test_one_read_equals_two(name, dtype, n, V, ctas):
    spec, g = SPECS[name], torch.Generator("cuda").manual_seed(V)
    _, _, *vectors, _ = on_gpu(*objective_inputs(n, spec, seed=V))
    z = (torch.randn(n + 3, V + 1, device="cuda", generator=g) * 4).to(dtype)[:, 1:]
    z[:, ::7], z[0] = -math.inf, -math.inf
    index = torch.randperm(n + 3, device="cuda", generator=g)[:n]
    target = torch.randint(V, (n,), device="cuda", generator=g)
    z[index, target] = 1.0
    head = (target, torch.rand(n, device="cuda", generator=g) + 0.5, 1.3, 9.0 if V == 7 else 0.0)
    z[index[~vectors[-1]]] = math.nan  # not read
    out = torch.full((n, V), 7.0, device="cuda", dtype=dtype)
    given = {"rows": index, "source": z}
    expected = ops.logits_policy_grad_(out, *head, *vectors, spec.params(), **given, ctas=-1)
    again = torch.full_like(out, 7.0)
    try:
        actual = ops.logits_policy_grad_(again, *head, *vectors, spec.params(), **given, ctas=ctas)
    except RuntimeError as error:
        needs = V * z.element_size() / ctas
        assert ctas > 0 and "that hold a row" in str(error) and needs > 64 << 10
        return
    for a, e in zip(actual, expected, strict=True):
        close(a, e.cpu(), rtol=4e-6, atol=4e-6)
    close(again, out.cpu(), rtol=2 * SPACING[dtype], atol=2e-6)
    assert (again[~vectors[-1]] == 0).all()
    others = z.clone()
    ops.logits_policy_grad_(z, *head, *vectors, spec.params(), rows=index, ctas=ctas)
    assert torch.equal(z[index], again)  # the same sums: the logits were at the same addresses
    z[index] = others[index]
    assert torch.equal(z.nan_to_num(), others.nan_to_num())


def test_scaling_by_one_reads_nothing():
    z = torch.randn(33, 1001, device="cuda")
    z[3] = 0
    expected, one = z * 3, torch.ones((), device="cuda")
    ops.logits_scale_(z, one * 3)
    assert torch.equal(z, expected)
    ops.logits_scale_(z, one)
    assert torch.equal(z, expected)
    ops.logits_scale_(z, one * math.inf, rows=torch.tensor([3], device="cuda"))
    assert torch.equal(z, expected)


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
