"""Iterative DPO as a credit: its gradient is that of `preference_loss`, however rows are split."""

import dataclasses
import math

import pytest
import torch

from pyrl import LossSpec, pack, policy_objective, preference_loss
from pyrl.algorithms import Attempt, Group, PairCredit, minibatches
from pyrl.algorithms.pairs import LOSS

SPEC = LossSpec.from_dict(LOSS)
VOCABULARY = 11


def attempt(reward, tokens=(3, 4), finish="stop", **more):
    return Attempt(list(tokens), [-1.0] * len(tokens), finish, "", reward, **more)


def group(*attempts, prompt=(1, 2)):
    return Group("id", "", list(prompt), list(attempts))


def assigned(*attempts, **options):
    one = group(*attempts)
    pairs = PairCredit(0.1, **options).assign([one])["pairs"]
    assert [a.keep for a in one.attempts] == [a.advantage != 0 for a in one.attempts]
    assert sum(a.keep for a in one.attempts) == 2 * pairs
    return [a.advantage for a in one.attempts]


def test_best_and_worst_are_paired():
    assert assigned(*map(attempt, (0.5, 1.0, 0.0, 1.0, 0.0))) == [0, 1, -1, 0, 0]
    assert assigned(attempt(1.0), attempt(1.0)) == [0, 0]
    assert assigned(attempt(1.0)) == [0]
    assert assigned(attempt(math.nan), attempt(1.0), attempt(0.5)) == [0, 1, -1]
    assert assigned(attempt(math.nan), attempt(1.0)) == [0, 0]
    assert assigned(attempt(1.0, bonus=-2.0), attempt(0.0)) == [-1, 1]
    assert assigned(attempt(1.0, ()), attempt(0.0), attempt(0.5)) == [0, -1, 1]
    cut = attempt(0.0), attempt(1.0, finish="length"), attempt(0.5)
    assert assigned(*cut) == [-1, 1, 0]
    assert assigned(*cut, mask_truncated=True) == [-1, 0, 1]


def table(seed):
    """Logits of a bigram model: each token predicts the next."""
    made = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_()


def logprob(theta, row):
    logits = theta[row.at_targets(row.tokens)].log_softmax(-1)
    found = logits.gather(1, row.target[:, None]).squeeze(1)
    return torch.where(row.loss_mask, found, 0.0)


