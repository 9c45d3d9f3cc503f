"""Stages, mixtures and reference resets inside the loop."""

import json

import pytest
import torch

from pyrl.tasks import Mixture, get_task
from pyrl.trainer.config import Config
from pyrl.trainer.data import Prompts, PromptStream
from pyrl.trainer.loop import train
from pyrl.trainer.optimizer import MasterAdamW
from pyrl.trainer.recipe import ConfigError, load

pytestmark = pytest.mark.usefixtures("without_report")

#: Keys of metrics.jsonl that tell about a machine, not about the run.
CLOCKS = ("seconds", "tokens_per_second", "peak_rss_mib")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def numbers(folder):
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in metrics(folder)]


def staged(make_config, stages, **overrides):
    tree = make_config(**overrides).model_dump(mode="json", exclude_none=True)
    tree["train"].pop("steps")
    return Config.model_validate(tree | {"stages": stages})


def test_a_stage_changes_what_it_names_and_nothing_else(make_config, tmp_path, console):
    stages = [
        {"steps": 1, "name": "short"},
        {"steps": 1, "rollout": {"n": 2, "max_new_tokens": 3}, "optimizer": {"lr": 0.5}},
        {"steps": 1},
    ]
    config = staged(make_config, stages)
    assert config.train.steps == 3
    train(config, tmp_path / "run", console=console)
    rows = metrics(tmp_path / "run")
    assert [row["samples"] for row in rows] == [16, 8, 16]
    assert [row["samples_total"] for row in rows] == [16, 24, 40]
    assert [row["lr"] for row in rows] == [0.01, 0.5, 0.01]
    assert rows[1]["completion_length_mean"] <= 3 < rows[2]["completion_length_mean"]
    assert "stage short: steps 1 to 1" in console.messages
    assert load(tmp_path / "run/config.toml") == config


def test_the_last_stage_goes_on_to_the_end_of_the_run(make_config):
    config = staged(make_config, [{"steps": 1}, {"steps": 1, "rollout": {"n": 2}}])
    assert [config.at(step).rollout.n for step in (1, 2, 9)] == [4, 2, 2]
    assert [config.begins_stage(step) is not None for step in (1, 2, 3)] == [True, True, False]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"steps": 1, "rollout": {"n": 0}}, r"stages\[1\]: rollout.n = 0"),
        ({"steps": 1, "rollout": {"nn": 2}}, "rollout.nn: a stage may change prompts_per_step, n"),
        ({"steps": 1, "model": {"name": "x"}}, "model"),
        ({"steps": 1, "optimizer": {"betas": [0.1, 0.2]}}, "optimizer.betas: a stage may change"),
        ({"steps": 0}, "stages.1.steps = 0"),
        ({"rollout": {"n": 2}}, "stages.1.steps"),
        ({"steps": 1, "loss": {"clip_low": 2}}, r"stages\[1\]: .*clip_low=2"),
        ({"steps": 1, "reward": {"overlong_buffer": 99999}}, "overlong_buffer"),
        ({"steps": 1, "task": {"mix": {"x": {"weight": 1}}}}, r"stages\[1\]: task.mix.x: a stage"),
        ({"steps": 1, "optimizer": {"warmup_steps": 2}}, "optimizer.warmup_steps: a stage may"),
        ({"steps": 1, "loss": {"preset": "raft++"}}, "goes with advantage.method = 'positive'"),
        (
            {"steps": 1, "loss": {"clip_hig": 1}},
            "loss.clip_hig = 1: unknown key; known here: .*clip",
        ),
        ({"steps": 1, "step": 2}, "unknown key 'stages.1.step' .did you mean 'steps'"),
    ],
)
def test_a_stage_that_cannot_be_is_named(stage, message):
    with pytest.raises(ConfigError, match=message):
        load(None, None, stages=[{"steps": 1}, stage], task={"name": "letters"})


