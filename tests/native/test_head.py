"""csrc/cpu/head*.cpp against float64 torch, by the rule error <= error(plain torch) + margin.

Runs for the instruction set that this CPU would choose; test_instruction_sets.py runs this file
again for AVX2. The portable set has none of these kernels.
"""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl import _native
from pyrl.parity import MARGIN, relative

if _native.native_reason() is not None:
    pytest.skip(_native.native_reason(), allow_module_level=True)
ops = torch.ops.pyrl_native
if not ops.head_supported(False):
    pytest.skip("this CPU has no AVX2", allow_module_level=True)

DTYPES = [t for t in (torch.float32, torch.bfloat16) if ops.head_supported(t == torch.bfloat16)]
# n, D, V: single elements; no dimension a multiple of anything; whole panels; many blocks.
SIZES = ((1, 1, 1), (3, 33, 17), (257, 65, 1031), (96, 64, 192), (40, 100, 49157))


def inputs(n, d, v, dtype, seed=0, bias=True):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng).to(dtype)
    weight = (torch.randn(v, d, generator=rng) * 3 * d**-0.5).to(dtype)
    b = torch.randn(v, generator=rng).to(dtype) if bias else None
    target = torch.randint(v, (n,), generator=rng)
    inverse = 1 / (0.8 + 0.4 * torch.rand(n, generator=rng))
    return x, weight, b, target, inverse, torch.randn(3, n, generator=rng)


