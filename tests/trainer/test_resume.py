import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from pyrl.trainer import checkpoint
from pyrl.trainer.checkpoint import CheckpointError
from pyrl.trainer.loop import train
from pyrl.trainer.recipe import ConfigError

pytestmark = pytest.mark.usefixtures("without_report")

#: Runs each recipe.toml in a process of its own, which kills itself before or after logging step 3.
#: The imports are paid for once: every run is a fork, made before torch has started a thread.
KILLED = """
import os, signal, sys
from pathlib import Path
from pyrl.trainer import recipe, session
from pyrl.trainer.loop import train

real = session.Session.log

def run(folder, when):
    def log(self, metrics, *rest):
        if metrics["step"] == 3 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, metrics, *rest)
        if metrics["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    session.Session.log = log
    train(recipe.load(folder / "recipe.toml"), folder / "run")

for name, when in (argument.split("=") for argument in sys.argv[1:]):
    child = os.fork()
    if child == 0:
        run(Path(name), when)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(name, "killed" if os.WTERMSIG(status) == signal.SIGKILL else status)
"""

HARD = {
    "train__steps": 5,
    "train__checkpoint_every": 2,
    "train__updates_per_step": 2,
    "loss__kl_coef": 0.05,
    "rollout__refill_rounds": 1,
    "optimizer__schedule": "cosine",
    "eval__prompts": 2,
    "eval__every": 2,
}
SCENARIOS = {
    "bfloat16": ("after", HARD | {"model__dtype": "bfloat16"}),
    "adapters": ("after", HARD | {"model__lora_rank": 4, "model__dtype": "bfloat16"}),
    "adapters-int8": ("before", HARD | {"model__lora_rank": 4, "model__quantize": "int8"}),
    "within-a-step": ("before", HARD),
    "every-step": ("after", {"train__steps": 5, "train__checkpoint_every": 1}),
    "no-checkpoint": ("after", {"train__steps": 4, "train__checkpoint_every": 0}),
}


@pytest.fixture(scope="module")
def killed(make_config, tmp_path_factory):
    """A folder with one broken run for each of SCENARIOS."""
    root = tmp_path_factory.mktemp("killed")
    for name, (_, overrides) in SCENARIOS.items():
        (root / name).mkdir()
        (root / name / "recipe.toml").write_text(make_config(**overrides).to_toml())
    command = [sys.executable, "-c", KILLED, *(f"{name}={s[0]}" for name, s in SCENARIOS.items())]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    for name in SCENARIOS:
        assert f"{name} killed" in done.stdout, done.stdout + done.stderr
    return root


def lines(folder):
    """metrics.jsonl without what a clock or a memory meter says, as text: equal means bit-equal."""
    kept = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        own = {k for k in values if k.startswith("seconds")} | {"tokens_per_second", "peak_rss_mib"}
        kept.append(json.dumps({k: v for k, v in values.items() if k not in own}))
    return kept