def test_a_stage_may_begin_with_a_reset(make_config, tmp_path, console):
    stages = [{"steps": 3}, {"steps": 2, "reset": True}]
    config = staged(make_config, stages, loss__kl_coef=0.1)
    train(config, tmp_path / "run", console=console)
    rows = metrics(tmp_path / "run")
    assert rows[0]["kl"] == 0 and rows[1]["kl"] > 0 and rows[2]["kl"] > rows[1]["kl"]
    assert rows[3]["kl"] == 0 and rows[4]["kl"] > 0
    assert [row["reference_age"] for row in rows] == [0, 1, 2, 0, 1]
    assert [row["reference_resets"] for row in rows] == [0, 0, 0, 1, 1]
    assert any("reference and optimizer reset" in text for text in console.messages)


@pytest.mark.parametrize("adapters", [{}, {"model__lora_rank": 4}], ids=["full", "lora"])
def test_resets_by_time_leave_a_kl_of_0_and_survive_resumption(
    make_config, tmp_path, console, adapters
):
    if adapters:
        pytest.importorskip("peft")
    settings = {
        "loss__kl_coef": 0.1, "reset__every": 2, "train__steps": 6, "train__checkpoint_every": 3,
        "advantage__method": "raw", **adapters,
    }  # fmt: skip
    whole = tmp_path / "whole"
    train(make_config(**settings), whole, console=console)
    rows = metrics(whole)
    assert [row["reference_age"] for row in rows] == [0, 1, 0, 1, 0, 1]
    assert [row["kl"] == 0 for row in rows] == [True, False] * 3
    broken = tmp_path / "broken"
    train(make_config(**settings | {"train__steps": 3}), broken, console=console)
    train(make_config(**settings), broken, resume=True, console=console)
    assert numbers(broken) == numbers(whole)


def test_a_stage_changes_the_weight_of_a_domain_and_nothing_else_of_it():
    mix = {"a": {"task": "letters"}, "b": {"task": "letters"}}
    good = {"steps": 1, "task": {"mix": {"b": {"weight": 0}}}}
    config = load(None, None, task={"mix": mix}, stages=[{"steps": 1}, good])
    assert [config.at(step).task.mix["b"].weight for step in (1, 2)] == [1, 0]
    for change in ({"scale": 3}, {"options": {"target": "x"}}, {"task": "instructions"}):
        bad = {"steps": 1, "task": {"mix": {"b": change}}}
        with pytest.raises(ConfigError, match=r"task.mix.b: a stage may change the weight of"):
            load(None, None, task={"mix": mix}, stages=[{"steps": 1}, bad])
    none = {"steps": 1, "task": {"mix": {"a": {"weight": 0}, "b": {"weight": 0}}}}
    with pytest.raises(ConfigError, match=r"stages\[0\]: .*every weight is 0"):
        load(None, None, task={"mix": mix}, stages=[none])


def test_a_stage_clips_gradients_by_its_own_norm(make_config, tmp_path, console, monkeypatch):
    seen, step = [], MasterAdamW.step

    def recorded(self, lr):
        seen.append(self.max_grad_norm)
        return step(self, lr)

    monkeypatch.setattr(MasterAdamW, "step", recorded)
    stages = [{"steps": 1}, {"steps": 1, "optimizer": {"max_grad_norm": 0.25}}, {"steps": 1}]
    train(staged(make_config, stages), tmp_path / "run", console=console)
    assert seen == [1.0, 0.25, 1.0]


def test_a_reset_of_a_stage_counts_for_those_by_time(make_config, tmp_path, console):
    stages = [{"steps": 2}, {"steps": 5, "reset": True}]
    config = staged(make_config, stages, loss__kl_coef=0.1, reset__every=3)
    train(config, tmp_path / "run", console=console)
    ages = [row["reference_age"] for row in metrics(tmp_path / "run")]
    assert ages == [0, 1, 0, 1, 2, 0, 1]


