"""preference_loss against the formula of DPO, written with log and exp in float64."""

import itertools
import math

import pytest
import torch

import pyrl
from pyrl.parity import DEVICE, MARGIN, relative

# Ragged: an empty sequence, a single token, an all-masked sequence (the last).
BOUNDS = torch.tensor([0, 7, 7, 8, 20, 23])
CHOSEN, REJECTED = torch.tensor([0, 3, 2, 1, 0]), torch.tensor([3, 2, 0, 4, 2])  # some twice


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    logprob = (torch.randn(23, generator=g) - 2).to(DEVICE)
    mask = (torch.rand(23, generator=g) < 0.7).to(DEVICE)
    mask[20:] = False
    fields = {
        "chosen": CHOSEN.to(DEVICE),
        "rejected": REJECTED.to(DEVICE),
        "ref_logprob": logprob + 0.5 * torch.randn(23, generator=g).to(DEVICE),
        "mask": mask,
        "cu_seqlens": BOUNDS.to(DEVICE),
    }
    return logprob.requires_grad_(), fields


def naive(logprob, fields, beta, smoothing=0.0, weights=None):
    """One pair at a time, in float64."""
    gap = logprob.double()
    if fields.get("ref_logprob") is not None:
        gap = gap - fields["ref_logprob"].double()
    bounds, mask = fields["cu_seqlens"].tolist(), fields["mask"]
    score = [gap[b:e][mask[b:e]].sum() for b, e in itertools.pairwise(bounds)]
    weights = [1.0] * len(fields["chosen"]) if weights is None else weights.tolist()
    total = 0.0
    for w, i, j in zip(weights, fields["chosen"], fields["rejected"], strict=True):
        right = 1 / (1 + (-beta * (score[i] - score[j])).exp())
        total = total - w * ((1 - smoothing) * right.log() + smoothing * (1 - right).log())
    return total / sum(weights)


@pytest.mark.parametrize("backend", ("torch", "reference"))
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("beta", (0.1, 2.0))
@pytest.mark.parametrize("with_ref", (True, False))
def test_against_float64_autograd(backend, smoothing, beta, with_ref):
    logprob, fields = inputs()
    if not with_ref:
        fields["ref_logprob"] = None
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5], device=DEVICE)
    exact_leaf = logprob.detach().double().requires_grad_()
    exact = naive(exact_leaf, fields, beta, smoothing, weights)
    exact.backward()
    out = pyrl.preference_loss(
        logprob, beta=beta, label_smoothing=smoothing, weights=weights, backend=backend, **fields
    )
    out.loss.backward()
    assert relative(out.loss, exact) < MARGIN[torch.float32]
    assert relative(logprob.grad, exact_leaf.grad) < MARGIN[torch.float32]
    assert not logprob.grad[~fields["mask"]].any()


def test_the_gradient_pushes_the_pair_apart_by_its_error():
    logprob = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    bounds = torch.tensor([0, 2, 3])
    out = pyrl.preference_loss(
        logprob, torch.tensor([0]), torch.tensor([1]), beta=0.5, cu_seqlens=bounds
    )
    out.loss.backward()
    margin = 0.5 * (-3 + 3)
    wrong = 1 / (1 + math.exp(margin))
    assert logprob.grad.tolist() == pytest.approx([-0.5 * wrong, -0.5 * wrong, 0.5 * wrong])
    assert out.loss.item() == pytest.approx(math.log(2))


def test_metrics_are_sums_and_counts():
    logprob, fields = inputs()
    out = pyrl.preference_loss(logprob, beta=0.3, **fields)
    gap = torch.where(fields["mask"], logprob.detach() - fields["ref_logprob"], 0.0).double()
    score = torch.stack([gap[b:e].sum() for b, e in itertools.pairwise(BOUNDS)])
    better, worse = 0.3 * score[fields["chosen"]], 0.3 * score[fields["rejected"]]
    margin = better - worse
    expected = {
        "tokens": fields["mask"].sum(), "pairs": 5, "pair_weight": 5,
        "preference_loss": out.loss.detach(), "accurate": (margin > 0).sum(),
        "margin_sum": margin.sum(), "margin_sq_sum": margin.square().sum(),
        "chosen_sum": better.sum(), "rejected_sum": worse.sum(), "nan_ref": 0,
    }  # fmt: skip
    assert set(out.metrics) == set(expected)
    for name, value in expected.items():
        assert out.metrics[name].item() == pytest.approx(float(value), rel=1e-6, abs=1e-6), name


def test_any_split_of_the_pairs_sums_to_the_same_gradient():
    logprob, fields = inputs()
    chosen, rejected = fields.pop("chosen"), fields.pop("rejected")
    pyrl.preference_loss(logprob, chosen, rejected, **fields).loss.backward()
    whole, logprob.grad = logprob.grad, None
    for s in (slice(0, 2), slice(2, 2), slice(2, 5)):
        pyrl.preference_loss(
            logprob, chosen[s], rejected[s], denominator=5, **fields
        ).loss.backward()
    torch.testing.assert_close(logprob.grad, whole)