def weights(folder):
    name = (folder / "checkpoints/latest").read_text().strip()
    state = torch.load(folder / "checkpoints" / name / "state.pt", weights_only=True)
    return state["optimizer"]["masters"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_sigkill_and_resume_is_the_unbroken_run_bit_for_bit(
    killed, make_config, tmp_path, console, name
):
    when, overrides = SCENARIOS[name]
    config, broken, unbroken = make_config(**overrides), killed / name / "run", tmp_path / "whole"
    assert len(lines(broken)) == (3 if when == "after" else 2)
    whole = train(config, unbroken, console=console)
    resumed = train(config, broken, resume=True, console=console)
    assert lines(broken) == lines(unbroken)
    for key in ("heldout_before", "heldout_after"):
        assert resumed[key] == whole[key]
    ours, theirs = weights(broken), weights(unbroken)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for file in ("samples.jsonl", "evaluations.jsonl"):
        texts = [(run / file).read_text() for run in (broken, unbroken) if (run / file).exists()]
        assert len(texts) in (0, 2) and texts == texts[:1] * len(texts)
        assert len(texts) == 2 or not config.eval.prompts


def interrupt_at(step, console):
    """Presses Ctrl-C while `step` is being reported."""
    real = console.step

    def pressed(metrics):
        real(metrics)
        if metrics["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    console.step = pressed


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(make_config, tmp_path, console):
    config = make_config(train__steps=4, train__checkpoint_every=0)
    train(config, tmp_path / "whole", console=console)
    interrupt_at(2, console)
    handler = signal.getsignal(signal.SIGINT)
    result = train(config, tmp_path / "run", console=console)
    assert result == {"interrupted": 2}
    assert signal.getsignal(signal.SIGINT) is handler
    assert any("Ctrl-C again aborts" in text for text in console.messages)
    folder = tmp_path / "run"
    command = f"pyrl train {folder / 'config.toml'} --run {folder} --resume"
    assert any(command in text for text in console.messages)
    assert not (folder / "summary.json").exists()
    train(config, folder, resume=True, console=console)
    assert lines(folder) == lines(tmp_path / "whole")


def test_a_second_ctrl_c_aborts(make_config, tmp_path, console):
    interrupt_at(1, console)
    real = console.message

    def message(text):
        real(text)
        if "Ctrl-C again" in text:
            os.kill(os.getpid(), signal.SIGINT)

    console.message = message
    with pytest.raises(KeyboardInterrupt):
        train(make_config(train__steps=4), tmp_path / "run", console=console)


def test_ctrl_c_through_the_command_line(make_config, tmp_path):
    config = make_config(train__steps=500, train__checkpoint_every=0)
    (tmp_path / "r.toml").write_text(config.to_toml())
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pyrl.cli", "train", "r.toml", "--run", str(run)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in output
    assert (run / "checkpoints/latest").exists()


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    make_config, tmp_path, console, monkeypatch
):
    real, count = checkpoint.write_tensors, []

    def write(state, path):
        count.append(path)
        if len(count) in (2, 3):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(state, path)

    monkeypatch.setattr(checkpoint, "write_tensors", write)
    config = make_config(train__steps=4, train__checkpoint_every=1, train__keep_checkpoints=9)
    summary = train(config, tmp_path / "run", console=console)
    assert summary["steps"] == 4
    warned = [text for text in console.messages if "No space left" in text]
    assert len(warned) == 2 and "step 2" in warned[0] and "step-00000001 is intact" in warned[0]
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["latest", "step-00000001", "step-00000004"]


def test_resuming_another_configuration_is_refused(make_config, tmp_path, console):
    train(make_config(), tmp_path / "run", console=console)
    with pytest.raises(ConfigError, match=r"optimizer\.lr = 0\.01 there, 0\.02 here"):
        train(make_config(optimizer__lr=0.02), tmp_path / "run", resume=True, console=console)


def test_more_steps_go_on_where_the_run_ended(make_config, tmp_path, console):
    train(make_config(train__steps=2), tmp_path / "run", console=console)
    train(make_config(train__steps=3), tmp_path / "run", resume=True, console=console)
    train(make_config(train__steps=3), tmp_path / "whole", console=console)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_a_last_checkpoint_that_fails_is_said_once(make_config, tmp_path, console, monkeypatch):
    def full(state, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    config = make_config(train__steps=1, train__checkpoint_every=1)
    summary = train(config, tmp_path / "run", console=console)
    assert summary["steps"] == 1 and summary["unsaved"]
    assert len([text for text in console.messages if "No space left" in text]) == 1
    assert any("saved nowhere: make room" in text for text in console.messages)


def test_a_last_checkpoint_is_tried_again_when_all_else_is_done(
    make_config, tmp_path, console, monkeypatch
):
    real, tries = checkpoint.write_tensors, []

    def full(state, path):
        tries.append(path)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(state, path)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    config = make_config(train__steps=1, train__checkpoint_every=1)
    assert "unsaved" not in train(config, tmp_path / "run", console=console)
    assert len([text for text in console.messages if "No space left" in text]) == 1
    assert (tmp_path / "run/checkpoints/step-00000001/state.pt").exists()


def test_a_lost_pointer_loses_nothing(make_config, tmp_path, console):
    config = make_config(train__checkpoint_every=1)
    train(config, tmp_path / "run", console=console)
    before = lines(tmp_path / "run")
    (tmp_path / "run/checkpoints/latest").unlink()
    train(config, tmp_path / "run", resume=True, console=console)
    assert lines(tmp_path / "run") == before
    assert any("going on from step-00000002" in text for text in console.messages)


@pytest.mark.parametrize("left", ["nothing", "pointer"])
def test_lost_checkpoints_stop_a_resume_and_erase_nothing(make_config, tmp_path, console, left):
    config = make_config()
    train(config, tmp_path / "run", console=console)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.jsonl")}
    shutil.rmtree(tmp_path / "run/checkpoints")
    if left == "pointer":
        (tmp_path / "run/checkpoints").mkdir()
        (tmp_path / "run/checkpoints/latest").write_text("step-00000002\n")
    with pytest.raises(CheckpointError, match=r"in another folder with --run|another folder"):
        train(config, tmp_path / "run", resume=True, console=console)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.jsonl")} == before


def test_a_restart_keeps_what_was_recorded(make_config, tmp_path, console):
    """No checkpoint was due yet: the run starts again, and the old rows stay."""
    config = make_config(train__steps=1, train__checkpoint_every=5)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(config.to_toml())
    (run / "metrics.jsonl").write_text('{"step": 1, "mine": true}\n')
    train(config, run, resume=True, console=console)
    assert (run / "metrics.1.jsonl").read_text() == '{"step": 1, "mine": true}\n'
    assert len(lines(run)) == 1 and "mine" not in lines(run)[0]
    assert any("kept in metrics.1.jsonl" in text for text in console.messages)


def test_resuming_a_finished_run_writes_its_last_samples_once(make_config, tmp_path, console):
    config = make_config(train__steps=1, eval__prompts=2)
    for resume in (False, True):
        train(config, tmp_path / "run", resume=resume, console=console)
        samples = (tmp_path / "run/samples.jsonl").read_text().splitlines()
        phases = [json.loads(sample)["phase"] for sample in samples]
        assert phases.count("after") == phases.count("before") == 2


def test_resume_needs_a_run(make_config, tmp_path, console):
    with pytest.raises(ConfigError, match=r"typo holds no run to go on with \(no config\.toml\)"):
        train(make_config(), tmp_path / "typo", resume=True, console=console)
    assert not (tmp_path / "typo").exists()


def test_a_state_of_another_make_is_refused(make_config, tmp_path, console):
    config = make_config(train__steps=1)
    train(config, tmp_path / "run", console=console)
    kept = checkpoint.Checkpoints(tmp_path / "run/checkpoints", keep=1)
    state = kept.load()
    kept.save(1, {**state, "progress": {"stride": 1}})
    with pytest.raises(CheckpointError, match=r"not one of this version.*stride"):
        train(config, tmp_path / "run", resume=True, console=console)
