import json

import pytest

from pyrl.cli import main
from pyrl.trainer.config import flags


@pytest.fixture
def recipe(make_config, tmp_path, without_report):
    path = tmp_path / "small.toml"
    path.write_text(make_config(train__steps=1, tracking__folder=tmp_path / "runs").to_toml())
    return path


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_lists_every_value(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert not [key for key, _ in flags() if f"--{key} " not in text]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "eval", "report", "env"))


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--optimizer.lrr", "1"], ["'optimizer.lrr'", "did you mean 'lr'"]),
        (["--optimiser.lr", "1"], ["'--optimiser.lr'", "did you mean --optimizer"]),
        (["--resum"], ["'--resum'", "did you mean --resume"]),
        (["--optimizer.lr", "fast"], ["--optimizer.lr", "optimizer.lr = 'fast'"]),
        (["extra"], ["unexpected argument 'extra'"]),
        (["--task.options.colour", "red"], ["'colour'", "target"]),
    ],
)
def test_bad_input_is_named_and_exits_with_2(recipe, argv, parts, capsys):
    assert main(["train", str(recipe), *argv]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    for part in parts:
        assert part in text


def test_train_resume_and_report(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--train.seed", "3", "--task.options.target", "abc"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("small-")
    text = (run / "config.toml").read_text()
    assert "seed = 3" in text and 'target = "abc"' in text
    # Resuming needs no recipe: the run's own settings are in its folder.
    assert main(["train", "--run", str(run), "--resume", "--train.steps", "2"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    newest = ["train", str(recipe), "--resume", "--train.seed", "3", "--train.steps", "3"]
    assert main([*newest, "--task.options.target=abc"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_nothing_to_resume(recipe, capsys):
    assert main(["train", str(recipe), "--resume"]) == 2
    assert "nothing to resume: no run small-*" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "give a RECIPE.toml" in capsys.readouterr().err
    assert main(["report", "no/such/run"]) == 2
    assert "no/such/run: no such run folder" in capsys.readouterr().err


def test_a_backend_that_is_absent_says_why(recipe, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("the cuda backend may be usable here")
    assert main(["train", str(recipe), "--train.backend", "cuda"]) in (1, 2)
    text = capsys.readouterr().err
    assert "cuda" in text and "Traceback" not in text


def test_eval(tiny, capsys):
    argv = ["eval", tiny, "--task", "letters", "--prompts", "3", "--samples", "2", "--json"]
    assert main([*argv, "--model.dtype", "float32", "--train.threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["prompts"], result["samples"], result["task"]) == (3, 6, "letters")
    assert result["low"] <= result["mean"] <= result["high"]
