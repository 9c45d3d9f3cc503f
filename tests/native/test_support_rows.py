"""csrc/cpu/support_rows.cpp, and rows that lie anywhere, against float64 torch."""

from __future__ import annotations

import math

import pytest
import torch

from pyrl import _native
from pyrl.ops import reference
from pyrl.ops.support import span_entries
from pyrl.testing import random_support

if _native.native_reason() is not None:
    pytest.skip(_native.native_reason(), allow_module_level=True)

ops = torch.ops.pyrl_native
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRANSFORMS = ((1.0, 0.0), (1.0, 30.0), (-2.0, 5.0))


def rows(n, V, dtype, *, largest, ids=torch.int32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    z = (torch.randn(n, V, generator=draw) * 4).to(dtype)
    target = torch.randint(V, (n,), generator=draw)
    inv_temperature = 0.5 + torch.rand(n, generator=draw)
    keep = torch.ones(n, dtype=torch.bool)
    support = random_support(target, V, keep, largest=largest, seed=seed, dtype=ids)
    return z, target, inv_temperature, support, torch.randn(3, n, generator=draw)


def spans(support):
    return torch.stack([support.indptr[:-1], support.indptr[1:]], dim=1)


def oracle(z, target, inv_temperature, transform, support, coefficients):
    """float64 statistics and gradient."""
    exact = z.double().requires_grad_()
    keep = torch.ones(len(z), dtype=torch.bool)
    scale, softcap = transform
    csr = (None, None) if support is None else support
    out = reference.logits_logprob(exact, target, inv_temperature, softcap, scale, keep, *csr)
    total = sum((c * v).sum() for c, v in zip(coefficients, out, strict=True))
    return [v.detach() for v in out], torch.autograd.grad(total, exact)[0]


# Supports of one token; within a vector; across several blocks of 1024.
@pytest.mark.parametrize(("V", "largest"), ((1, 1), (70, 5), (32001, 3000)))
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_support(dtype, transform, V, largest):
    ids = torch.int64 if V == 70 else torch.int32
    z, target, inv, support, k = rows(5, V, dtype, largest=largest, ids=ids)
    exact, exact_grad = oracle(z, target, inv, transform, support, k)
    given = {"spans": spans(support), "ids": support.ids}
    stats = ops.logits_stats(z, target, inv, *transform, **given)
    for name, a, e in zip(("logprob", "entropy", "lse"), stats, exact, strict=True):
        assert (a.double() - e).norm() <= 5e-6 * e.norm() + 1e-6 * math.sqrt(len(z)), name
    ops.logits_grad_(z, target, inv, *transform, stats[2], stats[1], *k, **given)
    rounding = (exact_grad.to(dtype).double() - exact_grad).norm()
    assert (z.double() - exact_grad).norm() <= rounding + 5e-6 * exact_grad.norm()
    inside = torch.zeros(z.shape, dtype=torch.bool)
    row, position = span_entries(support.indptr[:-1], support.indptr.diff())
    inside[row, support.ids[position].long()] = True
    assert (z[~inside] == 0).all()


def test_infinite_logits_in_a_support():
    z = torch.full((3, 9), math.nan)  # outside the support anything may be
    ids = torch.tensor([4, 1, 2, 8, 0, 5, 6, 7])
    bounds = torch.tensor([[0, 3], [3, 6], [6, 8]])
    z[0, [4, 1, 2]] = torch.tensor([0.5, -math.inf, 0.5])
    z[1, [8, 0, 5]] = -math.inf
    z[2, [6, 7]] = torch.tensor([1e4, -1e4])
    target, one = torch.tensor([2, 0, 6]), torch.ones(3)
    given = {"spans": bounds, "ids": ids}
    logprob, entropy, lse = ops.logits_stats(z, target, one, 1.0, 0.0, **given)
    assert logprob.tolist() == [pytest.approx(-math.log(2)), -math.inf, 0.0]
    assert entropy.tolist() == [pytest.approx(math.log(2)), 0.0, 0.0]
    assert lse.tolist() == [pytest.approx(0.5 + math.log(2)), -math.inf, 1e4]
    ops.logits_grad_(z, target, one, 1.0, 0.0, lse, entropy, one, one, None, **given)
    expected = torch.zeros(3, 9)
    expected[0, 2], expected[0, 4], expected[1, 0] = 0.5, -0.5, 1.0
    torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_coefficients_are_zeros_and_their_spans_are_not_read(dtype):
    z, target, inv, support, k = rows(4, 200, dtype, largest=20)
    given = {"spans": spans(support), "ids": support.ids}
    _, entropy, lse = ops.logits_stats(z, target, inv, 1.0, 0.0, **given)
    clean = z.clone()
    k[:, 2] = 0
    ops.logits_grad_(clean, target, inv, 1.0, 0.0, lse, entropy, *k, **given)
    z[2] = math.nan
    given["spans"] = given["spans"].clone()
    given["spans"][2] = torch.tensor([-5, 10**12])
    ops.logits_grad_(z, target, inv, 1.0, 0.0, lse, entropy, *k, **given)
    assert torch.equal(z, clean) and (z[2] == 0).all()


@pytest.mark.parametrize("replay", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chosen_rows_in_place_and_elsewhere(dtype, replay):
    z, target, inv, support, k = rows(5, 333, dtype, largest=40)
    given = {"spans": spans(support), "ids": support.ids} if replay else {}
    stats = ops.logits_stats(z, target, inv, 1.0, 0.0, **given)
    expected = z.clone()
    ops.logits_grad_(expected, target, inv, 1.0, 0.0, stats[2], stats[1], *k, **given)

    wide = torch.full((9, 350), 7.0, dtype=dtype)  # rows in a padded vocabulary, in another order
    index = torch.tensor([8, 0, 3, 2, 6])
    wide[index, 1:334] = z
    view = wide[:, 1:334]
    again = ops.logits_stats(view, target, inv, 1.0, 0.0, rows=index, **given)
    assert all(torch.equal(a, b) for a, b in zip(again, stats, strict=True))
    rest = (target, inv, 1.0, 0.0, stats[2], stats[1], *k)
    out = torch.full_like(z, math.nan)
    before = wide.clone()
    ops.logits_grad_(out, *rest, rows=index, source=view, **given)
    assert torch.equal(out, expected) and torch.equal(wide, before)
    ops.logits_grad_(out.copy_(z), *rest, source=z.clone(), **given)
    assert torch.equal(out, expected)
    ops.logits_grad_(view, *rest, rows=index, **given)
    assert torch.equal(view[index], expected)
    wide[index, 1:334] = 7.0
    assert (wide == 7.0).all()


@pytest.mark.parametrize("replay", (False, True))
def test_offsets_beyond_two_to_the_31(replay):
    """The memory is reserved and only its first and last row touched: 4.3 GB that are not there."""
    V, dtype = 32001, torch.bfloat16
    z, target, inv, support, k = rows(2, V, dtype, largest=40)
    given = {"spans": spans(support), "ids": support.ids} if replay else {}
    N = 2**31 // V + 2
    huge = torch.empty(N, V, dtype=dtype)
    index = torch.tensor([N - 1, 0])
    huge[index] = z
    stats = ops.logits_stats(z, target, inv, 1.0, 0.0, **given)
    far = ops.logits_stats(huge, target, inv, 1.0, 0.0, rows=index, **given)
    assert all(torch.equal(a, b) for a, b in zip(far, stats, strict=True))
    rest = (target, inv, 1.0, 0.0, stats[2], stats[1], *k)
    ops.logits_grad_(huge, *rest, rows=index, **given)
    ops.logits_grad_(z, *rest, **given)
    assert torch.equal(huge[index], z)


def test_threads_do_not_change_bits():
    z, target, inv, support, k = rows(37, 9001, torch.bfloat16, largest=2000)
    given = {"spans": spans(support), "ids": support.ids}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            stats = ops.logits_stats(z, target, inv, 1.0, 0.0, **given)
            w = z.clone()
            ops.logits_grad_(w, target, inv, 1.0, 0.0, stats[2], stats[1], *k, **given)
            results.append((*stats, w))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_rows():
    none, ids = torch.empty(0), torch.empty(0, dtype=torch.int64)
    given = {"spans": torch.empty(0, 2, dtype=torch.int64), "ids": ids}
    z = torch.empty(0, 7)
    assert [v.shape for v in ops.logits_stats(z, ids, none, 1.0, 0.0, **given)] == [(0,)] * 3
    ops.logits_grad_(z, ids, none, 1.0, 0.0, none, none, none, none, None, **given)
    z = torch.ones(3, 7)
    ops.logits_grad_(z, ids, none, 1.0, 0.0, none, none, none, none, None, rows=ids)
    assert (z == 1).all()


def test_bad_arguments_are_named():
    z, target, one = torch.zeros(2, 7), torch.tensor([1, 2]), torch.ones(2)
    bounds, ids = torch.tensor([[0, 2], [2, 3]]), torch.tensor([0, 1, 2])

    def stats(**given):
        return ops.logits_stats(z, target, one, 1.0, 0.0, **given)

    stats(spans=bounds, ids=ids)
    for message, given in {
        "spans and ids belong together": {"spans": bounds},
        r"spans must be a contiguous int64 tensor of shape \[2, 2\]": {
            "spans": bounds[:1],
            "ids": ids,
        },
        "ids must be int64": {"spans": bounds, "ids": ids.float()},
        r"target\[0\]=1: outside its support of 1 tokens": {
            "spans": torch.tensor([[0, 1], [1, 3]]),
            "ids": ids,
        },
        r"spans\[1\]=\[2, 4\): expected a part of the 3 ids": {
            "spans": torch.tensor([[0, 2], [2, 4]]),
            "ids": ids,
        },
        r"ids\[2\]=7: expected a token id in \[0, 7\)": {
            "spans": bounds,
            "ids": torch.tensor([0, 1, 7]),
        },
        r"rows\[1\]=2: expected a row in \[0, 2\)": {"rows": torch.tensor([0, 2])},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            stats(**given)
    with pytest.raises(RuntimeError, match="adjacent columns"):
        ops.logits_stats(torch.zeros(7, 2).T, target, one, 1.0, 0.0, rows=torch.tensor([0, 1]))
    rest = (target, one, 1.0, 0.0, one, one, one, one, None)
    with pytest.raises(RuntimeError, match="source must have the dtype of z"):
        ops.logits_grad_(z, *rest, source=z.bfloat16())
    with pytest.raises(RuntimeError, match=r"z must have shape \[2, V\]"):
        ops.logits_grad_(torch.zeros(3, 7), *rest, source=z)


def test_opcheck():
    z, target, inv, support, k = rows(3, 40, torch.float32, largest=9)
    given = {"spans": spans(support), "ids": support.ids, "rows": torch.tensor([2, 0, 1])}
    torch.library.opcheck(ops.logits_stats, (z, target, inv, 1.0, 0.0), given)
    _, entropy, lse = ops.logits_stats(z, target, inv, 1.0, 0.0, **given)
    rest = (target, inv, 1.0, 0.0, lse, entropy, *k)
    torch.library.opcheck(ops.logits_grad_, (z, *rest), given)
    torch.library.opcheck(ops.logits_grad_, (torch.zeros_like(z), *rest), {**given, "source": z})
