"""support_stats and support_grad_, and rows that lie anywhere, against float64 torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrl.kernels import logits, support
from pyrl.kernels.tuning import SUPPORT, SUPPORT_ZEROS
from pyrl.ops import reference
from pyrl.testing import random_support

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_rows(n: int, V: int, dtype: torch.dtype, largest: int, seed: int, device) -> dict:
    draw = torch.Generator().manual_seed(seed)
    z = (torch.randn(n, V, generator=draw) * 4).to(dtype)
    target = torch.randint(V, (n,), generator=draw)
    csr = random_support(
        target, V, torch.ones(n, dtype=torch.bool), largest=largest, seed=seed,
        dtype=torch.int64 if seed % 2 else torch.int32,
    )  # fmt: skip
    rows = {
        "z": z,
        "target": target,
        "inv_temperature": 0.5 + torch.rand(n, generator=draw),
        "spans": torch.stack([csr.indptr[:-1], csr.indptr[1:]], dim=1),
        "ids": csr.ids,
        "coefficients": torch.randn(3, n, generator=draw),
    }
    return {name: value.to(device) for name, value in rows.items()}


def oracle(rows: dict, scale: float, softcap: float, with_g: bool) -> tuple[list[Tensor], Tensor]:
    z = rows["z"].double().requires_grad_()
    keep = torch.ones(len(z), dtype=torch.bool, device=z.device)
    indptr = torch.cat([rows["spans"][:1, 0], rows["spans"][:, 1]])
    out = reference.logits_logprob(
        z, rows["target"], rows["inv_temperature"], softcap, scale, keep, indptr, rows["ids"]
    )
    used = [(c * v).sum() for c, v in zip(rows["coefficients"], out, strict=True)]
    (grad,) = torch.autograd.grad(sum(used if with_g else used[:2]), z)
    return [v.detach() for v in out], grad


def check(rows: dict, scale: float, softcap: float, with_g: bool) -> None:
    exact, exact_grad = oracle(rows, scale, softcap, with_g)
    z, spans, ids = rows["z"], rows["spans"], rows["ids"]
    head = (rows["target"], rows["inv_temperature"], scale, softcap)
    stats = support.support_stats(z, *head, spans, ids)
    # As for whole rows: x carries up to three fp32 roundings.
    slack = 2.0**-21 * (1 + float(z.double().abs().max()) * abs(scale) * 1.5)
    for mine, theirs in zip(stats, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=slack)
    c, h, g = rows["coefficients"]
    grad = z.clone()
    rest = (*head, stats[2], stats[1], c, h, g if with_g else None)
    support.support_grad_(grad, *rest, spans, ids)
    rounding = (exact_grad.to(z.dtype).double() - exact_grad).norm()
    size = slack * (1 + exact_grad.norm() + sum(k.abs() for k in (c, h, g)).norm() * abs(scale) * 2)
    assert (grad.double() - exact_grad).norm() <= rounding + size
    assert (grad[exact_grad == 0] == 0).all()


# One token; less than a block; several blocks of the support and of the zeros.
@pytest.mark.parametrize(
    ("V", "largest"), [(1, 1), (17, 5), (SUPPORT_ZEROS + 901, 2 * SUPPORT.block + 300)]
)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype, V, largest, softcap, device) -> None:
    check(random_rows(3, V, dtype, largest, V, device), 1.3, softcap, with_g=softcap > 0)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 4),
    V=st.integers(1, 70),
    largest=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 0.0625, -0.7]),
    softcap=st.sampled_from([0.0, 30.0]),
    with_g=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_supports(n, V, largest, dtype, scale, softcap, with_g, seed, device) -> None:
    check(random_rows(n, V, dtype, largest, seed, device), scale, softcap, with_g)


def test_infinite_logits(device) -> None:
    z = torch.full((3, 9), math.nan, device=device)  # outside the support anything may be
    ids = torch.tensor([4, 1, 2, 8, 0, 5, 6, 7], device=device)
    spans = torch.tensor([[0, 3], [3, 6], [6, 8]], device=device)
    z[0, [4, 1, 2]] = torch.tensor([0.5, -math.inf, 0.5], device=device)
    z[1, [8, 0, 5]] = -math.inf
    z[2, [6, 7]] = torch.tensor([1e4, -1e4], device=device)
    target, one = torch.tensor([2, 0, 6], device=device), torch.ones(3, device=device)
    logprob, entropy, lse = support.support_stats(z, target, one, 1.0, 0.0, spans, ids)
    assert logprob.tolist() == [pytest.approx(-math.log(2)), -math.inf, 0.0]
    assert entropy.tolist() == [pytest.approx(math.log(2)), 0.0, 0.0]
    assert lse.tolist() == [pytest.approx(0.5 + math.log(2)), -math.inf, 1e4]
    rest = (lse, entropy, one, one, None, spans, ids)
    support.support_grad_(z, target, one, 1.0, 0.0, *rest)
    expected = torch.zeros(3, 9, device=device)
    expected[0, 2], expected[0, 4], expected[1, 0] = 0.5, -0.5, 1.0
    torch.testing.assert_close(z, expected)


def test_what_cannot_be_looked_up_gives_nan(device) -> None:
    z, one = torch.zeros(3, 5, device=device), torch.ones(3, device=device)
    ids = torch.tensor([0, 1, 7, 1, 2], device=device)
    spans = torch.tensor([[0, 2], [2, 4], [4, 5]], device=device)
    target = torch.tensor([3, 1, 2], device=device)  # outside; beside a wrong id; fine
    logprob, entropy, _ = support.support_stats(z, target, one, 1.0, 0.0, spans, ids)
    assert logprob.isnan().tolist() == [True, True, False]
    assert entropy.isnan().tolist() == [False, True, False]


def test_row_without_gradient_becomes_zero_and_its_span_is_not_read(device) -> None:
    rows = random_rows(3, 50, torch.float32, 9, 1, device)
    z, c, h, g = rows["z"], *rows["coefficients"]
    for v in (c, h, g):
        v[1] = 0
    z[1] = math.nan
    rows["spans"][1] = torch.tensor([-(10**12), 10**12], device=device)
    nan = torch.full((3,), math.nan, device=device)
    support.support_grad_(
        z, rows["target"], rows["inv_temperature"], 1.0, 0.0, nan, nan, c, h, g, rows["spans"],
        rows["ids"],
    )  # fmt: skip
    assert (z[1] == 0).all()


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chosen_rows_in_place_and_elsewhere(dtype, replay, device) -> None:
    rows = random_rows(4, 1033, dtype, 40, 0, device)
    z, k = rows["z"], rows["coefficients"]
    head = (rows["target"], rows["inv_temperature"], 1.0, 0.0)
    csr = (rows["spans"], rows["ids"]) if replay else ()
    stats_of, grad_ = (
        (support.support_stats, support.support_grad_)
        if replay
        else (logits.logits_stats, logits.logits_grad_)
    )
    stats = stats_of(z, *head, *csr)
    rest = (*head, stats[2], stats[1], *k, *csr)
    expected = z.clone()
    grad_(expected, *rest)

    wide = torch.full((9, 1050), 7.0, dtype=dtype, device=device)  # a padded vocabulary
    index = torch.tensor([8, 0, 3, 2], device=device)
    wide[index, 1:1034] = z
    view = wide[:, 1:1034]
    again = stats_of(view, *head, *csr, index)
    assert all(torch.equal(a, b) for a, b in zip(again, stats, strict=True))
    out, before = torch.full_like(z, math.nan), wide.clone()
    grad_(out, *rest, index, view)
    assert torch.equal(out, expected) and torch.equal(wide, before)
    grad_(view, *rest, index)
    assert torch.equal(view[index], expected)
    wide[index, 1:1034] = 7.0
    assert (wide == 7.0).all()


@pytest.mark.parametrize("replay", [False, True])
def test_offsets_beyond_two_to_the_31(replay, device, monkeypatch) -> None:
    """The memory is reserved and only its first and last row touched: 4.3 GB that are not there."""
    if device.type == "cpu":
        # The interpreter copies every argument onto itself when it is done.
        monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda to, source, *_: to)
    V = 32_001
    rows = random_rows(2, V, torch.bfloat16, 40, 0, device)
    z, k = rows["z"], rows["coefficients"]
    head = (rows["target"], rows["inv_temperature"], 1.0, 0.0)
    csr = (rows["spans"], rows["ids"]) if replay else ()
    stats_of, grad_ = (
        (support.support_stats, support.support_grad_)
        if replay
        else (logits.logits_stats, logits.logits_grad_)
    )
    N = 2**31 // V + 2
    huge = torch.empty(N, V, dtype=torch.bfloat16, device=device)
    index = torch.tensor([N - 1, 0], device=device)
    huge[index] = z
    stats = stats_of(z, *head, *csr)
    far = stats_of(huge, *head, *csr, index)
    assert all(torch.equal(a, b) for a, b in zip(far, stats, strict=True))
    rest = (*head, stats[2], stats[1], *k, *csr)
    grad_(huge, *rest, index)
    grad_(z, *rest)
    assert torch.equal(huge[index], z)


def test_no_rows(device) -> None:
    z, none = torch.empty(0, 7, device=device), torch.empty(0, device=device)
    ids = torch.empty(0, dtype=torch.int64, device=device)
    spans = torch.empty(0, 2, dtype=torch.int64, device=device)
    got = support.support_stats(z, ids, none, 1.0, 0.0, spans, ids)
    assert [tuple(v.shape) for v in got] == [(0,)] * 3
    support.support_grad_(z, ids, none, 1.0, 0.0, none, none, none, none, None, spans, ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spans": torch.zeros(2, 2, dtype=torch.int32)}, "spans: expected"),
        ({"spans": torch.zeros(3, 2, dtype=torch.int64)}, "spans: expected"),
        ({"ids": torch.zeros(4)}, "ids: expected"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, "rows: expected"),
        (
            {"z": torch.zeros(17, 2).T, "rows": torch.zeros(2, dtype=torch.int64)},
            "adjacent columns",
        ),
    ],
)
def test_refuses_what_it_would_misread(change, message, device) -> None:
    rows = {
        "z": torch.zeros(2, 17),
        "target": torch.zeros(2, dtype=torch.int64),
        "inv_temperature": torch.ones(2),
        "spans": torch.tensor([[0, 1], [1, 2]]),
        "ids": torch.zeros(2, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        support.support_stats(**{**rows, **change}, logit_scale=1.0, softcap=0.0)
