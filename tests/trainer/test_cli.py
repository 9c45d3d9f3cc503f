import json

import pytest

from pyrl.cli import _parser, _prepared, main
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
        (["--task.options.target", "none", "--task.options.colour"], ["colour: expected a value"]),
        (["--task.options.train", "many"], ["TypeError", "letters.py"]),
        (["--task.options.train", "nan"], ["--task.options.train", "expected a finite number"]),
        (["--rollout.options.foo", "3"], ["no option 'foo'", "max_rows=256"]),
        (["--model.attention", "foo"], ["model.attention = 'foo'", "'pyrl_varlen', 'sdpa'"]),
        (["--optimizer.lr", "-1e-3"], ["optimizer.lr = -0.001", ">= 0"]),
        (["--optimizer.lr", "-inf"], ["optimizer.lr = -inf"]),
        (["--run", "no-such-run", "--resume"], ["no-such-run holds no run to go on with"]),
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


@pytest.mark.parametrize("value", ["-1e-3", "-.5", "-2"])
def test_negative_numbers_are_values(value):
    rest, _ = _prepared(["train", "r.toml", "--loss.entropy_coef", value, "--resume"])
    args, unknown = _parser().parse_known_args(rest)
    assert getattr(args, "loss.entropy_coef") == value and args.resume and not unknown


def test_a_refusing_disk_is_one_sentence(recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["train", str(recipe), "--run", str(tmp_path / "file" / "run")]) == 1
    text = capsys.readouterr().err
    assert text.startswith("pyrl train: ") and "Not a directory" in text and text.count("\n") == 1


def test_a_broken_task_is_one_sentence(recipe, toy, capsys):
    argv = ["train", str(recipe), "--task.name", toy("Raises"), "--train.steps", "5"]
    assert main(argv) == 1
    text = capsys.readouterr().err
    assert text.startswith("pyrl train: no completion of the last 3 steps could be scored")


def test_a_damaged_checkpoint_is_one_sentence(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--run", str(run)]) == 0
    (run / "checkpoints/step-00000001/state.pt").write_bytes(b"")
    assert main(["train", "--run", str(run), "--resume"]) == 1
    text = capsys.readouterr().err
    assert "state.pt is damaged" in text and "choose another folder with --run" in text
