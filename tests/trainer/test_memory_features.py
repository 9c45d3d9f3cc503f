"""[model]: lora_*, quantize and offload_activations in a run."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pyrl.models import FrozenCopy, load_policy
from pyrl.trainer import rows as micro_batches
from pyrl.trainer import setup
from pyrl.trainer.config import Config
from pyrl.trainer.loop import train
from pyrl.trainer.recipe import ConfigError, load

pytest.importorskip("peft", reason="peft is an extra")
pytest.importorskip("torchao", reason="torchao is an extra")
pytestmark = pytest.mark.usefixtures("without_report")

LORA = {"model__lora_rank": 4, "optimizer__lr": 0.02}


def state(folder):
    name = (folder / "checkpoints/latest").read_text().strip()
    return torch.load(folder / "checkpoints" / name / "state.pt", weights_only=True)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_adapters(make_config, tmp_path, console, tiny, quantize, dtype):
    config = make_config(
        **LORA, model__quantize=quantize, model__dtype=dtype, train__save_model="true"
    )
    summary = train(config, tmp_path / "run", console=console)
    assert summary["steps"] == 2
    rows = [json.loads(r) for r in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows)
    masters = state(tmp_path / "run")["optimizer"]["masters"]
    assert masters and all(".lora_" in name for name in masters)
    assert any(m.abs().sum() > 0 for name, m in masters.items() if ".lora_B" in name)
    saved = AutoModelForCausalLM.from_pretrained(summary["model_path"])
    start = AutoModelForCausalLM.from_pretrained(tiny, dtype=saved.dtype)
    moved = {n for n, p in saved.named_parameters() if not p.equal(start.get_parameter(n))}
    assert len(moved) == 14 and all("proj" in name for name in moved)
    assert (tmp_path / "run/model/adapter/adapter_model.safetensors").exists()
    assert not load_policy(summary["model_path"]).has_adapters


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_reference_without_a_second_model_is_the_second_model(
    make_config, tmp_path, console, monkeypatch, quantize
):
    """Metrics to the bit, against a frozen copy that is loaded a second time."""
    config = make_config(**LORA, model__quantize=quantize, loss__kl_coef=0.1, train__steps=3)
    train(config, tmp_path / "shared", console=console)
    references = []
    real = setup.prepare

    def prepare(config):
        parts = real(config)
        assert parts.reference is not None and parts.reference.policy.model is parts.policy.model
        copy = setup._load(config, torch.device("cpu"))
        references.append(copy)
        return setup.dataclasses.replace(parts, reference=FrozenCopy(copy))

    monkeypatch.setattr("pyrl.trainer.session.prepare", prepare)
    train(config, tmp_path / "copied", console=console)
    assert references
    shared, copied = (
        [json.loads(r) for r in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("shared", "copied")
    )
    for ours, theirs in zip(shared, copied, strict=True):
        for key in ("loss", "kl", "grad_norm", "reward_mean"):
            assert ours.get(key) == theirs.get(key), key
    assert any("kl" in key and row[key] for row in shared for key in row)


def test_the_engine_is_given_merged_weights(make_config, tmp_path, console, monkeypatch, tiny):
    names = {name for name, _ in AutoModelForCausalLM.from_pretrained(tiny).named_parameters()}
    given = []

    def sync(self, weights, version):
        given.append({name: tensor.clone() for name, tensor in weights})

    monkeypatch.setattr("pyrl.rollout.transformers_engine.TransformersEngine.sync", sync)
    train(make_config(**LORA), tmp_path / "run", console=console)
    assert len(given) == 3 and all(weights.keys() == names for weights in given)
    key = "model.layers.1.mlp.down_proj.weight"
    start = AutoModelForCausalLM.from_pretrained(tiny).get_parameter(key)
    assert given[0][key].equal(start) and not given[1][key].equal(start)


def test_the_frozen_head_costs_no_gradient(make_config, tmp_path, console, monkeypatch):
    seen = []
    real = micro_batches.linear_policy_loss

    def watched(hidden, weight, *args, **kwargs):
        seen.append((hidden.requires_grad, weight.requires_grad))
        return real(hidden, weight, *args, **kwargs)

    monkeypatch.setattr(micro_batches, "linear_policy_loss", watched)
    train(make_config(**LORA, train__steps=1), tmp_path / "run", console=console)
    assert set(seen) == {(True, False)}


REFUSED = {
    "rank": ({"model.lora_rank": "-1"}, r"model\.lora_rank = -1.*>= 0"),
    "alpha": ({"model.lora_alpha": "0"}, r"model\.lora_alpha = 0.*> 0"),
    "quantize": ({"model.quantize": "int8"}, r"quantize = 'int8' .*lora_rank = 0"),
    "int4": ({"model.quantize": "int4"}, r"model\.quantize = 'int4'"),
    "targets": ({"model.lora_targets": "3"}, r"model\.lora_targets = 3"),
    "alpha alone": ({"model.lora_alpha": "64"}, r"lora_alpha = 64\.0 .*lora_rank = 0"),
    "targets alone": (
        {"model.lora_targets": "q_proj"},
        r"lora_targets = \['q_proj'\].*lora_rank = 0",
    ),
    "dropout": ({"model.lora_dropout": "0.1"}, r"unknown key 'model\.lora_dropout'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_with_a_wrong_value(name):
    overrides, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        load(None, overrides)


def test_targets_are_one_name_or_a_list():
    def given(targets):
        return load(None, {"model.lora_targets": targets, "model.lora_rank": "4"})

    assert given("q_proj").model.lora_targets == ["q_proj"]
    several = given("['q_proj', 'v_proj']")
    assert several.model.lora_targets == ["q_proj", "v_proj"]
    assert Config.model_validate(several.model_dump()) == several


def test_what_only_the_model_knows_is_said_at_the_start(make_config, tmp_path, console):
    with pytest.raises(ValueError, match=r"model\.lora_targets: 'query' names no linear layer"):
        train(make_config(**LORA, model__lora_targets="query"), tmp_path / "a", console=console)
    with pytest.raises(ValueError, match=r"model\.offload_activations = true: on a CPU"):
        train(
            make_config(model__offload_activations="true", model__device="cpu"),
            tmp_path / "b",
            console=console,
        )
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
