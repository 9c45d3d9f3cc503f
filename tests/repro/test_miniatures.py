"""One quick run of every miniature, and the closed forms they rest on."""

import itertools

import numpy as np
import pytest
import torch

import pyrl.trainer.session
from pyrl.repro import (
    dynamic_sampling,
    gvm,
    gvm_online,
    gvm_transformer,
    kl_reset,
    minimalist,
)
from pyrl.repro.claim import Result, Verdict
from pyrl.repro.document import markdown
from pyrl.repro.policies import Policies, Streams
from pyrl.repro.registry import MINIATURES, find
from pyrl.repro.tiny import completion_logprob, questions, tiny_policy


@pytest.mark.parametrize("name", find("all"))
def test_one_quick_seed(name, monkeypatch, tmp_path):
    # One miniature runs the trainer: its model belongs elsewhere, and reports take seconds to draw.
    monkeypatch.setenv("PYRL_CACHE", str(tmp_path))
    monkeypatch.setattr(pyrl.trainer.session, "write_report", lambda path: path)
    result = MINIATURES[name].load()(1, True)
    assert result.name == name and result.claims and result.charts and result.caveats
    assert Result.from_dict(result.to_dict()) == result
    for claim in result.claims:  # every claim is about arms that are there; one seed decides none
        assert result.verdict(claim) in (Verdict.UNDECIDED, Verdict.REPORTED)
    assert result.title in markdown([result])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in find("all") if n != "temporal-clue"])  # minutes
def test_a_run_at_full_size(name):
    result = MINIATURES[name].load()(2, False)
    assert all(len(arm.values) == 2 for arm in result.arms)
    assert all(result.difference(claim).seeds == 2 for claim in result.claims)


def test_a_seed_does_not_depend_on_its_neighbours():
    small = minimalist.Setting(
        prompts=12, actions=4, correct=1, steps=3, lr=0.05, unsolvable=0.5, batch=4
    )
    alone = minimalist.simulate(small, minimalist.GRPO, 1)
    among = minimalist.simulate(small, minimalist.GRPO, 3)
    for a, b in zip(alone.entropy, among.entropy, strict=True):
        # one row of a batched product, or the product: fp32 rounding through three Adam steps
        torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)


def test_samples_follow_the_policy():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 5)
    policies = Policies(None, logits, torch.zeros(1, 3, 5, dtype=torch.bool))
    prompts = torch.tensor([[2, 0]])
    uniform = ((torch.arange(10_000) + 0.5) / 10_000).expand(1, 2, -1)
    actions, logprob, rewards = policies.sample(prompts, uniform)
    for i, prompt in enumerate((2, 0)):
        share = torch.bincount(actions[0, i], minlength=5) / 10_000
        # an even grid of uniform numbers misses a probability by one of its steps at most
        torch.testing.assert_close(share, logits[0, prompt].softmax(-1), rtol=0, atol=1.01e-4)
    assert bool((rewards == -1).all())
    torch.testing.assert_close(
        logprob, policies.logits(prompts).log_softmax(-1).gather(2, actions).detach()
    )


@pytest.mark.parametrize("features", [0, 8])
def test_policies_start_at_the_asked_accuracy(features):
    setting = minimalist.Setting(
        prompts=20, actions=8, correct=2, steps=0, lr=0.1, start=0.7, features=features
    )
    policies, solvable = minimalist.problem(setting, Streams(3))
    accuracy = policies.accuracy()
    assert bool(solvable.all()) and bool((policies.correct.sum(-1) == 2).all())
    torch.testing.assert_close(accuracy.mean(1), torch.full((3,), 0.7), rtol=0, atol=1e-5)
    if not features:
        torch.testing.assert_close(accuracy, torch.full((3, 20), 0.7), rtol=0, atol=1e-5)


def test_unsolvable_prompts_have_no_right_action():
    setting = minimalist.Setting(prompts=40, actions=4, correct=1, steps=0, lr=0.1, unsolvable=0.9)
    policies, solvable = minimalist.problem(setting, Streams(2))
    assert solvable.sum(1).tolist() == [4, 4]
    assert torch.equal(policies.correct.any(-1), solvable)