def samples_of(seed, masked):
    """Pairs of several groups as a minibatch, in group order, with random tokens."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        size = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(VOCABULARY, (size,), generator=draw).tolist()

    groups = [
        group(
            *[attempt(float(torch.rand((), generator=draw)), tokens(1, 9)) for _ in range(n)],
            prompt=tokens(1, 6),
        )
        for n in (2, 4, 3, 1, 5)
    ]
    credit = PairCredit(0.4)
    assert credit.assign(groups) == {"pairs": 4.0}
    (mini,) = minibatches(groups, SPEC, order=[3, 1, 0, 4, 2], whole_groups=credit.whole_groups)
    assert mini.denominator == len(mini.samples) == 8
    samples = mini.samples
    if masked:
        keep = [(torch.rand(len(s.completion), generator=draw) < 0.7).tolist() for s in samples]
        for mask in keep:
            mask[0] = True
        samples = [dataclasses.replace(s, mask=m) for s, m in zip(samples, keep, strict=True)]
    return samples, mini.denominator


def rows_of(samples, capacity, aligned):
    """The smallest row first; capacity 0: one for each sample, so that every pair is split."""
    if capacity:
        return sorted(pack(samples, capacity, aligned=aligned), key=lambda row: row.num_tokens)
    rows = [pack([s], 50, aligned=aligned).row(0) for s in samples]
    return [dataclasses.replace(row, sequence_ids=torch.tensor([i])) for i, row in enumerate(rows)][
        ::-1
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", [0, 14, 200])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_gradient_is_that_of_the_preference_loss(seed, smoothing, masked, capacity, aligned):
    samples, denominator = samples_of(seed, masked)
    rows = rows_of(samples, capacity, aligned)
    theta, frozen = table(seed), table(seed + 100).detach()
    ref = [logprob(frozen, row) for row in rows]
    credit = PairCredit(0.4, smoothing)
    new = credit.reweigh(rows, ref, lambda row: logprob(theta.detach(), row))
    for row in new:
        out = policy_objective(
            logprob(theta, row),
            row.advantages,
            SPEC,
            mask=row.loss_mask,
            cu_seqlens=row.cu_seqlens,
            denominator=denominator,
        )
        out.loss.backward()

    (whole,) = pack(samples, 1000)
    place = whole.sequence_ids.argsort()
    best = torch.tensor([i for i, s in enumerate(samples) if s.advantage > 0])
    assert sorted({*best.tolist(), *(best ^ 1).tolist()}) == list(range(8))
    oracle = theta.detach().clone().requires_grad_()
    expected = preference_loss(
        logprob(oracle, whole),
        place[best],
        place[best ^ 1],
        ref_logprob=logprob(frozen, whole),
        beta=0.4,
        mask=whole.loss_mask,
        cu_seqlens=whole.cu_seqlens,
        label_smoothing=smoothing,
    )
    expected.loss.backward()
    assert float(oracle.grad.abs().max()) > 1e-3
    # fp32 sums of tens of terms below 1
    torch.testing.assert_close(theta.grad, oracle.grad, atol=1e-6, rtol=1e-6)
    metrics, sums = credit.metrics(), expected.metrics
    assert metrics["preference_loss"] == pytest.approx(float(sums["preference_loss"]), rel=1e-6)
    assert metrics["preference_accuracy"] == float(sums["accurate"]) / 4
    assert metrics["preference_margin"] == pytest.approx(float(sums["margin_sum"]) / 4, rel=1e-6)


def test_at_the_reference_every_margin_is_zero():
    """m = 0: A = +-beta (1 - 2 s), the loss log 2; each update counts its own pairs."""
    samples, _ = samples_of(0, masked=False)
    rows = list(pack(samples, 30))
    theta = table(1).detach()
    credit = PairCredit(0.3, 0.1)
    ref = [logprob(theta, row) for row in rows]
    for _ in range(2):
        new = credit.reweigh(rows, ref, lambda row: logprob(theta, row))
    for row, before in zip(new, rows, strict=True):
        expected = 0.3 * 0.8 * before.advantages.sign()
        torch.testing.assert_close(row.advantages, expected, rtol=1e-6, atol=0)
    metrics = credit.metrics()
    assert metrics["preference_loss"] == pytest.approx(math.log(2))
    assert metrics["preference_accuracy"] == metrics["preference_margin"] == 0
    assert all(math.isnan(v) for v in credit.metrics().values())
    assert credit.reweigh([], [], lambda row: row.target) == []


def test_what_is_no_pair_is_refused():
    samples, _ = samples_of(0, masked=False)
    credit = PairCredit(0.3)

    def take(chosen):
        rows = list(pack(chosen, 200))
        zeros = [torch.zeros(row.target.shape) for row in rows]
        return credit.reweigh(rows, zeros, lambda row: torch.zeros(row.target.shape))

    take(samples)
    with pytest.raises(ValueError, match=r"samples 6 and 7: .* of signs \[-?1\]"):
        take(samples[:-1])
    with pytest.raises(ValueError, match="samples 0 and 1: expected a chosen and a rejected"):
        take([samples[0], samples[0]])
    one = [row for s in samples for row in pack([s], 50)]  # every row's sample is number 0
    with pytest.raises(ValueError, match="each of the minibatch's samples once"):
        credit.reweigh(one, [None] * len(one), lambda row: row.advantages)
    rows = list(pack(samples, 200))
    with pytest.raises(ValueError, match="row 0 has no reference log-probs"):
        credit.reweigh(rows, [None] * len(rows), lambda row: row.advantages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta=0.0"),
        ({"beta": math.nan}, "beta=nan"),
        ({"beta": 0.1, "label_smoothing": 0.5}, "label_smoothing=0.5"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PairCredit(**options)
