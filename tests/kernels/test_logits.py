"""logits_stats and logits_grad_ against float64 torch and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrl.kernels import logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Half a unit in the last place, relative: what rounding an exact gradient to the dtype costs.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def softmax_input(z: Tensor, inv_temperature: Tensor, scale: float, softcap: float) -> Tensor:
    x = z * scale
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    return x * inv_temperature.double()[:, None]


def stats(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 log-prob, entropy, lse; -inf entries are selected away before any arithmetic."""
    lse = torch.logsumexp(x, dim=1)
    logp = torch.where(x > -math.inf, x - lse[:, None], 0.0)
    plogp = torch.where(x > -math.inf, logp.exp() * logp, 0.0)
    logprob = x.gather(1, target[:, None])[:, 0] - lse
    return logprob, -plogp.sum(dim=1), lse


def random_rows(n: int, V: int, dtype: torch.dtype, seed: int, device: torch.device) -> dict:
    draw = torch.Generator().manual_seed(seed)
    rows = {
        "z": (torch.randn(n, V, generator=draw) * 4).to(dtype),
        "target": torch.randint(V, (n,), generator=draw),
        "inv_temperature": 0.5 + torch.rand(n, generator=draw),
    }
    return {name: value.to(device) for name, value in rows.items()}


def check(rows: dict, scale: float, softcap: float, coefficients: tuple) -> None:
    """Both launchers against autograd in float64 on the same (already rounded) logits."""
    z, target, inv_temperature = rows["z"], rows["target"], rows["inv_temperature"]
    exact_z = z.double().requires_grad_()
    x = softmax_input(exact_z, inv_temperature, scale, softcap)
    exact = stats(x, target)
    got = logits.logits_stats(z, target, inv_temperature, scale, softcap)
    # x carries up to three fp32 roundings, so no result need be closer than 2^-22 max|x|.
    finite = x.detach()[x.isfinite()]
    slack = 2.0**-22 * (1 + float(finite.abs().max()))
    for name, mine, theirs in zip(("logprob", "entropy", "lse"), got, exact, strict=True):
        torch.testing.assert_close(
            mine.double(),
            theirs.detach(),
            rtol=0,
            atol=2 * slack,
            msg=lambda m, n=name: f"{n}: {m}",
        )

    c, h, g = coefficients
    _, entropy, lse = got
    used = [(k, value) for k, value in zip((c, h, g), exact, strict=True) if k is not None]
    objective = sum((k.double() * value).sum() for k, value in used)
    (exact_grad,) = torch.autograd.grad(objective, exact_z)
    grad = z.clone()
    logits.logits_grad_(grad, target, inv_temperature, scale, softcap, lse, entropy, c, h, g)
    # p = exp(x - lse) inherits the error of x; then one rounding to the dtype.
    x = x.detach()
    _, H, lse = (value.detach()[:, None] for value in exact)
    logp = torch.where(x > -math.inf, x - lse, 0.0)
    p = torch.where(x > -math.inf, logp.exp(), 0.0)
    terms = p * (1 + logp.abs() + H)
    terms.scatter_add_(1, target[:, None], torch.ones_like(lse))
    size = sum(k.abs() for k, _ in used)[:, None].double()
    size = size * abs(scale) * inv_temperature.double()[:, None]
    bound = ROUNDOFF[z.dtype] * exact_grad.abs() + 2 * slack * size * terms
    bound = bound + torch.finfo(z.dtype).smallest_normal * torch.finfo(z.dtype).eps
    error = (grad.double() - exact_grad).abs()
    worst = (error - bound).argmax()
    assert error.flatten()[worst] <= bound.flatten()[worst], (
        f"grad {grad.flatten()[worst]} instead of {exact_grad.flatten()[worst]} at {int(worst)}"
    )


def coefficients(n: int, seed: int, device: torch.device, with_g: bool) -> tuple:
    draw = torch.Generator().manual_seed(seed + 1)
    c, h, g = torch.randn(3, n, generator=draw).to(device)
    return c, h, (g if with_g else None)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("V", [1, 3, 17, 1000, 32001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype: torch.dtype, V: int, softcap: float, device: torch.device) -> None:
    n = 2 if V > 1000 else 5
    rows = random_rows(n, V, dtype, seed=V, device=device)
    check(rows, 1.3, softcap, coefficients(n, V, device, with_g=softcap > 0))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    V=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 0.0625, -0.7]),
    softcap=st.sampled_from([0.0, 1.0, 30.0]),
    holes=st.floats(0, 1),
    with_g=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_rows_with_infinite_logits(
    n: int,
    V: int,
    dtype: torch.dtype,
    scale: float,
    softcap: float,
    holes: float,
    with_g: bool,
    seed: int,
    device: torch.device,
) -> None:
    rows = random_rows(n, V, dtype, seed, device)
    # Padding never hides the target, and is -inf in x (a softcap would make it finite).
    if softcap == 0:
        hidden = torch.rand(n, V, generator=torch.Generator().manual_seed(seed)) < holes
        hidden[torch.arange(n), rows["target"].cpu()] = False
        rows["z"][hidden.to(device)] = -math.copysign(math.inf, scale)
    check(rows, scale, softcap, coefficients(n, seed, device, with_g))


def test_softcap_makes_minus_infinity_finite(device: torch.device) -> None:
    z = torch.tensor([[0.5, -math.inf, 1.0]], device=device)
    target, one = torch.tensor([1], device=device), torch.ones(1, device=device)
    got = logits.logits_stats(z, target, one, 1.0, 2.0)
    exact = stats(softmax_input(z.double(), one, 1.0, 2.0), target)
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)
    logits.logits_grad_(z, target, one, 1.0, 2.0, got[2], got[1], one, one, one)
    assert z.isfinite().all() and z[0, 1] == 0  # tanh is flat there


def test_row_of_minus_infinity(device: torch.device) -> None:
    z = torch.full((2, 17), -math.inf, device=device)
    z[1] = 0.0
    target = torch.tensor([3, 3], device=device)
    one = torch.ones(2, device=device)
    logprob, entropy, lse = logits.logits_stats(z, target, one, 1.0, 0.0)
    assert logprob.tolist()[0] == lse.tolist()[0] == -math.inf and entropy.tolist()[0] == 0.0
    assert lse.tolist()[1] == pytest.approx(math.log(17), rel=1e-6)
    c = torch.tensor([2.0, 0.0], device=device)
    logits.logits_grad_(z, target, one, 1.0, 0.0, lse, entropy, c, one, one)
    assert z[0].tolist() == [2.0 if v == 3 else 0.0 for v in range(17)]  # only the target's c


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_without_gradient_becomes_zero_whatever_it_holds(
    dtype: torch.dtype, device: torch.device
) -> None:
    V = 1025
    z = torch.full((3, V), math.nan, dtype=dtype, device=device)
    z[1] = 1.0
    z[2] = -math.inf
    nan = torch.tensor([math.nan, math.log(V) + 1, -math.inf], device=device)
    entropy = torch.tensor([math.nan, math.nan, math.nan], device=device)
    target = torch.zeros(3, dtype=torch.int64, device=device)
    c = torch.tensor([0.0, 1.0, 0.0], device=device)
    zero, one = torch.zeros(3, device=device), torch.ones(3, device=device)
    logits.logits_grad_(z, target, one, 1.0, 0.0, nan, entropy, c, zero, zero)
    assert (z[0] == 0).all() and (z[2] == 0).all()
    # Without an entropy gradient the entropy is not looked at.
    expected = torch.full((V,), -1 / V, device=device)
    expected[0] += 1
    torch.testing.assert_close(z[1].float(), expected, rtol=2 * ROUNDOFF[dtype] + 1e-6, atol=0)


def test_large_logits_do_not_cancel(device: torch.device) -> None:
    # lse is 30000 with a spacing of 2e-3, yet entropy and log-prob depend on differences only.
    x = torch.tensor([[30000.0, 29999.0, 29990.0, -30000.0]], device=device)
    target = torch.tensor([1], device=device)
    logprob, entropy, _ = logits.logits_stats(x, target, torch.ones(1, device=device), 1.0, 0.0)
    exact = stats(x.double(), target)
    torch.testing.assert_close(logprob.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=1e-6, atol=0)


def test_maximum_moves_between_tiles(device: torch.device) -> None:
    # Ascending logits move every lane's running maximum; a first tile of -inf has none.
    V = 20_000
    x = torch.linspace(-40, 40, V, device=device)[None].clone()
    x[0, :9000] = -math.inf
    target = torch.tensor([V - 1], device=device)
    got = logits.logits_stats(x, target, torch.ones(1, device=device), 1.0, 0.0)
    for mine, theirs in zip(got, stats(x.double(), target), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=2e-6)


def test_nan_logit_stays_visible(device: torch.device) -> None:
    z = torch.zeros(1, 1200, device=device)
    z[0, 1100] = math.nan
    target = torch.zeros(1, dtype=torch.int64, device=device)
    got = logits.logits_stats(z, target, torch.ones(1, device=device), 1.0, 0.0)
    assert all(value.isnan().all() for value in got)


@pytest.mark.parametrize("outside", [-100, 17, 2**40])
def test_target_outside_the_vocabulary_gives_nan(outside: int, device: torch.device) -> None:
    z = torch.zeros(1, 17, device=device)
    target = torch.tensor([outside], device=device)
    logprob, entropy, _ = logits.logits_stats(z, target, torch.ones(1, device=device), 1.0, 0.0)
    assert logprob.isnan().all() and entropy.tolist() == [pytest.approx(math.log(17), rel=1e-6)]