def test_the_exact_error_is_that_of_simulated_estimates():
    setting = gvm.Setting(prompts=3, actions=6, correct=2)
    moments, _, _ = gvm.draw(setting, 0)
    budget = np.array([4, 0, 9])
    # The same policy once more, its estimator by brute force.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    logits[:, :2] += 2 * torch.randn(3, 1, generator=generator, dtype=torch.float64)
    policy = logits.softmax(-1)
    draws, total = 200_000, 0.0
    for p, n in zip(policy, budget, strict=True):
        gradient = p[None] - torch.eye(6, dtype=torch.float64)[:2]
        rate = p[:2].sum()
        mean = (p[:2, None] * gradient).sum(0) / rate
        if n == 0:
            total += float(mean @ mean)
            continue
        counts = torch.distributions.Multinomial(int(n), p).sample((draws,))[:, :2]
        estimates = counts @ gradient / (n * rate)
        total += float((estimates - mean).square().sum(1).mean())
    # 200,000 draws of a heavy-tailed square: about 1% of standard error at these rates
    assert gvm.error(moments, budget) == pytest.approx(total, rel=0.05)


@pytest.mark.parametrize("pilot", [4, 8])
def test_the_counted_ratios_have_a_closed_form(pilot):
    # With very many samples nothing is rounded: n_i = N P w_i / sum(w) on the S seen prompts.
    setting = gvm.Setting(prompts=24, samples=10**8, pilot=pilot)
    moments, rate, norm = gvm.draw(setting, 5)
    seen = rate > 0
    assert 0 < seen.sum() < 24
    single = moments.second / moments.rate - moments.mean
    v, p = single[seen], rate[seen]
    w = norm[seen] / np.sqrt(p + 1e-3 / p)
    spent = w.sum() * (v / w).sum() / (24 * 10**8)
    each = 10**8 + pilot
    found = gvm.ratios(setting, 5)
    wanted = {
        gvm.FREE: v.sum() * seen.sum() / (24 * 10**8),
        gvm.PAID: v.sum() / each,  # N + N' samples on every prompt, the seen ones' errors
        gvm.KNOWING: v.sum() * seen.sum() / (24 * each),  # (N + N') P samples on the seen ones
    }
    for quantity, base in wanted.items():
        assert found[quantity, gvm.PILOT] == pytest.approx(spent / base, rel=1e-6)
    everywhere = single.sum() / each
    missing = moments.mean[~seen].sum()
    assert found[gvm.EVERY, gvm.PILOT] == pytest.approx((spent + missing) / everywhere, rel=1e-6)
    total = 24 * 10**8 + pilot * seen.sum()  # the pilot's own samples of the seen prompts too
    reused = w.sum() * (v / w).sum() / total / wanted[gvm.PAID]
    assert found[gvm.PAID, gvm.REUSED] == pytest.approx(reused, rel=1e-6)


def test_prompts_that_are_alike_gain_what_the_pilot_leaves_out(monkeypatch):
    # Nothing to allocate: S = 4 of P = 8 seen, N P / S = 16 samples each against N + N' = 12.
    same = gvm.Moments(*(np.full(8, x) for x in (0.25, 1.0, 1.0, 0.5)))
    rate = np.array([0.25, 0, 0.25, 0, 0.25, 0, 0.25, 0])
    monkeypatch.setattr(gvm, "draw", lambda setting, seed: (same, rate, (rate > 0).astype(float)))
    found = gvm.ratios(gvm.Setting(prompts=8, samples=8, pilot=4), 0)
    assert found[gvm.FREE, gvm.PILOT] == pytest.approx(1)
    assert found[gvm.PAID, gvm.PILOT] == pytest.approx(12 / 16)
    assert found[gvm.KNOWING, gvm.PILOT] == pytest.approx(24 / 16)
    assert found[gvm.PAID, gvm.REUSED] == pytest.approx(12 / 20)
    # 4 prompts at 3.5 / 16, 4 missing ones at 0.5; against 8 at 3.5 / 12
    assert found[gvm.EVERY, gvm.PILOT] == pytest.approx((4 * 3.5 / 16 + 4 * 0.5) / (8 * 3.5 / 12))


