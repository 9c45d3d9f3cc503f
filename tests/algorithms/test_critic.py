"""PPO's critic: the wiring of values, GAE and whitening; learning; resuming."""

import copy
import dataclasses
import math

import pytest
import torch

from pyrl import LossSpec, pack
from pyrl.algorithms import Attempt, Critic, CriticCredit, Group, minibatches
from pyrl.algorithms.credit import DivergedError
from pyrl.models import load_policy
from pyrl.testing import tiny_model_folder
from pyrl.trainer.config import OptimizerConfig
from pyrl.trainer.optimizer import MasterAdamW

SPEC = LossSpec.preset("ppo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


def build(folder, head=0.0, dtype=torch.float32, **options):
    critic = Critic(load_policy(folder, dtype=dtype, check=False))
    with torch.no_grad():
        draw = torch.Generator().manual_seed(5)
        critic.weight.copy_(torch.randn(critic.weight.shape, generator=draw) * head)
    optimizer = MasterAdamW(critic, OptimizerConfig(lr=1e-2, weight_decay=0.0))
    return CriticCredit(critic, optimizer, **{"lr": 1e-2, **options})


def groups_of(rewards, prompt=6):
    """A group a list; completions of lengths 2, 3, 4, ..."""
    lengths = iter(range(2, 100))
    draw = torch.Generator().manual_seed(1)

    def attempt(reward):
        size = next(lengths)
        tokens = torch.randint(3, 300, (size,), generator=draw).tolist()
        return Attempt(tokens, [-1.0] * size, "stop", "", reward, bonus=0.25 * (reward == 1.0))

    prompts = torch.randint(3, 300, (len(rewards), prompt), generator=draw).tolist()
    return [
        Group(str(g), "", prompts[g], [attempt(r) for r in values])
        for g, values in enumerate(rewards)
    ]


REWARDS = [[0.0, 1.0, 0.5], [1.0, math.nan, 0.0], [0.25, 0.0]]


def parts_of(credit, groups, parts=2, capacity=24, **options):
    assert credit.assign(groups) == {}
    minis = minibatches(groups, SPEC, parts=parts, dense=credit.dense)
    rows = [list(pack(mini.samples, capacity, aligned=False, **options)) for mini in minis]
    return minis, rows


def by_sample(minis, rows, values):
    """One list for each sample of each minibatch, in sample order, from one [R] for each row."""
    found = []
    for mini, part, given in zip(minis, rows, values, strict=True):
        samples = {}
        for row, value in zip(part, given, strict=True):
            ids = sorted(row.sequence_ids.tolist())
            samples |= dict(zip(ids, row.unpack(value, fill=None), strict=True))
        assert sorted(samples) == list(range(len(mini.samples)))
        found += [samples[i].double() for i in range(len(mini.samples))]
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8)])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_advantages_are_gae_of_the_totals(folder, gamma, lam, whiten, share):
    credit = build(folder, head=0.3, gamma=gamma, lam=lam, whiten=whiten)
    groups = groups_of(REWARDS)
    minis, rows = parts_of(credit, groups, share_prefix=share)
    kept = [a for g in groups for a in g.attempts if not math.isnan(a.reward)]
    assert sum(len(m.samples) for m in minis) == len(kept) == 7  # a total of 0 is computed too
    assert len(rows) == 2 and len(rows[1]) > 1
    if share:
        assert any(row.num_tokens < row.sample_tokens for part in rows for row in part)
    new = credit.begin(rows)
    with torch.no_grad():
        values = [[credit.critic.values(row) for row in part] for part in rows]
    found = by_sample(minis, new, [[row.advantages for row in part] for part in new])
    expected = []
    for attempt, v in zip(kept, by_sample(minis, rows, values), strict=True):
        after, carried, out = 0.0, 0.0, []
        for t in reversed(range(len(v))):
            reward = attempt.total() if t == len(v) - 1 else 0.0
            carried = reward + gamma * after - float(v[t]) + gamma * lam * carried
            after = float(v[t])
            out.append(carried)
        expected.append(torch.tensor(out[::-1], dtype=torch.float64))
    if whiten:
        every = torch.cat(expected)
        expected = [(e - every.mean()) / (every.std() + 1e-8) for e in expected]
    for one, other in zip(found, expected, strict=True):
        # values and advantages are fp32, of size 1 and summed over at most 9 tokens
        torch.testing.assert_close(one, other, atol=3e-6, rtol=0)
    for part, before in zip(new, rows, strict=True):
        for row, old in zip(part, before, strict=True):
            assert row.advantages.dtype == torch.float32 and row.tokens is old.tokens
            assert not row.advantages[~row.loss_mask].any()


def test_masked_tokens_have_no_part(folder):
    """The reward falls on the last kept token, and what comes after it does not matter."""
    credit = build(folder, whiten=False)
    groups = groups_of([[1.0]])
    credit.assign(groups)
    (mini,) = minibatches(groups, SPEC, dense=True)
    (sample,) = mini.samples
    sample = dataclasses.replace(
        sample, completion=[5, 6, 7, 8], rollout_logprob=None, mask=[True, True, False, False]
    )
    for aligned in (False, True):
        ((row,),) = credit.begin([[pack([sample], 40, aligned=aligned).row(0)]])
        (advantages,) = row.unpack(row.advantages, fill=None)
        assert advantages.tolist() == [1.25, 1.25, 0, 0]  # V = 0


def test_equal_advantages_whiten_to_zero_and_nothing_to_nothing(folder):
    credit = build(folder)
    _, rows = parts_of(credit, groups_of([[0.7, 0.7], [0.7]]))
    for part in credit.begin(rows):
        assert all(not row.advantages.any() for row in part)
    assert math.isnan(credit.metrics()["explained_variance"])  # equal returns
    assert credit.begin([[], []]) == [[], []]
    credit.learn([])
    assert all(math.isnan(v) for v in credit.metrics().values())


