"""Every recipe loads, is valid as it stands, and trains two steps once it is made small."""

import json
from pathlib import Path

import pytest

from pyrl.tasks import get_task
from pyrl.trainer.config import Config
from pyrl.trainer.loop import train
from pyrl.trainer.recipe import load, tomllib

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
#: Completions and tokens of the published settings, brought down to what a tiny model does at once.
SMALL = {
    "rollout": {"prompts_per_step": 4, "n": 4, "max_new_tokens": 8},
    "budget": {"pilot_samples": 2, "steps": 2, "accept": 0.3},
    "reward": {"overlong_buffer": 3, "cosine_on": 1, "cosine_off": 1},
    "train": {"steps": 2, "updates_per_step": 2, "tokens_per_row": 256, "threads": 1},
    "eval": {"prompts": 5, "samples": 2, "every": 1},
    "tracking": {"samples_per_step": 1},
}


def name(path):
    return str(path.relative_to(ROOT / "recipes"))


def shrink(tree, model):
    """The recipe on a tiny model and task, every size it names brought down."""
    tree["model"] = {"name": model, "dtype": "float32"}
    letters = {"options": {"target": "abcdefghijklm nopqrst"}}
    if "mix" in tree["task"]:
        tree["task"]["mix"] = {
            domain: {"task": "letters", "weight": part.get("weight", 1.0)} | letters
            for domain, part in tree["task"]["mix"].items()
        }
    else:
        tree["task"] = {"name": "letters"} | letters
    for section, values in SMALL.items():
        own = tree.setdefault(section, {})
        always = section in ("rollout", "train", "eval", "tracking")
        own.update({k: v for k, v in values.items() if always or k in own})
    tree["train"]["save_model"] = False
    for i, stage in enumerate(tree.get("stages", [])):
        stage["steps"] = 1
        if "max_new_tokens" in stage.get("rollout", {}):
            stage["rollout"]["max_new_tokens"] = 8 + i
    return tree


#: Rows with the fields of the hub's data sets, which tests do without.
ROWS = {
    "AI-MO/NuminaMath-CoT": ("problem", "solution", r"so \boxed{%d}."),
    "agentica-org/DeepScaleR-Preview-Dataset": ("problem", "answer", "%d"),
}


def stand_in(data, folder):
    """A file of rows as a hub data set has them."""
    question, answer, text = ROWS[data]
    rows = [{question: f"{i} + 1 = ?", answer: text % (i + 1)} for i in range(50)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_is_valid_as_published(path, tmp_path):
    config = load(path)
    tasks = config.task.mix or {"": config.task}
    for domain, part in tasks.items():
        options = dict(part.options)
        if options.get("data") in ROWS:
            options["data"] = stand_in(options["data"], tmp_path)
        task = get_task(getattr(part, "task", None) or domain or part.name, **options)
        assert len(task.prompts("train")) and len(task.prompts("heldout"))
    assert load(None, None, **tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_trains_two_steps(path, tiny, tmp_path, console, without_report):
    tree = shrink(tomllib.loads(path.read_text()), tiny)
    summary = train(Config.model_validate(tree), tmp_path / "run", console=console)
    assert summary["steps"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["updates"] > 0 and row["grad_norm"] > 0, row
        assert row["loss"] is not None and row["nan_rewards"] == 0
    assert summary["samples"] == sum(row["samples"] for row in rows)
