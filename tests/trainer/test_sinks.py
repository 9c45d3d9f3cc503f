"""The sinks that watch a run from outside."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from pyrl.trainer import sinks
from pyrl.trainer.sinks import make_sinks
from pyrl.trainer.tracking import RunFolder


class FakeRun:
    """Stands for a wandb run and for the trackio module: the calls pyrl makes, recorded."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, **settings: Any) -> FakeRun:
        self.calls.append(("init", settings))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_sinks_get_finite_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRun()
    module = types.ModuleType(name)
    module.__dict__.update(init=fake.init, log=fake.log, finish=fake.finish)
    monkeypatch.setitem(sys.modules, name, module)
    (sink,) = make_sinks([name], RunFolder(tmp_path / "my-run").make())
    sink.log(3, {"step": 3, "loss": torch.tensor(0.5), "kl": float("nan"), "note": "x", "n": 2})
    sink.close()
    assert fake.calls[0][1]["name"] == "my-run"
    assert fake.calls[1:] == [("log", (3, {"loss": 0.5, "n": 2.0})), ("finish", None)]


def test_a_resumed_wandb_run_continues_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRun()
    module = types.ModuleType("wandb")
    module.__dict__.update(init=fake.init)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for resume_step in (None, 5, None):
        make_sinks(["wandb"], RunFolder(tmp_path), resume_step=resume_step)
    first, resumed, fresh = [settings["id"] for _, settings in fake.calls]
    assert first == resumed != fresh


@pytest.mark.parametrize("name", list(sinks.SINKS))
def test_a_missing_package_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])  # nothing more can be imported
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'pyrl\[{name}\]'"):
        make_sinks([name], RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["wandb", "mlflow"], r"sinks\[1\]='mlflow': expected one of \['tensorboard', 'trackio'"),
        (["trackio", "trackio"], r"sinks\[1\]='trackio': named twice"),
    ],
)
def test_bad_sink_names(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_sinks(names, RunFolder(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_sink_that_fails_closes_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRun()
    module = types.ModuleType("trackio")
    module.__dict__.update(init=fake.init, finish=fake.finish)
    monkeypatch.setitem(sys.modules, "trackio", module)
    broken = types.ModuleType("wandb")  # found, and its `init` is not there
    monkeypatch.setitem(sys.modules, "wandb", broken)
    with pytest.raises(AttributeError):
        make_sinks(["trackio", "wandb"], RunFolder(tmp_path))
    assert fake.calls[-1] == ("finish", None)


def test_tensorboard_for_real(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(tmp_path)
    for resume_step, steps in ((None, (1, 2, 3)), (1, (2, 3))):
        (sink,) = make_sinks(["tensorboard"], run, resume_step=resume_step)
        for step in steps:
            sink.log(step, {"reward": float(step if resume_step is None else -step)})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 1), (2, -2), (3, -3)]


class FullWriter:
    """A SummaryWriter whose disk is full for some steps: its thread ends, and it with it."""

    full: tuple[int, ...] = ()
    made: list[FullWriter] = []  # noqa: RUF012

    def __init__(self, log_dir: str, purge_step: int | None) -> None:
        self.purge_step, self.dead = purge_step, False
        self.events: list[int] = []
        FullWriter.made.append(self)

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.dead = self.dead or step in FullWriter.full
        if not self.dead:
            self.events.append(step)

    def flush(self) -> None:
        if self.dead:
            raise OSError(28, "No space left on device")

    close = flush


def test_a_tensorboard_without_room_gets_its_steps_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.__dict__.update(SummaryWriter=FullWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setattr(FullWriter, "made", [])
    told: list[str] = []
    (sink,) = make_sinks(["tensorboard"], RunFolder(tmp_path), tell=told.append)
    for step in range(1, 6):
        monkeypatch.setattr(FullWriter, "full", (2, 3) if step < 4 else ())
        sink.log(step, {"reward": 1.0})
    sink.close()
    assert [e for writer in FullWriter.made for e in writer.events] == [1, 2, 3, 4, 5]
    assert [writer.purge_step for writer in FullWriter.made] == [None, 2, 2]
    assert len(told) == 2 and "tensorboard could not be written: No space left" in told[0]


def test_a_sink_that_cannot_close_is_a_warning(tmp_path: Path) -> None:
    class Stuck:
        def log(self, step: int, values: Any) -> None:
            raise ConnectionResetError(104, "Connection reset by peer")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    told: list[str] = []
    sink = sinks.PatientSink("stuck", Stuck(), told.append)
    for step in (1, 2):
        sink.log(step, {})
    sink.close()
    assert [text.split(":")[1] for text in told] == [
        " stuck could not be written",
        " 2 rows of stuck could not be written and are lost",
        " stuck did not close",
    ]