def test_the_transformer_counts_the_pilot_as_the_table_does(monkeypatch):
    # Four prompts, one right completion each, orthogonal unit gradients; two are seen.
    pool = gvm_transformer.Pool(
        np.arange(4), np.full(4, 0.25), np.eye(4), {part: np.ones(4) for part in ("all", "head")}
    )
    pool.norms["embedding"] = np.ones(4)
    rate = np.array([0.5, 0, 0, 0.5])
    pilot = (rate, {part: (rate > 0).astype(float) for part in gvm_transformer.PARTS})
    monkeypatch.setattr(gvm_transformer, "measure", lambda setting, seed: pool)
    monkeypatch.setattr(gvm_transformer, "pilot", lambda *_: pilot)
    setting = gvm_transformer.Setting(prompts=4, samples=8, pilot=4, replicates=10)
    found, _ = gvm_transformer.ratios(setting, 0)
    arm = "GVM (embedding)"
    assert found[gvm.FREE, arm] == pytest.approx(1)
    assert found[gvm.PAID, arm] == pytest.approx(12 / 16)
    assert found[gvm.KNOWING, arm] == pytest.approx(24 / 16)
    assert found[gvm.PAID, gvm_transformer.REUSED] == pytest.approx(12 / 20)


def test_a_verdict_names_the_other_step_sizes():
    verdicts = {1.0: "disagrees", 2.0: "disagrees", 20.0: "agrees"}
    text = minimalist._elsewhere(verdicts)
    assert text == "; at the other sizes: disagrees at 1, 2; agrees at 20"
    assert minimalist._elsewhere({}) == ""


