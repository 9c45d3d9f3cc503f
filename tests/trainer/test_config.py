import dataclasses

import pytest

from pyrl.ops.spec import PRESETS, LossSpec
from pyrl.trainer.config import PRESET_METHODS, Config, flags
from pyrl.trainer.recipe import ConfigError, load, parse_value

RECIPE = """
[optimizer]
lr = 2e-5
[loss]
preset = "dapo"
clip_low = 0.1
[task.options]
kinds = ["a", "b"]
"""


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "r.toml"
        path.write_text(text)
        return path

    return write


def test_recipe_then_flags(recipe):
    config = load(recipe(RECIPE), {"optimizer.lr": "3e-6", "task.options.level": "2"})
    assert config.optimizer.lr == 3e-6
    assert config.task.options == {"kinds": ["a", "b"], "level": 2}
    assert config.loss.spec() == LossSpec.preset("dapo", clip_low=0.1)


def test_what_to_toml_writes_loads_as_the_same_config(recipe):
    config = load(recipe(RECIPE), {"eval.temperature": "0.5", "train.backend": "torch"})
    assert load(recipe(config.to_toml())) == config
    assert load(recipe(Config().to_toml())) == Config()


def test_every_value_has_a_description_and_a_flag():
    listed = dict(flags())
    assert {f"loss.{f.name}" for f in dataclasses.fields(LossSpec)} < listed.keys()
    assert not [key for key, field in listed.items() if not field.description]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("3", 3), ("true", True), ("none", None), ("[1, 2]", [1, 2]),
     ("plain text", "plain text"), ('"3"', "3"), ("a/b.py:C", "a/b.py:C")],
)  # fmt: skip
def test_parse_value(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        ("[optimizer]\nlrr = 1", {}, ["r.toml", "'optimizer.lrr'", "did you mean 'lr'", "betas"]),
        ("[optimiser]\nlr = 1", {}, ["r.toml", "'optimiser'", "did you mean 'optimizer'"]),
        ("[loss]\nclip_lo = 1", {}, ["'loss.clip_lo'", "did you mean 'clip_low'"]),
        ("", {"optimizer.lr": "-1"}, ["--optimizer.lr", "optimizer.lr = -1", ">= 0"]),
        ("", {"rollout.top_p": "2"}, ["rollout.top_p = 2", "> 0, <= 1"]),
        ("", {"rollout.n": "0"}, ["rollout.n = 0", "> 0"]),
        ("", {"model.attention": "foo"}, ["model.attention = 'foo'", "'sdpa' or 'eager'"]),
        (
            "",
            {"task.options.mode": "nan"},
            ["--task.options.mode", "mode = nan: expected"],
        ),
        ("", {"task.options.a": "[1, {b = -inf}]"}, ["task.options", "a.1.b = -inf: expected"]),
        ("", {"rollout.options.day": "2020-01-01"}, ["rollout.options", "expected text, a number"]),
        ("", {"model.dtype": "fp8"}, ["model.dtype = 'fp8'", "'bfloat16' or 'float32'"]),
        ("", {"loss.objective": "ppo"}, ["loss.objective = 'ppo'", "'reinforce', 'clip'"]),
        ("", {"loss.clip_low": "3"}, ["--loss.clip_low", "[0, 1]"]),
        ("", {"loss.preset": "grop"}, ["--loss.preset", "'grop'", *sorted(PRESETS)]),
        ("", {"optimizer.betas": "[1.0, 0.9]"}, ["optimizer.betas", "[0, 1)"]),
        ("", {"optimizer.lr": "nan"}, ["optimizer.lr", "finite"]),
        ("", {"train.steps": "many"}, ["train.steps = 'many'", "integer"]),
        ("", {"train.updates_per_step": "65"}, ["train.updates_per_step = 65", "64"]),
        ("", {"advantage.filter": '["drop_all"]'}, ["advantage.filter", "drop_all_wrong"]),
        ("", {"tracking.sinks": '["mlflow"]'}, ["tracking.sinks", "'tensorboard'"]),
        ("optimizer = 3", {}, ["r.toml", "optimizer = 3"]),
        ("", {"optimizer": "3"}, ["--optimizer"]),
        ("[optimizer\n", {}, ["r.toml", "not TOML", "line 1"]),
        ("[train]\nsteps = 1\nsteps = 2", {}, ["not TOML"]),
    ],
)
def test_errors_name_place_key_and_what_is_allowed(recipe, text, overrides, parts):
    with pytest.raises(ConfigError) as error:
        load(recipe(text), overrides)
    for part in parts:
        assert part in str(error.value)


def test_every_wrong_value_is_reported_at_once(recipe):
    with pytest.raises(ConfigError) as error:
        load(recipe("[train]\nsteps = -1\n[eval]\nsamples = 0"))
    assert "train.steps" in str(error.value) and "eval.samples" in str(error.value)


def test_missing_recipe(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such recipe file"):
        load(tmp_path / "nowhere.toml")


def test_warnings():
    def found(**overrides):
        return load(None, {k.replace("__", "."): v for k, v in overrides.items()}).warnings()

    assert any("group of one" in text for text in found(rollout__n="1"))
    assert not any("group of one" in text for text in found())
    assert not any("group of one" in t for t in found(rollout__n="1", advantage__method="raw"))
    assert any("top_p" in text for text in found(rollout__top_p="0.9"))
    assert any("read about 0" in text for text in found())
    assert not any("read about 0" in text for text in found(train__updates_per_step="2"))


def test_identity_ignores_what_changes_no_number():
    base = Config().identity()
    same = {"train.steps": "7", "tracking.sinks": '["wandb"]', "train.checkpoint_every": "3"}
    assert load(None, same).identity() == base
    assert load(None, {"train.seed": "1"}).identity() != base
    cosine = {"optimizer.schedule": "cosine"}
    assert load(None, cosine).identity() != load(None, cosine | {"train.steps": "7"}).identity()


def test_loss_fills_in_what_the_rollout_and_the_head_decide():
    loss = load(None, {"loss.preset": "dr_grpo"}).loss
    assert loss.spec(max_length=64, temperature=0.7).max_length == 64
    assert loss.spec(temperature=0.7).temperature == 0.7
    own = load(None, {"loss.preset": "dr_grpo", "loss.max_length": "9"}).loss
    assert own.spec(max_length=64).max_length == 9


def test_none_unsets_an_option(recipe):
    config = load(recipe(RECIPE), {"task.options.kinds": "none", "rollout.options.workers": "none"})
    assert config.task.options == {} and config.rollout.options == {}
    assert load(recipe(config.to_toml())) == config


@pytest.mark.parametrize(
    ("preset", "method"),
    [("grpo", "grpo"), ("dapo", "grpo"), ("reinforce", "grpo"), ("dr_grpo", "mean"),
     ("raft", "positive"), ("raft++", "positive")],
)  # fmt: skip
def test_a_preset_brings_its_advantages_unless_told_otherwise(recipe, preset, method):
    config = load(None, {"loss.preset": preset})
    assert config.advantage.method == method
    assert f'method = "{method}"' in config.to_toml()
    assert config.identity()["advantage.method"] == method
    assert load(recipe(config.to_toml())) == config
    for own in ("grpo", "raw"):
        told = {"loss.preset": preset, "advantage.method": own, "advantage.eps": "0.1"}
        assert load(None, told).advantage.method == own
    assert load(None, {"loss.preset": preset, "advantage.eps": "0.1"}).advantage.eps == 0.1


def test_every_preset_method_is_an_advantage():
    for method in PRESET_METHODS.values():
        assert load(None, {"advantage.method": method}).advantage.method == method
