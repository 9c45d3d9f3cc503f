"""KL in the reward: estimates written out, and the gradient claims of the docstring."""

import math

import pytest
import torch

import pyrl
from pyrl.ops.spec import KLS
from pyrl.parity import DEVICE

NAN = float("nan")


def written_out(logprob, ref, kind):
    d = ref - logprob
    return {"k1": -d, "k2": d * d / 2, "abs": abs(d)}.get(kind, math.exp(d) - d - 1)


@pytest.mark.parametrize("kind", KLS)
def test_every_kind_by_its_formula(kind):
    g = torch.Generator().manual_seed(0)
    logprob, ref = torch.randn(2, 5, 4, generator=g).to(DEVICE).unbind()
    kl = pyrl.kl_penalty(logprob.requires_grad_(), ref, kind=kind)
    expected = [
        [written_out(p, q, kind) for p, q in zip(*rows, strict=True)]
        for rows in zip(logprob.tolist(), ref.tolist(), strict=True)
    ]
    torch.testing.assert_close(kl.cpu(), torch.tensor(expected), rtol=2e-6, atol=1e-6)
    assert kl.shape == (5, 4) and kl.dtype == torch.float32 and not kl.requires_grad


def test_default_is_k3():
    logprob, ref = torch.randn(2, 6, device=DEVICE).unbind()
    expected = pyrl.kl_penalty(logprob, ref, kind="k3")
    assert torch.equal(pyrl.kl_penalty(logprob, ref), expected)


def test_masked_and_unscored_tokens_cost_nothing_whatever_they_hold():
    logprob = torch.tensor([-1.0, NAN, -torch.inf, -2.0, -3.0], device=DEVICE)
    ref = torch.tensor([-1.5, 0.0, torch.inf, NAN, -2.0], device=DEVICE)
    mask = torch.tensor([True, False, False, True, True], device=DEVICE)
    for kind in KLS:
        kl = pyrl.kl_penalty(logprob, ref, kind=kind, mask=mask)
        assert kl[1:4].tolist() == [0, 0, 0] and kl[[0, 4]].all()


def test_clamp_bounds_both_sides():
    logprob = torch.tensor([-1.0, -9.0, -1.0], device=DEVICE)
    ref = torch.tensor([-9.0, -1.0, -1.5], device=DEVICE)
    kl = pyrl.kl_penalty(logprob, ref, kind="k1", clamp=2.0)
    assert kl.tolist() == [2, -2, 0.5]


@pytest.mark.parametrize("kind", KLS)
def test_rewards_lose_the_sum_over_kept_tokens(kind):
    g = torch.Generator().manual_seed(1)
    logprob, ref = torch.randn(2, 14, generator=g).to(DEVICE).unbind()
    mask = (torch.rand(14, generator=g) < 0.7).to(DEVICE)
    bounds = torch.tensor([0, 6, 6, 9, 14], device=DEVICE)
    rewards = torch.tensor([1.0, 0.0, NAN, 0.5], device=DEVICE)
    out = pyrl.rewards_with_kl(
        rewards, logprob, ref, coef=0.2, kind=kind, clamp=1.5, mask=mask, cu_seqlens=bounds
    )
    kl = pyrl.kl_penalty(logprob, ref, kind=kind, clamp=1.5, mask=mask)
    expected = torch.stack(
        [r - 0.2 * kl[b:e].sum() for r, b, e in zip(rewards, bounds, bounds[1:], strict=False)]
    )
    torch.testing.assert_close(out, expected, equal_nan=True)
    # A lost sample stays lost, and then leaves its group; an empty completion keeps its reward.
    assert out[2].isnan() and out[1] == 0 and not out.requires_grad


def test_padded_equals_packed_and_k1_is_the_default():
    g = torch.Generator().manual_seed(1)
    logprob, ref = torch.randn(2, 3, 5, generator=g).to(DEVICE).unbind()
    mask = (torch.arange(5) < torch.tensor([5, 0, 3])[:, None]).to(DEVICE)
    rewards = torch.rand(3, generator=g).to(DEVICE)
    padded = pyrl.rewards_with_kl(rewards, logprob, ref, coef=0.1, mask=mask)
    packed = pyrl.rewards_with_kl(
        rewards, logprob[mask], ref[mask], coef=0.1, kind="k1",
        cu_seqlens=torch.tensor([0, 5, 5, 8], device=DEVICE),
    )  # fmt: skip
    torch.testing.assert_close(padded, packed)


def test_in_the_reward_k1_gives_the_gradient_of_the_reverse_kl_and_k3_does_not():
    """Enumerated over 7 actions: sum_a p_a kl_a grad log p_a against the gradient of KL(p, q)."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=g, dtype=torch.float64).requires_grad_()
    q = torch.randn(7, generator=g, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    (true,) = torch.autograd.grad((logp.exp() * (logp - q)).sum(), logits, retain_graph=True)

    def score_gradient(kind):
        kl = pyrl.kl_penalty(logp, q, kind=kind).double()
        surrogate = (logp.exp().detach() * kl * logp).sum()
        return torch.autograd.grad(surrogate, logits, retain_graph=True)[0]

    torch.testing.assert_close(score_gradient("k1"), true, rtol=1e-5, atol=1e-6)
    assert (score_gradient("k3") - true).norm() > 0.1 * true.norm()


def test_bad_input_names_itself():
    v, bounds = torch.randn(4, device=DEVICE), torch.tensor([0, 4], device=DEVICE)
    for match, call in {
        "kind='k4'": lambda: pyrl.kl_penalty(v, v, kind="k4"),
        "clamp=0": lambda: pyrl.kl_penalty(v, v, clamp=0),
        "ref_logprob: expected shape": lambda: pyrl.kl_penalty(v, v[:2]),
        "coef=nan": lambda: pyrl.rewards_with_kl(v[:1], v, v, coef=NAN, cu_seqlens=bounds),
        "needs cu_seqlens": lambda: pyrl.rewards_with_kl(v[:1], v, v, coef=0.1),
        "rewards: expected shape": lambda: pyrl.rewards_with_kl(
            v, v, v, coef=0.1, cu_seqlens=bounds
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