def formula(x, weight, b, target, inverse, coefficients, scale, cap):
    """logprob, entropy, lse, and the gradients of x, weight and b, by autograd in their dtype."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, b)]
    z = torch.nn.functional.linear(*leaves)
    z = (z if z.dtype == torch.float64 else z.float()) * scale
    z = cap * torch.tanh(z / cap) if cap else z
    logp = (z * inverse[:, None]).log_softmax(1)
    lse = (z * inverse[:, None]).logsumexp(1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * torch.where(p > 0, logp, 0.0), 0.0).sum(1)
    out = logp.gather(1, target[:, None])[:, 0], entropy, lse
    sum((c * o).sum() for c, o in zip(coefficients, out, strict=True)).backward()
    return [o.detach() for o in out], [None if t is None else t.grad for t in leaves]


def run(x, weight, b, target, inverse, coefficients, scale=1.0, cap=0.0, *, sizes=None, near=0,
        needs=(True, True), dhidden_dtype=None):  # fmt: skip
    """The same by the kernels: chunks of `sizes` rows, `near` logits of the first in dweight."""
    n, (v, d) = len(x), weight.shape
    sizes = sizes or [n]
    dx = torch.full((n, d), math.nan, dtype=dhidden_dtype or x.dtype) if needs[0] else None
    dw = torch.full((v, d), math.nan, dtype=x.dtype) if needs[1] else None
    db = torch.zeros(v) if b is not None else None
    low = None
    if needs[1] and x.dtype == torch.bfloat16 and len(sizes) > 1:
        low = torch.full((v, d + 3), 255, dtype=torch.uint8)[:, :d]
    stats, start = [], 0
    for i, size in enumerate(sizes):
        rows = slice(start, start + size)
        start += size
        inside = min(near, size) if i == 0 else 0
        far = torch.full((v, -(-(size - inside) // 32) * 32), math.nan, dtype=x.dtype)
        shared = (x[rows], weight, b, target[rows], inverse[rows], scale, cap, dw, inside)
        far = far if far.shape[1] else None
        one = ops.head_stats(*shared, far)
        c, h, g = coefficients[:, rows].contiguous()
        ops.head_grad_(
            *shared, far, one[2], one[1], c, h, g, None if dx is None else dx[rows], low, db,
            i == 0, i == len(sizes) - 1,
        )  # fmt: skip
        stats.append(one)
    return [torch.cat(s) for s in zip(*stats, strict=True)], [dx, dw, db]


def assert_parity(ours, plain, exact, dtype):
    for a, b, c in zip([*ours[0], *ours[1]], [*plain[0], *plain[1]], [*exact[0], *exact[1]],
                       strict=True):  # fmt: skip
        if a is not None:
            assert relative(a, c) <= relative(b, c) + MARGIN[dtype]


def double(x, weight, b, target, inverse, coefficients):
    b = None if b is None else b.double()
    return x.double(), weight.double(), b, target, inverse.double(), coefficients.double()


@pytest.mark.parametrize("transform", [(1.0, 0.0), (0.7, 5.0), (-1.5, 0.0)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype, size, transform):
    args = inputs(*size, dtype)
    plain, exact = formula(*args, *transform), formula(*double(*args), *transform)
    assert_parity(run(*args, *transform), plain, exact, dtype)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(16, 130), d=st.integers(16, 140), v=st.integers(32, 400), data=st.data(),
    dtype=st.sampled_from(DTYPES), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_property_any_split_and_place_of_the_logits(n, d, v, data, dtype, bias, seed):
    args = inputs(n, d, v, dtype, seed, bias)
    cuts = [*sorted(data.draw(st.lists(st.integers(1, n), max_size=3, unique=True))), n]
    sizes = [b - a for a, b in zip([0, *cuts], cuts, strict=False) if b > a]
    near = data.draw(st.integers(0, min(d, sizes[0]) // 32)) * 32
    if sizes[0] <= d // 32 * 32 and data.draw(st.booleans()):
        near = sizes[0]
    ours = run(*args, sizes=sizes, near=near)
    assert_parity(ours, formula(*args, 1.0, 0.0), formula(*double(*args), 1.0, 0.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_numbers(dtype):
    """How far a few rounded sums that cancel are off is luck, torch's and ours: the rule is for
    medians."""
    rng, errors = random.Random(0), []
    for seed in range(200):
        args = inputs(rng.randint(1, 16), rng.randint(1, 30), rng.randint(1, 60), dtype, seed)
        found = run(*args), formula(*args, 1.0, 0.0), formula(*double(*args), 1.0, 0.0)
        three = zip(*([*stats, *grads] for stats, grads in found), strict=True)
        errors.append([(relative(a, c), relative(b, c)) for a, b, c in three])
    for pairs in zip(*errors, strict=True):
        ours, plain = (statistics.median(side) for side in zip(*pairs, strict=True))
        assert ours <= plain + MARGIN[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_wanted_changes_nothing(dtype):
    args = inputs(70, 65, 301, dtype)
    stats, (dx, dw, db) = run(*args, near=64)
    for needs in ((True, False), (False, True), (False, False)):
        again, (x, w, b) = run(*args, near=64 if needs[1] else 0, needs=needs)
        assert all(torch.equal(p, q) for p, q in zip(stats, again, strict=True))
        assert x is None or torch.equal(x, dx)
        assert w is None or torch.equal(w, dw)
        assert torch.equal(b, db)
    fine = run(*args, dhidden_dtype=torch.float32)[1][0]
    assert torch.equal(fine.to(dtype), dx)
    unkept = ops.head_stats(*args[:5], 1.0, 0.0, None, 0, None)
    assert all(torch.equal(p, q) for p, q in zip(stats, unkept, strict=True))


def test_a_sum_of_24_bits_is_rounded_once():
    """Many chunks of the same sign: a sum of bf16 would stop growing."""
    x, weight, b, target, inverse, c = inputs(320, 32, 64, DTYPES[-1], bias=False)
    x, c = x.abs(), c.abs() + 0.5
    args = x, weight, b, target, inverse, c
    one, many = run(*args)[1][1], run(*args, sizes=[2] * 160)[1][1]
    exact = formula(*double(*args), 1.0, 0.0)[1][1]
    assert relative(many, exact) <= relative(one, exact) + 2e-4


@pytest.mark.parametrize("cap", (0.0, 5.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity(dtype, cap):
    args = inputs(40, 33, 203, dtype)
    bias, target = args[2], args[3]
    bias[::3] = -math.inf
    target[:3] = torch.tensor([3, 4, 202])  # row 0's target is impossible without a cap
    args[5][0, 0] = 0
    ours = run(*args, 1.0, cap)
    exact, plain = formula(*double(*args), 1.0, cap), formula(*args, 1.0, cap)
    assert (ours[0][0] == -math.inf).tolist() == (exact[0][0] == -math.inf).tolist()
    finite = exact[0][0] > -math.inf
    for a, b, c in zip(ours[0], plain[0], exact[0], strict=True):
        assert relative(a[finite], c[finite]) <= relative(b[finite], c[finite]) + MARGIN[dtype]
    if cap == 0:
        assert ours[1][1][::3][1:].abs().max() == 0 or target.remainder(3).eq(0).any()

    bias.fill_(-math.inf)
    stats, (dx, dw, db) = run(*args)
    assert (stats[0] == -math.inf).all() and (stats[2] == -math.inf).all()
    assert (stats[1] == 0).all()
    assert dx.isfinite().all() and dw.isfinite().all() and db.isfinite().all()


@pytest.mark.parametrize("slope", (-0.5, 0.02, 0.5))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_rise_from_block_to_block(dtype, slope):
    """The sums' reference follows the maximum, by leaps and by steps it need not follow."""
    x, weight, bias, target, inverse, c = inputs(40, 33, 500, dtype)
    args = x, weight, (bias + slope * torch.arange(500)).to(dtype), target, inverse, c
    plain, exact = formula(*args, 1.0, 0.0), formula(*double(*args), 1.0, 0.0)
    assert_parity(run(*args), plain, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_coefficients_and_nan(dtype):
    x, weight, b, target, inverse, c = inputs(40, 33, 203, dtype)
    clean = run(x, weight, b, target, inverse, c)
    bad = x.clone()
    bad[7] = math.nan
    stats, (dx, dw, _) = run(bad, weight, b, target, inverse, c)
    assert all(s[7].isnan() for s in stats)
    others = torch.arange(40) != 7
    assert all(torch.equal(s[others], t[others]) for s, t in zip(stats, clean[0], strict=True))
    assert dx[7].isnan().all() and torch.equal(dx[others], clean[1][0][others])
    assert dw.isnan().any()

    c[:, 7] = 0
    _, (dx, _, db) = run(bad, weight, b, target, inverse, c)
    assert dx[7].eq(0).all() and db.isfinite().all()


def test_views_of_larger_tensors_and_no_rows():
    x, weight, b, target, inverse, c = inputs(33, 40, 97, DTYPES[-1])
    wide = torch.cat([weight, weight], dim=1)[:, :40]
    tall = torch.cat([x, x], dim=1)[:, :40]
    odd = torch.cat([weight, weight[:, :1]], dim=1)[:, :40]
    expected = run(x, weight, b, target, inverse, c)
    for other in (wide, odd):
        ours = run(tall, other, b, target, inverse, c)
        assert all(
            torch.equal(p, q)
            for p, q in zip([*ours[0], *ours[1]], [*expected[0], *expected[1]], strict=True)
        )
    none = ops.head_stats(x[:0], weight, b, target[:0], inverse[:0], 1.0, 0.0, None, 0, None)
    assert [t.shape for t in none] == [torch.Size([0])] * 3


def test_the_same_threads_give_the_same_bits():
    args = inputs(70, 64, 5000, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        one, two = run(*args), run(*args)
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(p, q) for p, q in zip([*one[0], *one[1]], [*two[0], *two[1]], strict=True)
    )
    exact = formula(*double(*args), 1.0, 0.0)
    assert_parity(two, formula(*args, 1.0, 0.0), exact, torch.float32)


def test_bad_arguments_are_named():
    x, weight, b, target, inverse, _ = inputs(40, 33, 97, torch.float32)

    def stats(x=x, weight=weight, b=b, target=target, dw=None, near=0, far=None):
        ops.head_stats(x, weight, b, target, inverse, 1.0, 0.0, dw, near, far)

    stats()
    wrong = target.clone()
    wrong[3] = 97
    whole = torch.empty_like(weight)
    for given_, message in (
        ({"x": x.half()}, "x must be float32 or bfloat16"),
        ({"x": x[:, :32]}, r"x must be \[n, D\] and weight \[V, D\]"),
        ({"weight": weight.bfloat16()}, "weight must have the dtype of x"),
        ({"b": b[1:]}, r"bias must be contiguous, of the dtype of x, of shape \[97\]"),
        ({"target": wrong}, r"target\[3\]=97: expected a token id in \[0, 97\)"),
        ({"near": 32}, "near=32: expected all rows or a multiple of 32 that fits"),
        ({"dw": whole, "near": 40}, "near=40: expected"),
        ({"dw": whole, "near": 32}, "far holds the logits of the rows after near"),
        ({"dw": whole, "near": 32, "far": whole[:, :31]}, "far must have the dtype of x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            stats(**given_)
    zero = torch.zeros(40)
    with pytest.raises(RuntimeError, match="one of them must hold the logits"):
        ops.head_grad_(
            x, weight, b, target, inverse, 1.0, 0.0, None, 0, None, zero, zero, zero, zero, None,
            None, None, None, True, True,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, weight, b, target, inverse, c = inputs(40, 33, 97, dtype)
    far, zero = x.new_zeros(97, 64), torch.zeros(40)
    dw, dx, db = torch.zeros_like(weight), torch.zeros_like(x), torch.zeros(97)
    shared = (x, weight, b, target, inverse, 1.0, 0.0)
    torch.library.opcheck(ops.head_stats, (*shared, None, 0, far))
    torch.library.opcheck(
        ops.head_grad_,
        (*shared, dw, 0, far, zero + 5, zero, *c, dx, None, db, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )
