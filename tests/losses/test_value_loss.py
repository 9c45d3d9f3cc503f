"""value_loss against closed forms, float64 autograd and PPO's published formula."""

import itertools

import pytest
import torch

import pyrl
from pyrl.parity import DEVICE, MARGIN, relative

# Ragged: an empty sequence, a single token, an all-masked sequence (the last).
BOUNDS = torch.tensor([0, 7, 7, 8, 20, 23])
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant", "weighted")


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    values, returns, old, weights = torch.randn(4, 23, generator=g).to(DEVICE).unbind()
    mask = (torch.rand(23, generator=g) < 0.7).to(DEVICE)
    mask[20:] = False
    fields = {"mask": mask, "cu_seqlens": BOUNDS.to(DEVICE), "weights": weights.abs()}
    return values.clone().requires_grad_(), returns, values + 0.3 * old, fields


def naive(values, returns, old, clip, aggregation, fields, max_length):
    """The loss token by token, in float64."""
    mask, bounds = fields["mask"], fields["cu_seqlens"].tolist()
    v, r = values.double(), returns.double()
    square = (v - r) ** 2
    if clip is not None:
        near = torch.minimum(torch.maximum(v, old.double() - clip), old.double() + clip)
        square = torch.maximum(square, (near - r) ** 2)
    half = square / 2
    kept = [half[b:e][mask[b:e]] for b, e in itertools.pairwise(bounds)]
    if aggregation == "token_mean":
        return half[mask].sum() / mask.sum()
    if aggregation == "weighted":
        w = fields["weights"].double()[mask]
        return (w * half[mask]).sum() / w.sum()
    if aggregation == "sequence_mean":
        return sum(x.mean() for x in kept if len(x)) / len(kept)
    total = sum(x.sum() for x in kept) / len(kept)
    return total / max_length if aggregation == "constant" else total


@pytest.mark.parametrize("backend", ("torch", "reference"))
@pytest.mark.parametrize("clip", (None, 0.2))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_against_float64_autograd(backend, clip, aggregation):
    values, returns, old, fields = inputs()
    exact_values = values.detach().double().requires_grad_()
    exact = naive(exact_values, returns, old, clip, aggregation, fields, 9)
    exact.backward()
    out = pyrl.value_loss(
        values, returns, old_values=None if clip is None else old, clip=clip,
        aggregation=aggregation, max_length=9, backend=backend, **fields,
    )  # fmt: skip
    out.loss.backward()
    assert relative(out.loss, exact) < MARGIN[torch.float32]
    assert relative(values.grad, exact_values.grad) < MARGIN[torch.float32]
    assert out.metrics["value_loss"].item() == pytest.approx(exact.item(), rel=1e-6)
    assert out.metrics["tokens"] == fields["mask"].sum()


def test_the_gradient_of_a_plain_square_is_the_error():
    values, returns, _, fields = inputs()
    pyrl.value_loss(values, returns, mask=fields["mask"], denominator=2).loss.backward()
    expected = torch.where(fields["mask"], (values.detach() - returns) / 2, 0.0)
    torch.testing.assert_close(values.grad, expected)


def test_clipping_stops_the_gradient_only_where_it_raises_the_loss():
    # old 0, clip 1, return 0.5: inside; outside and worse; outside and better clipped (v is kept).
    values = torch.tensor([0.8, 3.0, -4.0], requires_grad=True)
    returns, old = torch.tensor([0.5, 5.0, 0.5]), torch.zeros(3)
    out = pyrl.value_loss(values, returns, old_values=old, clip=1.0, denominator=1)
    out.loss.backward()
    # 3 moved towards 5 beyond the bound 1: the clipped square (1 - 5)^2 wins and has no gradient.
    assert values.grad.tolist() == pytest.approx([0.3, 0.0, -4.5])
    assert out.metrics["clipped"] == 1
    assert out.loss.item() == pytest.approx(0.5 * (0.3**2 + 16 + 4.5**2))


def test_as_verl_defines_it():
    """verl: half of the masked mean of max((V - R)^2, (clip(V, old +- c) - R)^2); its clip share is
    the share of tokens whose clipped square is strictly the greater."""
    values, returns, old, fields = inputs(seed=2)
    mask = fields["mask"]
    plain = (values.detach() - returns).square()
    bounded = (values.detach().clip(old - 0.1, old + 0.1) - returns).square()
    out = pyrl.value_loss(values, returns, old_values=old, clip=0.1, mask=mask)
    expected = 0.5 * torch.maximum(plain, bounded)[mask].mean()
    torch.testing.assert_close(out.loss, expected)
    share = out.metrics["clipped"] / out.metrics["tokens"]
    assert share.item() == pytest.approx((bounded > plain)[mask].float().mean().item())


