import math

import pytest
import torch

from pyrl.algorithms import Attempt, Group, advantages, assign_advantages, minibatches
from pyrl.ops.spec import LossSpec


def attempt(reward, length=3, finish="stop", **more):
    return Attempt([5] * length, [-1.0] * length, finish, "text", reward, **more)


def group(*attempts, prompt=4):
    return Group("id", "text", [7] * prompt, list(attempts))


def rewards(*values):
    return group(*[attempt(v) for v in values])


@pytest.mark.parametrize(
    ("values", "flat"),
    [((1, 1), True), ((0, 1), False), ((1,), False), ((1, math.nan), True),
     ((math.nan, math.nan), True), ((0, 1, math.nan), False)],
)  # fmt: skip
def test_zero_variance(values, flat):
    assert rewards(*values).zero_variance is flat


def test_advantages_leave_lost_samples_out():
    groups = [rewards(0.0, 1.0, math.nan), rewards(1.0, 1.0)]
    metrics = assign_advantages(groups)
    values = [[a.advantage for a in g.attempts] for g in groups]
    # Mean 1/2 and unbiased standard deviation sqrt(1/2) of the two that count.
    assert values[0][:2] == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-5)
    assert values[0][2] == 0 and not groups[0].attempts[2].keep
    assert values[1] == [0, 0] and all(a.keep for a in groups[1].attempts)
    assert metrics["nan_rewards"] == 1 and metrics["groups"] == 2


def test_rewards_are_put_where_the_backend_serves(monkeypatch):
    """A backend that serves only a GPU must not be handed CPU tensors."""
    real, seen = advantages.group_advantage, []

    def on_cpu(rewards, ids, **options):
        seen.append((rewards.device.type, ids.device.type, options["backend"]))
        return real(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))

    monkeypatch.setattr(advantages, "group_advantage", on_cpu)
    assign_advantages([rewards(0.0, 1.0)], device="meta", backend="triton")
    assert seen == [("meta", "meta", "triton")]


def test_a_reward_beyond_fp32_is_lost_also_after_mapping():
    groups = [rewards(0.0, 1.0, 3e38, 1e39)]
    metrics = assign_advantages(groups, reward_map="signed")
    assert metrics["nan_rewards"] == 2
    assert [a.keep for a in groups[0].attempts] == [True, True, False, False]
    assert all(math.isfinite(a.advantage) for a in groups[0].attempts)


def test_signed_rewards_change_what_the_filters_see():
    plain, signed = [rewards(0.0, 0.0)], [rewards(0.0, 0.0)]
    assign_advantages(plain, method="raw", filter=["drop_all_correct"], filter_mode="drop")
    assign_advantages(signed, method="raw", reward_map="signed")
    assert [a.advantage for a in plain[0].attempts] == [0, 0]
    assert [a.advantage for a in signed[0].attempts] == [-1, -1]


GRPO, DAPO, DR = (LossSpec.preset(n, max_length=8) for n in ("grpo", "dapo", "dr_grpo"))


@pytest.mark.parametrize(("spec", "denominator"), [(GRPO, 4), (DAPO, 3 + 5 + 2 + 4), (DR, 4)])
def test_zero_advantages_are_skipped_but_counted(spec, denominator):
    batch = [
        group(attempt(0, 3, advantage=0.0), attempt(1, 5, advantage=1.0)),
        group(attempt(0, 2, advantage=-1.0), attempt(0, 4, advantage=0.0)),
    ]
    (one,) = minibatches(batch, spec)
    assert [s.advantage for s in one.samples] == [1.0, -1.0]
    assert one.denominator == denominator
    assert one.skipped_tokens == 2 * 4 + 3 + 4


@pytest.mark.parametrize("extra", [{"kl_coef": 0.1}, {"entropy_coef": 0.1}])
def test_nothing_is_skipped_when_every_token_has_a_gradient(extra):
    batch = [group(attempt(1), attempt(1))]
    (one,) = minibatches(batch, LossSpec.preset("grpo", **extra))
    assert len(one.samples) == 2 and one.skipped_tokens == 0


def test_masked_and_lost_completions_count_nowhere():
    batch = [
        group(
            attempt(1, 3, advantage=1.0),
            attempt(1, 5, "length", advantage=1.0),
            attempt(math.nan, 7, keep=False),
        )
    ]
    (all_in,) = minibatches(batch, DAPO)
    assert all_in.denominator == 8 and len(all_in.samples) == 2
    (masked,) = minibatches(batch, DAPO, mask_truncated=True)
    assert masked.denominator == 3 and len(masked.samples) == 1
    (by_sequence,) = minibatches(batch, GRPO, mask_truncated=True)
    assert by_sequence.denominator == 1


def test_nothing_left_has_denominator_one():
    (one,) = minibatches([group(attempt(1, 3, "length"))], DAPO, mask_truncated=True)
    assert one.samples == [] and one.denominator == 1


def test_minibatches_share_out_everything_once():
    batch = [group(*[attempt(1, advantage=10.0 * g + i) for i in range(5)]) for g in range(1, 4)]
    order = [2, 0, 1]
    parts = minibatches(batch, GRPO, parts=4, order=order)
    assert sorted(len(p.samples) for p in parts) == [3, 4, 4, 4]
    everything = [s.advantage for p in parts for s in p.samples]
    assert everything == [a.advantage for i in order for a in batch[i].attempts]
    assert sum(p.denominator for p in parts) == 15


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_whole_groups_stay_together(parts):
    sizes = [3, 1, 4, 2, 5]
    batch = [group(*[attempt(1, advantage=g + 1.0) for _ in range(n)]) for g, n in enumerate(sizes)]
    order = [4, 0, 2, 1, 3]
    minis = minibatches(batch, GRPO, parts=parts, order=order, whole_groups=True)
    assert len(minis) == parts
    found = [{s.advantage for s in mini.samples} for mini in minis]
    assert sum(map(len, found)) == len(sizes)  # no group is in two parts
    everything = [s.advantage for mini in minis for s in mini.samples]
    assert everything == [g + 1.0 for g in order for _ in range(sizes[g])]
    assert sum(len(mini.samples) for mini in minis) == 15
    # A group belongs to the part in which its first completion falls.
    edges = [15 * part // parts for part in range(parts + 1)]
    starts = {g: sum(sizes[i] for i in order[:at]) for at, g in enumerate(order)}
    for mini, low, high in zip(minis, edges, edges[1:], strict=False):
        expected = [g for g in order if low <= starts[g] < high]
        assert {int(s.advantage) - 1 for s in mini.samples} == set(expected)
        assert mini.denominator == max(1, sum(sizes[g] for g in expected))


def test_dense_computes_what_has_no_advantage_yet():
    batch = [group(attempt(0, 3), attempt(0, 5), attempt(math.nan, 7, keep=False))]
    (sparse,) = minibatches(batch, DAPO)
    (dense,) = minibatches(batch, DAPO, dense=True)
    assert sparse.samples == [] and len(dense.samples) == 2
    assert sparse.denominator == dense.denominator == 8
    assert dense.skipped_tokens == 4 + 7
