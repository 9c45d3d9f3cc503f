"""Critic, pairs, budgets, reward terms and dynamic sampling inside the loop."""

import json

import pytest

from pyrl.trainer.loop import train
from pyrl.trainer.recipe import load

pytestmark = pytest.mark.usefixtures("without_report")

CLOCKS = ("seconds", "tokens_per_second", "peak_rss_mib")
ALGORITHMS = {
    "ppo": {"loss__preset": "ppo", "train__updates_per_step": 2, "critic__lr": 1e-3},
    "dpo": {
        "loss__preset": "reinforce", "loss__aggregation": "sequence_sum",
        "advantage__method": "pairs", "train__updates_per_step": 2,
    },
    "gvm": {
        "budget__kind": "gvm", "budget__pilot_samples": 2, "budget__steps": 2,
        "budget__accept": 0.2, "task__options": "{train = 10}",
    },
    "online": {"budget__kind": "online", "budget__accept": 0.2, "task__options": "{train = 6}"},
    "dapo": {
        "loss__preset": "dapo", "rollout__refill_rounds": 2, "reward__overlong_buffer": 3,
        "train__updates_per_step": 2,
    },
}  # fmt: skip


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def numbers(folder):
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in metrics(folder)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resumed_run_is_the_run(make_config, tmp_path, console, name):
    """Broken off after step 3: for gvm in the middle of a shard."""
    settings = ALGORITHMS[name] | {"train__checkpoint_every": 3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(make_config(**settings, train__steps=5), whole, console=console)
    train(make_config(**settings, train__steps=3), broken, console=console)
    train(make_config(**settings, train__steps=5), broken, resume=True, console=console)
    assert numbers(broken) == numbers(whole)


@pytest.mark.parametrize("name", ["ppo", "dpo"])
def test_packing_changes_no_number(make_config, tmp_path, console, name):
    found = {}
    for packing in ("shared", "off"):
        config = make_config(**ALGORITHMS[name], train__packing=packing)
        train(config, tmp_path / packing, console=console)
        found[packing] = metrics(tmp_path / packing)
    keys = ("grad_norm", "reward_mean", "value_loss", "preference_loss", "preference_margin")
    for shared, off in zip(found["shared"], found["off"], strict=True):
        for key in keys:
            if shared.get(key) is not None:
                # fp32 sums in another order, through four updates at a rate of .01
                assert off[key] == pytest.approx(shared[key], rel=2e-4), key


def test_a_critic_learns_values(make_config, tmp_path, console):
    settings = ALGORITHMS["ppo"] | {"optimizer__lr": 0.0, "critic__lr": 0.02, "train__steps": 12}
    config = make_config(**settings, optimizer__warmup_steps=0, critic__value_clip=0)
    train(config, tmp_path / "run", console=console)
    rows = metrics(tmp_path / "run")
    # An lr of 0 keeps the policy, so that the critic's task stays the same.
    assert all(row["critic_grad_norm"] > 0 for row in rows)
    assert sum(r["value_loss"] for r in rows[-3:]) < 0.8 * sum(r["value_loss"] for r in rows[:3])


def test_pairs_are_learned(make_config, tmp_path, console):
    config = make_config(**ALGORITHMS["dpo"], train__steps=8, preference__beta=0.5)
    train(config, tmp_path / "run", console=console)
    rows = metrics(tmp_path / "run")
    assert rows[0]["preference_loss"] == pytest.approx(0.6931, abs=0.05)
    assert rows[-1]["preference_margin"] > rows[0]["preference_margin"]
    assert rows[-1]["reward_mean"] > rows[0]["reward_mean"]
    assert all(row["signal_share"] <= 0.5 and row["pairs"] for row in rows)  # 2 of each 4


def test_gvm_spends_what_uniform_spends_with_as_many_updates(make_config, tmp_path, console):
    settings = {"train__steps": 4, "train__updates_per_step": 2}
    for name, more in (("gvm", ALGORITHMS["gvm"]), ("uniform", {"budget__kind": "uniform"})):
        train(make_config(**settings | more), tmp_path / name, console=console)
    gvm, uniform = metrics(tmp_path / "gvm"), metrics(tmp_path / "uniform")
    assert gvm[-1]["samples_total"] == uniform[-1]["samples_total"] == 64
    assert [row["updates"] for row in gvm] == [row["updates"] for row in uniform] == [2] * 4
    assert [row["budget_pilot_samples"] for row in gvm] == [16, 0, 16, 0]
    assert gvm[0]["samples"] - 16 == pytest.approx(gvm[1]["samples"], abs=gvm[0]["budget_max"])
    assert gvm[0]["seconds_pilot"] > 0 and uniform[0]["seconds_pilot"] == 0


def test_a_budget_without_a_pilot_shifts_samples_once_prompts_are_known(
    make_config, tmp_path, console
):
    settings = ALGORITHMS["online"] | {"rollout__prompts_per_step": 6, "train__steps": 3}
    train(make_config(**settings), tmp_path / "run", console=console)
    rows = metrics(tmp_path / "run")
    assert [row["samples"] for row in rows] == [24] * 3
    assert rows[0]["budget_max"] == 4 < max(row["budget_max"] for row in rows[1:])


def test_reward_terms_change_advantages_and_not_the_reported_reward(make_config, tmp_path, console):
    stops = {"rollout__stop_token_ids": list(range(3, 90)), "train__steps": 1}
    for name, more in (("plain", {}), ("terms", {"reward__nontermination_penalty": 0.5})):
        train(make_config(**stops | more), tmp_path / name, console=console)
    (plain,), (terms,) = metrics(tmp_path / "plain"), metrics(tmp_path / "terms")
    assert plain["reward_mean"] == terms["reward_mean"]
    assert 0 < terms["truncated_share"] < 1
    assert terms["bonus_mean"] == pytest.approx(-0.5 * terms["truncated_share"])
    assert plain["grad_norm"] != terms["grad_norm"] and "bonus_mean" not in plain


def test_the_length_term_is_on_and_off_in_turn(make_config, tmp_path, console):
    config = make_config(
        reward__cosine_low=0.5,
        reward__cosine_high=1.0,
        reward__cosine_on=1,
        reward__cosine_off=2,
        train__steps=4,
    )
    train(config, tmp_path / "run", console=console)
    assert [row["cosine_mean"] > 0 for row in metrics(tmp_path / "run")] == [
        True, False, False, True,
    ]  # fmt: skip


def test_a_critic_learns_from_mapped_rewards(make_config, tmp_path, console):
    """Values of signed rewards lie twice as far apart, around 0."""
    found = {}
    for name in ("identity", "signed"):
        settings = ALGORITHMS["ppo"] | {"advantage__reward_map": name, "train__steps": 1}
        train(make_config(**settings), tmp_path / name, console=console)
        found[name] = metrics(tmp_path / name)[0]
    assert found["identity"]["reward_mean"] == found["signed"]["reward_mean"]
    # V = 0 at first: the loss is the mean of R^2 / 2 of either.
    assert found["identity"]["value_loss"] != found["signed"]["value_loss"]


def test_acceptance_and_success_are_before_the_scale_of_a_domain(make_config, tmp_path, console):
    mix = "{half = {task='letters', scale=0.5}, twice = {task='letters', scale=2.0}}"
    base = make_config().model_dump(mode="json", exclude_none=True, exclude={"task"})
    base["eval"] |= {"prompts": 8, "samples": 4, "success": 0.4}
    base["budget"] = {"kind": "online", "accept": 0.4}
    config = load(None, {"task.mix": mix}, **base)
    train(config, tmp_path / "run", console=console)
    rows = [json.loads(line) for line in (tmp_path / "run/evaluations.jsonl").open()]
    domains = rows[0]["details"]["domains"]
    for name, scale in (("half", 0.5), ("twice", 2.0)):
        assert 0 < domains[name]["pass"]["1"]["mean"] < 1, name
        assert domains[name]["mean"] < scale