def test_a_shard_goes_on_over_the_edge_of_a_stage(make_config, tmp_path, console):
    stages = [{"steps": 1}, {"steps": 1, "loss": {"clip_high": 0.3}}, {"steps": 2, "budget": {
        "pilot_samples": 3}}]  # fmt: skip
    budget = {"budget__kind": "gvm", "budget__pilot_samples": 2, "budget__steps": 2,
              "budget__accept": 0.1}  # fmt: skip
    config = staged(make_config, stages, **budget)
    train(config, tmp_path / "run", console=console)
    rows = metrics(tmp_path / "run")
    assert [row["budget_pilot_samples"] for row in rows] == [16, 0, 24, 0]
    assert rows[-1]["samples_total"] == 64 and config.stretches() == [(1, 2), (3, 2)]


def test_stages_ahead_may_change_when_a_run_goes_on(make_config, tmp_path, console):
    first = staged(make_config, [{"steps": 2}, {"steps": 1, "rollout": {"n": 3}}])
    tree = first.model_dump(mode="json", exclude_none=True)
    tree["train"]["steps"] = 2
    train(Config.model_validate(tree), tmp_path / "run", console=console)
    longer = staged(make_config, [{"steps": 2}, {"steps": 1, "rollout": {"n": 2}}, {"steps": 1}])
    train(longer, tmp_path / "run", resume=True, console=console)
    assert [row["samples"] for row in metrics(tmp_path / "run")] == [16, 16, 8, 16]
    other = staged(make_config, [{"steps": 2, "rollout": {"n": 2}}, {"steps": 9}])
    with pytest.raises(ConfigError, match=r"stages.0.rollout.n = None there, 2 here"):
        train(other, tmp_path / "run", resume=True, console=console)


def test_a_stall_of_the_validation_resets(make_config, tmp_path, console):
    config = make_config(
        loss__kl_coef=0.1, optimizer__lr=0.0, train__steps=5, eval__prompts=2, eval__every=1,
        eval__samples=2, reset__patience=2,
    )  # fmt: skip
    train(config, tmp_path / "run", console=console)
    reasons = [text for text in console.messages if "reset," in text]
    assert reasons and "has not improved" in reasons[0]


def test_a_reset_of_the_optimizer_forgets_its_moments(make_config):
    layer = torch.nn.Linear(3, 2)
    fresh, used = (
        MasterAdamW(layer, make_config().optimizer),
        MasterAdamW(layer, make_config().optimizer),
    )
    layer(torch.ones(1, 3)).sum().backward()
    used.step(0.1)
    used.reset()
    layer.zero_grad()
    assert used.state_dict()["adam"]["state"] == fresh.state_dict()["adam"]["state"] == {}
    layer(torch.ones(1, 3)).sum().backward()
    assert used.step(0.1) > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reset.every": "2", "train.reference": "step"}, "is the current policy already"),
        ({"reset.patience": "2"}, "set eval.every"),
        ({"reset.blend": "{a = 1}", "reset.every": "1"}, "reset.blend.a: the domains are"),
        ({"reset.kl_spike": "0.5"}, "reset.kl_spike = 0.5"),
        ({"task.mix": "{letters = {}}", "task.name": "letters"}, "give one"),
        ({"task.mix": "{letters = {weight = 0}}"}, "every weight is 0"),
        ({"task.mix": '{"a b" = {task = "letters"}}'}, "expected a name of letters"),
        ({"task.mix": "{letters = {scale = 0}}"}, "scale = 0"),
        ({"task.name": "mixture"}, "needs the domains"),
        ({"advantage.method": "pairs"}, "iterative DPO"),
        ({"advantage.method": "gae", "advantage.filter": "['drop_zero_std']"}, "has none"),
        ({"budget.kind": "gvm", "rollout.n": "8"}, "leaves nothing of rollout.n = 8"),
        ({"budget.kind": "online", "rollout.refill_rounds": "1"}, "would replace them"),
        ({"budget.beta": "1.5"}, "budget.beta = 1.5"),
        ({"reward.overlong_buffer": "65"}, "overlong_buffer = 65"),
        ({"reward.cosine_low": "1"}, "reward.cosine_low"),
        ({"reward.cosine_low": "1", "advantage.method": "correct"}, "cosine_low"),
        ({"reward.overlong_buffer": "6", "advantage.method": "correct"}, "would not see its terms"),
        ({"critic.lr": "1e-4"}, "critic.lr = 0.0001 does nothing without advantage.method"),
        ({"preference.beta": "1"}, "preference.beta = 1.0 does nothing without"),
        ({"budget.group_size": "4"}, "budget.group_size = 4 does nothing without"),
        ({"budget.kind": "online", "budget.group_size": "1"}, "compares the completions"),
        ({"advantage.method": "gae", "advantage.eps": "1"}, "advantage.eps"),
        ({"task.mix": "{mean = {task = 'letters'}}"}, "a metric has that name"),
        ({"task.mix": "x"}, "expected a TOML table"),
    ],
)
def test_settings_that_cannot_be_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        load(None, values)