def test_gradients_of_the_table_are_those_of_autograd():
    moments, _, _ = gvm.draw(gvm.Setting(prompts=1, actions=5, correct=2), 3)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    logits[:, :2] += 2 * torch.randn(1, 1, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logprob = logits.log_softmax(-1)[0]
    rows = [torch.autograd.grad(-logprob[a], logits, retain_graph=True)[0][0] for a in (0, 1)]
    given = logprob[:2].exp().detach()
    given = given / given.sum()
    norms = torch.stack(rows).norm(dim=1)
    assert moments.norm[0] == pytest.approx(float(given @ norms))
    assert moments.second[0] == pytest.approx(float(given @ norms**2))


def test_the_pool_holds_exact_probabilities_and_gradients():
    setting = gvm_transformer.Setting(prompts=3, warm=2)
    pool = gvm_transformer.measure(setting, 1)
    assert np.allclose(np.sqrt(np.diag(pool.gram)), pool.norms["all"], rtol=1e-5)  # fp32 products
    for part in ("embedding", "head"):
        assert (pool.norms[part] > 0).all() and (pool.norms[part] < pool.norms["all"]).all()
    true = gvm_transformer.truth(pool)
    budget, seen = np.array([5, 0, 8]), np.array([True, True, True])
    exact = gvm_transformer.error(true, budget, seen)
    drawn = gvm_transformer.bootstrap(pool, true, budget, seen, 20_000)
    # rare accepted samples make heavy tails: a few per cent at 20,000 replicates
    assert drawn == pytest.approx(exact, rel=0.15)


def test_the_questions_have_the_answers_that_they_say():
    found = questions()
    assert len({tuple(prompt) for prompt, _ in found}) == len(found)
    sizes = [len(answers) for _, answers in found]
    assert min(sizes) == 1 and max(sizes) == 81
    assert sum(size == 10 for size in sizes) >= 100  # the sums


def test_a_completion_s_probabilities_add_up():
    model = tiny_policy(0)
    everything = torch.arange(320)[:, None]
    with torch.no_grad():
        logprob = completion_logprob(
            model, torch.tensor([[30, 11, 12]]).expand(320, -1), everything
        )
    assert float(logprob.double().exp().sum()) == pytest.approx(1, abs=1e-5)  # 320 fp32 terms


def test_the_oracle_maximises_reward_minus_kl():
    # Brute force over the probability of the right tokens, within which shares stay as they were.
    start, gap, beta = 0.05, 1.0, 0.5
    p = torch.linspace(1e-6, 1 - 1e-6, 2_000_001, dtype=torch.float64)
    kl = p * (p / start).log() + (1 - p) * ((1 - p) / (1 - start)).log()
    best = float(p[(gap * p - beta * kl).argmax()])
    oracle = kl_reset.oracle(torch.tensor(start), gap, beta, 1)
    assert float(oracle) == pytest.approx(best, abs=1e-6)  # the grid's step
    twice = kl_reset.oracle(oracle, gap, beta, 1)
    assert float(twice) == pytest.approx(float(kl_reset.oracle(torch.tensor(start), gap, beta, 2)))


def test_a_reset_leaves_no_kl_at_all():
    setting = kl_reset.Setting(phase=5, references=3, every=5, samples=8)
    trace = kl_reset.train(setting, kl_reset.RESET, 0)
    assert trace.after_reset == [0.0, 0.0]
    assert [kl for step, kl in zip(trace.steps, trace.kl, strict=True) if step in (0, 5, 10)] == [
        0.0, 0.0, 0.0
    ]  # fmt: skip
    assert trace.kl[-1] > 0
    fixed = kl_reset.train(setting, kl_reset.FIXED, 0)
    assert fixed.after_reset == [] and fixed.kl[1] > 0
    assert fixed.accuracy[:2] == trace.accuracy[:2]  # the same until the first reset


def test_right_tokens_start_at_or_just_above_the_share():
    trace = kl_reset.train(kl_reset.Setting(phase=1, references=1), kl_reset.FIXED, 2)
    # no single token is likelier than half the share
    assert bool((trace.start >= 0.05).all()) and bool((trace.start <= 0.075).all())


def test_refilling_takes_the_first_mixed_groups():
    mixed = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    chosen, draws = dynamic_sampling.select(mixed, 2)
    assert chosen.tolist() == [[1, 4], [0, 1], [5, 0]]  # the last is filled by the first unmixed
    assert draws.tolist() == [3, 1, 3]  # which was drawn in vain until the end


def test_samples_are_counted_in_both_arms():
    setting = dynamic_sampling.Setting(prompts=64, batch=4, steps=3, samples=4)
    plain = dynamic_sampling.simulate(setting, False, 2)
    refill = dynamic_sampling.simulate(setting, True, 2)
    assert torch.stack(plain.sampled)[:, 0].tolist() == [0, 16, 32, 48]
    assert bool((torch.stack(refill.sampled) >= torch.stack(plain.sampled)).all())
    for before, after in itertools.pairwise(refill.sampled):
        assert bool(((after - before) % 16 == 0).all())


def test_accuracy_at_equal_samples_is_read_between_the_steps():
    traces = dynamic_sampling.Traces(
        [], [torch.tensor([0.0]), torch.tensor([1.0])], [torch.tensor([0.0]), torch.tensor([100.0])]
    )
    found = dynamic_sampling.at_equal_samples(traces, 50.0, points=3)
    np.testing.assert_allclose(found, [[0.0, 0.25, 0.5]])


@pytest.mark.parametrize("arm", gvm_online.ARMS)
def test_budgets_are_compared_at_equal_samples(arm):
    setting = gvm_online.Setting(prompts=6, steps=6)
    drawn, accuracy = gvm_online.learn(setting, arm, 0)
    assert drawn == [0, 144, 288] and len(accuracy) == 3  # 6 prompts x 8 samples x 3 steps
    assert accuracy[-1] > accuracy[0]
    starts = {gvm_online.learn(setting, other, 0)[1][0] for other in gvm_online.ARMS}
    assert len(starts) == 1
