"""Optional places that watch a run from outside: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import contextlib
import importlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pyrl.trainer.backlog import Backlog
from pyrl.trainer.tracking import RunFolder, plain, write_atomic


class Sink(Protocol):
    """A place outside the run folder that wants the metrics as they come."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One step's metrics, as given to `RunFolder.append_metrics`. After an OSError the same
        step comes again."""

    def close(self) -> None:
        """Flushes and ends; the sink is not used again."""


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The entries of `values` that are finite numbers, which is all that the sinks can draw."""
    converted = {key: plain(value, key) for key, value in values.items() if key != "step"}
    return {
        key: float(value) for key, value in converted.items() if isinstance(value, (int, float))
    }


class TensorBoardSink:
    """Event files in RUN/tensorboard; on resuming, later events of the killed run are purged."""

    def __init__(self, run: RunFolder, resume_step: int | None) -> None:
        _require("tensorboard", "tensorboard")
        self._folder = str(run.path / "tensorboard")
        self._writer = self._open(None if resume_step is None else resume_step + 1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:  # noqa: D102
        if self._writer is None:
            self._writer = self._open(step)
        try:
            for key, value in scalars(values).items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()
        except OSError:  # the writer's thread has ended, and with it the writer
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None
            raise

    def close(self) -> None:  # noqa: D102
        if self._writer is not None:
            self._writer.close()

    def _open(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log_dir=self._folder, purge_step=purge_step)


class WandbSink:
    """A Weights & Biases run named after the folder; a resumed run continues it by its kept id.

    wandb's own variables choose project, entity and mode (`WANDB_MODE=offline` sends nothing)."""

    def __init__(self, run: RunFolder, resume_step: int | None) -> None:
        wandb = _require("wandb", "wandb")
        kept = run.path / "wandb-id.txt"
        if resume_step is None or not kept.exists():
            write_atomic(kept, uuid.uuid4().hex[:12].encode())
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "pyrl"),
            name=run.path.resolve().name,
            id=kept.read_text().strip(),
            resume="allow",
            dir=str(run.path),
            config={"config_toml": run.read().config},
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:  # noqa: D102
        self._run.log(scalars(values), step=step)

    def close(self) -> None:  # noqa: D102
        self._run.finish()


class TrackioSink:
    """A trackio run named after the folder (local unless trackio is told otherwise)."""

    def __init__(self, run: RunFolder, resume_step: int | None) -> None:
        self._trackio = _require("trackio", "trackio")
        self._trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "pyrl"),
            name=run.path.resolve().name,
            resume="allow" if resume_step is not None else "never",
            config={"config_toml": run.read().config},
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:  # noqa: D102
        self._trackio.log(scalars(values), step=step)

    def close(self) -> None:  # noqa: D102
        self._trackio.finish()


class PatientSink:
    """A sink whose OSErrors cost nothing: the steps it refuses wait in memory."""

    def __init__(self, name: str, sink: Sink, tell: Callable[[str], None] | None) -> None:
        self._sink, self._tell = sink, tell
        self._steps: Backlog[tuple[int, Mapping[str, Any]]] = Backlog(name, self._write, tell)

    def log(self, step: int, values: Mapping[str, Any]) -> None:  # noqa: D102
        self._steps.put([(step, values)])

    def close(self) -> None:  # noqa: D102
        self._steps.close()
        try:
            self._sink.close()
        except OSError as error:
            if self._tell is None:
                raise
            self._tell(f"warning: {self._steps.name} did not close: {error.strerror or error}")

    def _write(self, steps: list[tuple[int, Mapping[str, Any]]]) -> None:
        while steps:
            self._sink.log(*steps[0])
            del steps[0]


#: Names that `make_sinks` accepts.
SINKS: dict[str, Any] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "trackio": TrackioSink,
}


def _require(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # installed, but broken: its own message says more
            raise
        raise ModuleNotFoundError(
            f"tracking to {extra!r} needs the package {package}, which is not installed: "
            f"pip install 'pyrl[{extra}]', or take {extra!r} out of the run's sinks",
            name=package,
        ) from None


def check_sinks(names: Sequence[str]) -> None:
    """An unknown or repeated name is a ValueError, a missing package a ModuleNotFoundError that
    names the extra to install."""
    for i, name in enumerate(names):
        if name not in SINKS:
            raise ValueError(f"sinks[{i}]={name!r}: expected one of {sorted(SINKS)}")
        if name in names[:i]:
            raise ValueError(f"sinks[{i}]={name!r}: named twice")
    for name in names:
        _require(name, name)


def make_sinks(
    names: Sequence[str],
    run: RunFolder,
    *,
    resume_step: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Sink]:
    """The sinks called `names` (see `check_sinks`), started. One that fails leaves none open.

    resume_step: last step that is kept. tell: see `Backlog`.
    """
    check_sinks(names)
    sinks: list[Sink] = []
    try:
        for name in names:
            sinks.append(PatientSink(name, SINKS[name](run, resume_step), tell))
    except BaseException:
        for sink in sinks:
            sink.close()
        raise
    return sinks