def test_a_mixture_draws_by_weight_and_scores_by_domain(make_config, tmp_path, console):
    mix = (
        "{ab = {task='letters', options={target='ab'}, weight=3}, "
        "rest = {task='letters', scale=2.0}}"
    )
    tree = {"task.mix": mix}
    base = make_config().model_dump(mode="json", exclude_none=True, exclude={"task"})
    config = load(None, tree, **base | {"train": {**base["train"], "steps": 4}})
    train(config, tmp_path / "run", console=console)
    rows = metrics(tmp_path / "run")
    for row in rows:  # 4 prompts: 3 of one domain, 1 of the other, in every step to within one
        assert row["groups"] == 4 and "reward_ab" in row
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").open()]
    drawn = [s["prompt_id"].split("/")[0] for s in samples if s["phase"] == "train"]
    assert drawn.count("ab") == 12 and drawn.count("rest") == 4


def test_places_go_on_in_every_domain_and_weights_may_change(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    task = Mixture({"a": get_task("letters", train=5), "b": get_task("letters", train=3)})
    streams = {d: PromptStream(task.domain(d, "train"), tokenizer, 50, 0, d) for d in "ab"}
    prompts, drawn = Prompts(streams, seed=1), {}
    first = prompts.take(drawn, 10, {"a": 1.0, "b": 1.0})
    assert sorted(p for d, p in first if d == "a") == list(range(drawn["a"]))
    assert abs(drawn["a"] - drawn["b"]) <= 2
    before = dict(drawn)
    later = prompts.take(drawn, 6, {"a": 0.0, "b": 1.0})
    assert [d for d, _ in later] == ["b"] * 6 and drawn["a"] == before["a"]
    again = dict(before)
    assert prompts.take(again, 6, {"a": 0.0, "b": 1.0}) == later
    assert prompts.at(("b", 0)).prompt.domain == "b"
    assert prompts.key(("b", 0)) in {prompts.key(("b", p)) for p in range(3, 6)}
    assert len(prompts) == 8


def test_a_mixture_is_its_tasks():
    task = Mixture(
        {"a": get_task("letters", target="a"), "b": get_task("letters", target="b")}, {"b": 2.0}
    )
    prompt = {p.domain: p for p in task.prompts("heldout")}
    assert task.trusted and task.score(prompt["a"], "aab") == pytest.approx(2 / 3)
    assert task.score(prompt["b"], "aab") == pytest.approx(2 / 3)
    assert prompt["a"].id.startswith("a/") and len(task.prompts("train")) == 128
    with pytest.raises(NotImplementedError, match="domain 'a'"):
        task.answer(prompt["a"], "x")
    with pytest.raises(ValueError, match=r"scales\['c'\]"):
        Mixture({"a": get_task("letters")}, {"c": 1.0})
    with pytest.raises(ValueError, match=r"scales\['a'\] = 0"):
        Mixture({"a": get_task("letters")}, {"a": 0.0})