def test_explained_variance_from_sums():
    values, returns, _, fields = inputs()
    m = pyrl.value_loss(values, returns, mask=fields["mask"]).metrics
    n, r = m["tokens"], returns[fields["mask"]].double()
    error = (returns - values.detach())[fields["mask"]].double()

    def variance(name):
        return m[f"{name}_sq_sum"] / n - (m[f"{name}_sum"] / n) ** 2

    expected = 1 - error.var(correction=0) / r.var(correction=0)
    assert (1 - variance("error") / variance("return")).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_split_of_the_batch_sums_to_the_same_gradient(aggregation):
    values, returns, old, fields = inputs()
    totals = {"token_mean": fields["mask"].sum(), "weighted": 7.5}
    options = {
        "clip": 0.2, "aggregation": aggregation, "max_length": 9,
        "denominator": totals.get(aggregation, 5),
    }  # fmt: skip
    pyrl.value_loss(values, returns, old_values=old, **options, **fields).loss.backward()
    whole, values.grad = values.grad, None
    bounds = BOUNDS.tolist()
    for first, last in ((0, 2), (2, 3), (3, 5)):
        s = slice(bounds[first], bounds[last])
        pyrl.value_loss(
            values[s], returns[s], old_values=old[s], mask=fields["mask"][s],
            weights=fields["weights"][s],
            cu_seqlens=fields["cu_seqlens"][first : last + 1] - bounds[first], **options,
        ).loss.backward()  # fmt: skip
    torch.testing.assert_close(values.grad, whole, rtol=1e-6, atol=1e-8)


def test_padded_equals_packed():
    values, returns, old, fields = inputs()
    mask = torch.zeros(5, 12, dtype=torch.bool, device=DEVICE)
    spots = [(s, t) for s in range(5) for t in range(int(BOUNDS[s + 1] - BOUNDS[s]))]
    rows, columns = (torch.tensor(x, device=DEVICE) for x in zip(*spots, strict=True))
    mask[rows, columns] = fields["mask"]

    def padded(x):
        return torch.zeros(5, 12, device=DEVICE).index_put((rows, columns), x.detach())

    options = {"clip": 0.2, "aggregation": "sequence_mean"}
    packed = pyrl.value_loss(
        values, returns, old_values=old, mask=fields["mask"], cu_seqlens=fields["cu_seqlens"],
        **options,
    )  # fmt: skip
    out = pyrl.value_loss(
        padded(values), padded(returns), old_values=padded(old), mask=mask, **options
    )
    torch.testing.assert_close(out.loss, packed.loss)


@pytest.mark.parametrize("backend", ("torch", "reference"))
def test_unkept_tokens_may_hold_anything(backend):
    values, returns, old, fields = inputs()
    mask = fields["mask"]
    expected = pyrl.value_loss(values, returns, old_values=old, clip=0.2, mask=mask)
    dirty = torch.where(mask, values.detach(), torch.nan).requires_grad_()
    returns, old = torch.where(mask, returns, torch.inf), torch.where(mask, old, -torch.inf)
    out = pyrl.value_loss(dirty, returns, old_values=old, clip=0.2, mask=mask, backend=backend)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    assert dirty.grad.isfinite().all() and not dirty.grad[~mask].any()
    nothing = torch.zeros_like(mask)
    out = pyrl.value_loss(dirty, returns, mask=nothing, backend=backend)
    assert out.loss == 0 and out.metrics["tokens"] == 0


def test_other_backends_say_that_they_have_none(monkeypatch):
    values, returns, _, _ = inputs()
    other = "cpu" if DEVICE.type == "cpu" else "triton"
    with pytest.raises(NotImplementedError, match=f"backend='{other}' has no value_loss"):
        pyrl.value_loss(values, returns, backend=other)
    monkeypatch.setenv("PYRL_BACKEND", other)
    with pytest.raises(NotImplementedError, match=f"backend='{other}' has no value_loss"):
        pyrl.value_loss(values, returns)


def test_bad_input_names_itself():
    values, returns, old, _ = inputs()

    def refuses(match, v=values, r=returns, **options):
        with pytest.raises(ValueError, match=match):
            pyrl.value_loss(v, r, **options)

    refuses("clip=0.2: clip and old_values go together, old_values is missing", clip=0.2)
    refuses("clip is missing", old_values=old)
    refuses("clip=0:", clip=0, old_values=old)
    refuses("returns: expected shape", r=returns[:3])
    refuses("aggregation='mean'", aggregation="mean")
    refuses("needs cu_seqlens", aggregation="sequence_mean")
    refuses("needs max_length", aggregation="constant", cu_seqlens=BOUNDS.to(DEVICE))
    refuses("expected a floating dtype", v=values.detach().long())
    if DEVICE.type == "cpu":
        returns[3] = torch.nan
        refuses(r"returns\[3\] = nan is not finite")