def test_padded_equals_packed():
    g = torch.Generator().manual_seed(1)
    logprob, ref = torch.randn(2, 4, 6, generator=g).to(DEVICE).unbind()
    mask = (torch.arange(6) < torch.tensor([6, 0, 3, 5])[:, None]).to(DEVICE)
    bounds = torch.tensor([0, 6, 6, 9, 14], device=DEVICE)
    pairs = (torch.tensor([0, 2], device=DEVICE), torch.tensor([3, 1], device=DEVICE))
    padded = pyrl.preference_loss(logprob, *pairs, ref_logprob=ref, mask=mask)
    packed = pyrl.preference_loss(logprob[mask], *pairs, ref_logprob=ref[mask], cu_seqlens=bounds)
    torch.testing.assert_close(padded.loss, packed.loss)


@pytest.mark.parametrize("backend", ("torch", "reference"))
def test_margins_of_any_size_and_unkept_tokens_are_harmless(backend):
    logprob = torch.tensor([-4e4, -1.0, torch.nan, -1.0, 3e4, -torch.inf], requires_grad=True)
    mask = torch.tensor([True, True, False, True, True, False])
    bounds = torch.tensor([0, 3, 6])
    for chosen, expected in ((0, 7e4), (1, 0.0)):
        logprob.grad = None
        out = pyrl.preference_loss(
            logprob, torch.tensor([chosen]), torch.tensor([1 - chosen]), beta=1.0, mask=mask,
            cu_seqlens=bounds, backend=backend,
        )  # fmt: skip
        out.loss.backward()
        assert out.loss.item() == pytest.approx(expected)
        assert logprob.grad.isfinite().all() and not logprob.grad[~mask].any()


def test_a_missing_reference_leaves_its_token_out():
    logprob, fields = inputs()
    fields["ref_logprob"] = fields["ref_logprob"].detach().clone()
    token = int(fields["mask"].nonzero()[1, 0])
    fields["ref_logprob"][token] = torch.nan
    out = pyrl.preference_loss(logprob, **fields)
    assert out.metrics["nan_ref"] == 1
    fields["ref_logprob"][token], fields["mask"][token] = 0.0, False
    torch.testing.assert_close(out.loss, pyrl.preference_loss(logprob, **fields).loss)


def test_no_pairs():
    logprob, fields = inputs()
    none = fields["chosen"][:0]
    out = pyrl.preference_loss(logprob, **{**fields, "chosen": none, "rejected": none})
    out.loss.backward()
    assert out.loss == 0 and out.metrics["pairs"] == 0 and not logprob.grad.any()


def test_other_backends_say_that_they_have_none():
    logprob, fields = inputs()
    other = "cpu" if DEVICE.type == "cpu" else "triton"
    with pytest.raises(NotImplementedError, match=f"backend='{other}' has no preference_loss"):
        pyrl.preference_loss(logprob, backend=other, **fields)


def test_bad_input_names_itself():
    logprob, fields = inputs()

    def refuses(match, **changes):
        with pytest.raises(ValueError, match=match):
            pyrl.preference_loss(logprob, **{**fields, **changes})

    refuses("beta=0", beta=0)
    refuses("label_smoothing=0.5", label_smoothing=0.5)
    refuses("needs cu_seqlens", cu_seqlens=None)
    refuses("rejected: expected shape", rejected=fields["rejected"][:2])
    refuses(r"chosen: expected integers \[P\], got torch.float32", chosen=fields["chosen"].float())
    refuses("weights: expected shape", weights=torch.ones(2, device=DEVICE))
    refuses("denominator: expected one number", denominator=torch.ones(2, device=DEVICE))
    if DEVICE.type == "cpu":
        refuses(r"chosen\[1\] = 5: expected a sequence in \[0, 5\)", chosen=CHOSEN + 2)
        refuses(r"weights\[0\] = nan", weights=torch.full((5,), torch.nan))


def test_index_dtypes_and_denominators():
    logprob, mask = torch.tensor([[-1.0, -2.0], [-2.0, -2.5]]), torch.ones(2, 2)
    losses = []
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64):
        chosen, rejected = (torch.tensor(v, dtype=dtype) for v in ([0, 1], [1, 0]))
        losses.append(float(pyrl.preference_loss(logprob, chosen, rejected, mask=mask).loss))
    assert len(set(losses)) == 1  # uint8 would select as a mask
    for denominator in (float("nan"), -5.0):
        with pytest.raises(ValueError, match="denominator="):
            pyrl.preference_loss(logprob, chosen, rejected, mask=mask, denominator=denominator)