class Spy:
    """Holds the gradient still."""

    def __init__(self, critic):
        self.critic, self.seen, self.lrs = critic, [], []

    def step(self, lr):
        self.seen.append({n: p.grad.clone() for n, p in self.critic.named_parameters()})
        self.lrs.append(lr)
        self.critic.zero_grad()
        return 2.0

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("clip", [None, 0.2])
def test_learning_descends_the_clipped_error(folder, clip):
    """Gradient of the mean over the minibatch's tokens, of all rows together; V has moved."""
    credit = build(folder, head=0.3, value_clip=clip)
    spy = credit.optimizer = Spy(credit.critic)
    minis, rows = parts_of(credit, groups_of(REWARDS))
    new = credit.begin(rows)
    with torch.no_grad():
        old = [credit.critic.values(row) for row in rows[1]]
        credit.critic.bias += 0.5  # farther than the clip allows
    credit.learn(new[1], lr_scale=0.5)
    assert spy.lrs == [0.005]
    losses, clipped, tokens = [], 0, 0
    for row, before in zip(rows[1], old, strict=True):
        returns = row.advantages[row.loss_mask]  # gamma = lam = 1: the total
        v, v0 = credit.critic.values(row)[row.loss_mask], before[row.loss_mask]
        square = (v - returns).square()
        if clip:
            other = (torch.clamp(v, v0 - clip, v0 + clip) - returns).square()
            clipped += int((other > square).sum())
            square = torch.maximum(square, other)
        losses.append(0.5 * square.sum())
        tokens += len(v)
    loss = sum(losses) / tokens
    assert tokens == minis[1].denominator
    loss.backward()
    for name, p in credit.critic.named_parameters():
        torch.testing.assert_close(spy.seen[0][name], p.grad, atol=1e-5, rtol=1e-4, msg=name)
    metrics = credit.metrics()
    assert metrics["value_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["value_clip_share"] == clipped / tokens and (clipped > 0) is bool(clip)
    assert metrics["critic_grad_norm"] == 2.0
    with pytest.raises(ValueError, match="row 0 is not one of those that `begin` returned"):
        credit.learn(rows[0])


def test_explained_variance_is_of_the_values_before(folder):
    credit = build(folder, head=0.3)
    _, rows = parts_of(credit, groups_of(REWARDS))
    credit.begin(rows)
    flat = [row for part in rows for row in part]
    with torch.no_grad():
        v = torch.cat([credit.critic.values(row)[row.loss_mask] for row in flat]).double()
    r = torch.cat([row.advantages[row.loss_mask] for row in flat]).double()
    expected = float(1 - (r - v).var() / r.var())
    assert credit.metrics()["explained_variance"] == pytest.approx(expected, rel=1e-5)


def test_it_learns_a_constant_reward_and_touches_no_policy(folder):
    policy = load_policy(folder, check=False)
    before = copy.deepcopy(policy.model.state_dict())
    credit = build(folder)
    first = None
    for _ in range(40):
        _, rows = parts_of(credit, groups_of([[0.7, 0.7], [0.7]]), parts=1)
        for part in credit.begin(rows):
            credit.learn(credit.reweigh(part, [], lambda row: row.target))
        loss = credit.metrics()["value_loss"]
        first = loss if first is None else first
    assert first == pytest.approx(0.5 * 0.7**2, rel=1e-5)
    with torch.no_grad():
        values = torch.cat([credit.critic.values(row)[row.loss_mask] for row in rows[0]])
    assert float((values - 0.7).abs().max()) < 0.05 and loss < 1e-3
    assert all(v.equal(before[n]) for n, v in policy.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_equal(folder, dtype):
    def step(credit):
        _, rows = parts_of(credit, groups_of(REWARDS))
        new = credit.begin(rows)
        for part in new:
            credit.learn(part)
        return [row.advantages for part in new for row in part], credit.metrics()

    credit, fresh = build(folder, dtype=dtype), build(folder, dtype=dtype)
    for _ in range(2):
        step(credit)
    fresh.load_state_dict(copy.deepcopy(credit.state_dict()))
    for _ in range(2):
        (a, metrics), (b, again) = step(credit), step(fresh)
        assert all(x.equal(y) for x, y in zip(a, b, strict=True)) and metrics == again
    ours, theirs = credit.critic.state_dict(), fresh.critic.state_dict()
    assert all(v.equal(theirs[n]) for n, v in ours.items())


def test_the_unused_head_is_not_trained(folder):
    credit = build(folder, dtype=torch.bfloat16)
    names = credit.state_dict()["masters"].keys()
    assert {"weight", "bias"} < names and not any("lm_head" in name for name in names)
    critic = credit.critic
    assert critic.weight.dtype == critic.bias.dtype == torch.float32
    _, rows = parts_of(credit, groups_of(REWARDS))
    assert critic.values(rows[0][0]).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.1}, "gamma=1.1"),
        ({"lam": -0.1}, "lam=-0.1"),
        ({"value_clip": 0.0}, "value_clip=0.0"),
        ({"lr": math.nan}, "lr=nan"),
    ],
)
def test_options_are_checked(folder, options, message):
    with pytest.raises(ValueError, match=message):
        build(folder, **options)


def test_values_that_are_not_finite_are_named(folder):
    credit = build(folder)
    with torch.no_grad():
        credit.critic.bias.fill_(math.inf)
    _, rows = parts_of(credit, groups_of([[1.0, 0.0]]))
    with pytest.raises(DivergedError, match=r"lower critic\.lr"):
        credit.begin(rows)
