"""Checkpoints that survive a kill at any moment and a full disk.

    RUN/checkpoints/step-00000020/state.pt   masters, AdamW, position, totals, config identity
    RUN/checkpoints/latest                   the name of the folder to resume from

A checkpoint is written into a folder beside its place, flushed to the disk, and renamed; then
`latest` is replaced. Whatever interrupts this, `latest` names a complete checkpoint.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
_PARTIAL, _OLD = ".partial-", ".old-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what is left to resume from."""


def write_aside(target: Path, write: Callable[[Path], None]) -> None:
    """`write(folder)` into a folder beside `target`, flush, rename. OSError leaves no trace."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(_PARTIAL + target.name)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        if target.exists():
            old = target.with_name(_OLD + target.name)
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        partial.rename(target)
        _flush(target.parent)
        shutil.rmtree(target.with_name(_OLD + target.name), ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_tensors(state: dict[str, Any], path: Path) -> None:
    """torch.save, with the disk's own OSError where torch would hide it in a RuntimeError."""
    with open(path, "wb") as raw:
        file = _Remembering(raw)
        try:
            torch.save(state, file)  # type: ignore[arg-type]
        except RuntimeError:
            if file.error is not None:
                raise file.error from None
            raise


class Checkpoints:
    """The checkpoints of a run; the newest `keep` stay."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes the state of `step`, points `latest` at it, removes what is too old.

        CheckpointError when the disk refuses (full, quota, read-only): nothing partial is left
        and the previous checkpoint is as it was.
        """
        target = self.path / f"step-{step:08d}"
        try:
            write_aside(target, lambda folder: write_tensors(state, folder / "state.pt"))
            self._point_at(target.name)
        except OSError as error:
            previous = self.latest()
            left = f"{previous.name} is intact" if previous else "there is no earlier one"
            reason = error.strerror or error
            raise CheckpointError(
                f"the checkpoint of step {step} was not written: {reason} ({self.path}); {left}"
            ) from error
        for pattern in (_PARTIAL, _OLD):  # left by a kill
            for folder in self.path.glob(pattern + "*"):
                shutil.rmtree(folder, ignore_errors=True)
        kept = sorted(self.path.glob("step-*"))[-self.keep :]
        for folder in self.path.glob("step-*"):
            if folder not in kept and folder != target:
                shutil.rmtree(folder, ignore_errors=True)
        return target

    def latest(self) -> Path | None:
        """The folder to resume from; None when there is none."""
        pointer = self.path / "latest"
        if not pointer.exists():
            return None
        folder = self.path / pointer.read_text().strip()
        return folder if (folder / "state.pt").exists() else None

    def load(self) -> dict[str, Any] | None:
        """The state that `latest` names, on the CPU; None when there is no checkpoint."""
        folder = self.latest()
        if folder is None:
            return None
        try:
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{folder / 'state.pt'} cannot be read: {error}") from error
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder / 'state.pt'} has format {state.get('format')}; expected {FORMAT}"
            )
        return dict(state)

    def _point_at(self, name: str) -> None:
        aside = self.path / ".latest"
        aside.write_text(name + "\n")
        _flush(aside)
        os.replace(aside, self.path / "latest")
        _flush(self.path)


class _Remembering:
    """A file that remembers the OSError of a write, which torch's zip writer may swallow."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self._raw.write(data))
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._raw.flush()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
