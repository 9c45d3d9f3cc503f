import io
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

import pyrl.trainer.session
from pyrl.testing import tiny_model_folder
from pyrl.trainer.console import Console
from pyrl.trainer.recipe import load

TOYS = Path(__file__).with_name("toys.py")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def without_report(monkeypatch):
    """Drawing curves takes longer than most runs here."""
    monkeypatch.setattr(pyrl.trainer.session, "write_report", lambda path: path / "report.html")


@pytest.fixture(scope="session")
def make_config(tiny):
    """A Config of a run of two steps with 4 prompts x 4 completions x 6 tokens, plus overrides."""

    def make(**overrides):
        values = {
            "model.name": tiny,
            "model.dtype": "float32",
            "task.name": "letters",
            "rollout.prompts_per_step": "4",
            "rollout.n": "4",
            "rollout.max_new_tokens": "6",
            "optimizer.lr": "0.01",
            "train.steps": "2",
            "train.threads": "1",  # a model this small only loses time to a second one
            "eval.prompts": "0",
            "train.save_model": "false",
        }
        given = {key.replace("__", "."): str(value) for key, value in overrides.items()}
        return load(None, values | given)

    return make


@pytest.fixture
def toy():
    """The name of a task of toys.py."""
    return lambda name: f"{TOYS}:{name}"


class Recorded(Console):
    """A Console that keeps its messages and steps."""

    def __init__(self):
        super().__init__(1, rich_console=RichConsole(file=io.StringIO(), width=200))
        self.messages, self.steps = [], []

    def message(self, text):
        self.messages.append(text)

    def step(self, metrics):
        self.steps.append(dict(metrics))
        super().step(metrics)


@pytest.fixture
def console():
    return Recorded()
