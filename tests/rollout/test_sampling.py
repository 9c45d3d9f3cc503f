"""The draw itself: support, frequencies, log-probs against distributions in float64."""

import numpy as np
import pytest
import torch

from pyrl.rollout import SamplingParams
from pyrl.rollout import sampling as S


def exact(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution of SamplingParams' docstring for one row, in float64, by sorting."""
    x = logits.double().numpy() / temperature
    p = np.exp(x - x.max())
    if top_k:
        p[x < np.sort(x)[-min(top_k, len(x))]] = 0
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
    return p


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 3},
        {"top_k": 1},
        {"top_p": 0.6},
        {"top_p": 0.01},
        {"top_k": 5, "top_p": 0.7, "temperature": 1.7},
        {"top_p": 0.8, "temperature": 3.0},
    ],
    ids=str,
)
def test_frequencies_and_logprobs_match_the_exact_distribution(options):
    vocab, draws = 11, 40_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 2
    p = exact(logits, **options)
    u = torch.from_numpy(S.uniforms(7, 0, 0, draws))
    token, logp = S.sample(logits.expand(draws, vocab), u, SamplingParams(**options))
    counts = torch.bincount(token, minlength=vocab).numpy()
    assert (counts[p == 0] == 0).all()
    # 5 standard deviations of a binomial count, plus 1 for the tokens hardly ever drawn.
    assert (np.abs(counts - draws * p) <= 5 * np.sqrt(draws * p * (1 - p)) + 1).all()
    # fp32 arithmetic on values of order 10.
    np.testing.assert_allclose(logp.numpy(), np.log(p[token.numpy()]), atol=2e-6)


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 5000, 49152])
def test_the_draw_is_the_inverse_of_the_cdf_at_every_vocabulary_size(vocab):
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
    u = torch.tensor([0.0, 2**-24, 0.3, 0.5, 0.9, 1 - 2**-24])
    token, logp = S.sample(logits, u, SamplingParams())
    p = logits.double().softmax(-1)
    cdf = p.cumsum(-1)
    at = cdf.gather(1, token[:, None])[:, 0]
    mass = p.gather(1, token[:, None])[:, 0]
    # CDF(token - 1) <= u < CDF(token), up to the fp32 sums of 256 weights.
    assert (at - mass <= u + 1e-6).all() and (u <= at + 1e-6).all()
    torch.testing.assert_close(logp, mass.log().float(), atol=2e-6, rtol=0)


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.full((5, 600), -torch.inf)
    logits[:, [3, 300, 599]] = torch.tensor([0.0, 1.0, 0.5])
    u = torch.tensor([0.0, 0.2, 0.5, 0.9, 1 - 2**-24])
    token, logp = S.sample(logits, u, SamplingParams())
    assert token.tolist() == [3, 300, 300, 599, 599]
    assert torch.isfinite(logp).all()


def test_a_flat_nucleus_wider_than_the_candidates_is_sorted_in_full():
    vocab = 3 * S.CANDIDATES
    logits = torch.zeros(2, vocab)
    logits[1, 5] = 50.0  # this row's nucleus is one token, the other's needs 90% of the vocabulary
    kept = torch.isfinite(S.truncate(logits, 0, 0.9)).sum(-1).tolist()
    assert abs(kept[0] - 0.9 * vocab) <= 1 and kept[1] == 1


def test_top_k_keeps_ties_and_top_p_counts_mass_after_top_k():
    x = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert torch.isfinite(S.truncate(x, 2, 1.0)).tolist() == [[True, True, True, False]]
    # Of the two kept tokens the first holds 73%; before top-k it held 64%, below 0.7.
    x = torch.tensor([[2.0, 1.0, 0.0]])
    assert torch.isfinite(S.truncate(x, 2, 0.7)).tolist() == [[True, False, False]]


def test_temperature_zero_is_greedy_and_reports_temperature_one():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    token, logp = S.sample(logits, torch.rand(4), SamplingParams(temperature=0))
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(logp, logits.log_softmax(-1).amax(-1), atol=1e-6, rtol=0)


def test_rows_are_drawn_alike_in_chunks_and_alone(monkeypatch):
    logits = torch.randn(9, 700, generator=torch.Generator().manual_seed(1)).bfloat16()
    u = torch.from_numpy(S.uniforms(0, 0, 0, 9))
    params = SamplingParams(top_p=0.9)
    whole = S.sample(logits, u, params)
    monkeypatch.setattr(S, "CHUNK", 1500)  # two rows at a time
    parts = S.sample(logits, u, params)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


def test_noise_is_a_function_of_seed_prompt_and_sample():
    base = S.uniforms(1, 2, 3, 8)
    assert (S.uniforms(1, 2, 3, 16)[:8] == base).all()
    assert base.dtype == np.float32 and (base >= 0).all() and (base < 1).all()
    for other in [(0, 2, 3), (1, 3, 3), (1, 2, 4), (1 + 2**64 - 1, 3, 2), (-1, 2, 3)]:
        assert not (S.uniforms(*other, 8) == base).any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 1.5),
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("stop_token_ids", (3, -2)),
    ],
)
def test_bad_sampling_params_name_themselves(field, value):
    with pytest.raises(ValueError, match=f"SamplingParams.{field}"):
        SamplingParams(**{field: value})