def test_no_rows(device: torch.device) -> None:
    z = torch.empty(0, 7, device=device)
    rows = torch.empty(0, device=device)
    target = torch.empty(0, dtype=torch.int64, device=device)
    got = logits.logits_stats(z, target, rows, 1.0, 0.0)
    assert [tuple(value.shape) for value in got] == [(0,)] * 3
    logits.logits_grad_(z, target, rows, 1.0, 0.0, rows, rows, rows, rows, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(17, 2).T}, "z: expected a contiguous"),
        ({"z": torch.zeros(2, 17, dtype=torch.float64)}, "z: expected a contiguous"),
        ({"z": torch.zeros(2, 0)}, "V > 0"),
        ({"target": torch.zeros(2, dtype=torch.int32)}, "target: expected"),
        ({"inv_temperature": torch.ones(1)}, "inv_temperature: expected"),
        ({"inv_temperature": torch.ones(4)[::2]}, "inv_temperature: expected"),
    ],
)
def test_refuses_what_it_would_misread(change: dict, message: str, device: torch.device) -> None:
    rows = {
        "z": torch.zeros(2, 17),
        "target": torch.zeros(2, dtype=torch.int64),
        "inv_temperature": torch.ones(2),
    }
    with pytest.raises(ValueError, match=message):
        logits.logits_stats(**{**rows, **change}, logit_scale=1.0, softcap=0.0)


def test_rows_are_on_grid_axis_0(monkeypatch: pytest.MonkeyPatch) -> None:
    # The other axes end at 65,535. Interpreting 70,000 programs would take a minute.
    grids = []

    class Recorder:
        def __getitem__(self, grid: tuple) -> object:
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(logits, "_logits_stats_kernel", Recorder())
    monkeypatch.setattr(logits, "_logits_grad_kernel", Recorder())
    n = 70_000
    z, row = torch.empty(n, 2), torch.empty(n)
    target = torch.empty(n, dtype=torch.int64)
    logits.logits_stats(z, target, row, 1.0, 0.0)
    logits.logits_grad_(z, target, row, 1.0, 0.0, row, row, row, row, None)
    assert grids == [(n,), (n,)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offsets_beyond_2_to_the_31(device: torch.device) -> None:
    n, V = 70_000, 32_001  # 2.2e9 elements
    z = torch.zeros(n, V, dtype=torch.bfloat16, device=device)
    z[-1, 5] = 3.0
    target = torch.full((n,), 5, device=device)
    one = torch.ones(n, device=device)
    logprob, entropy, lse = logits.logits_stats(z, target, one, 1.0, 0.0)
    exact = stats(z[-1:].double(), target[-1:])
    for mine, theirs in zip((logprob, entropy, lse), exact, strict=True):
        torch.testing.assert_close(mine[-1:].double(), theirs, rtol=1e-6, atol=1e-6)
    assert (lse[:-1] - math.log(V)).abs().max() < 1e-5
    logits.logits_grad_(z, target, one, 1.0, 0.0, lse, entropy, one, one, None)
    assert z[-1, 5] > 0.9 and z[-1, 4] < 0 and (z[0] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("inv_temperature", [0.5, 1.0])
def test_tokens_masked_by_the_least_finite_number(
    dtype: torch.dtype, inv_temperature: float, device: torch.device
) -> None:
    """As models mask padded vocabularies. Sums begun at -3e38 add 0, not 0 * inf, to the next."""
    rows = random_rows(3, 5000, dtype, seed=0, device=device)
    z, target = rows["z"], rows["target"] % 1000 + 4000
    z[:, :4000] = torch.finfo(dtype).min
    inv = torch.full_like(rows["inv_temperature"], inv_temperature)
    got = logits.logits_stats(z, target, inv, 1.0, 0.0)
    # -3e38 has probability 0, as -inf has.
    exact_z = torch.where(z < -1e38, -math.inf, z.double()).requires_grad_()
    exact = stats(exact_z * inv_temperature, target)
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs.detach(), rtol=2e-6, atol=4e-6)
    c, h, g = (4 * k for k in coefficients(3, 0, device, with_g=True))
    objective = sum((k.double() * v).sum() for k, v in zip((c, h, g), exact, strict=True))
    (exact_grad,) = torch.autograd.grad(objective, exact_z)
    logits.logits_grad_(z, target, inv, 1.0, 0.0, got[2], got[1], c, h, g)
    exact_grad = exact_grad.nan_to_num(0.0)  # autograd's own 0 * inf
    torch.testing.assert_close(z.double(), exact_grad, rtol=ROUNDOFF[dtype] + 2e-5, atol=1e-7)
