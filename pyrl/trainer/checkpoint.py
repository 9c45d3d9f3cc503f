"""Checkpoints that survive a kill at any moment and a full disk.

    RUN/checkpoints/step-00000020/state.pt          masters, AdamW, position, totals, identity
    RUN/checkpoints/step-00000020/state.pt.sha256   its digest, as `sha256sum -c` reads it
    RUN/checkpoints/latest                          the name of the folder to resume from

A checkpoint is written into a folder beside its place, flushed to the disk, and renamed; then
`latest` is replaced. Whatever interrupts this, `latest` names a complete checkpoint. What is
loaded has the digest that was taken while it was written.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FORMAT = 3
#: What every state holds; the trainer fills it.
KEYS = ("format", "identity", "progress", "optimizer", "parts")
STATE, DIGEST = "state.pt", "state.pt.sha256"
_PARTIAL, _OLD = ".partial-", ".old-"
_STEP = re.compile(r"step-\d{8}")


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


def write_tensors(state: dict[str, Any], path: Path) -> str:
    """torch.save; returns the SHA-256 of what was handed to the disk. The disk's own OSError comes
    out where torch would hide it in a RuntimeError."""
    with open(path, "wb") as raw:
        file = _Remembering(raw)
        try:
            torch.save(state, file)  # type: ignore[arg-type]
        except RuntimeError:
            if file.error is not None:
                raise file.error from None
            raise
    return file.digest.hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """The verified state in a checkpoint's folder, on the CPU; CheckpointError: what is wrong."""
    path = folder / STATE
    try:
        written = (folder / DIGEST).read_bytes().decode("ascii", "replace").partition(" ")[0]
        found = _sha256(path)
    except OSError as error:
        name = Path(error.filename or path).name
        raise CheckpointError(f"{folder}: {name} cannot be read: {error.strerror}") from error
    if found != written:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is {found[:12]}…, that of what was written "
            f"{written[:12] or 'not recorded'}…"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a trainer's state")
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')}; expected {FORMAT}")
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    return state


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

        def write(folder: Path) -> None:
            digest = write_tensors(state, folder / STATE)
            (folder / DIGEST).write_text(f"{digest}  {STATE}\n")

        try:
            write_aside(target, write)
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
        # Those of later steps belong to a course that this run, resumed before them, has left.
        folders = self._folders()
        kept = [f for f in folders if f.name <= target.name][-self.keep :]
        for folder in folders:
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        return target

    def latest(self) -> Path | None:
        """The folder that `latest` names; None where it names none that is there."""
        try:
            name = (self.path / "latest").read_bytes().decode("ascii", "replace").strip()
        except OSError:
            return None
        folder = self.path / name
        return folder if _STEP.fullmatch(name) and folder.is_dir() else None

    def load(self, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any] | None:
        """The verified state that `latest` names; None only when there has been no checkpoint.

        Where `latest` is missing or names nothing, the newest intact checkpoint, after `tell` has
        said so. CheckpointError when the one it names is damaged (going back is the user's
        decision; the message says how) or none is intact.
        """
        named = self.latest()
        if named is not None:
            try:
                return read_state(named)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; {self._way_out(named)}") from error
        folders = self._folders()
        if not folders and not os.path.lexists(self.path / "latest"):
            return None
        problems = []
        for folder in reversed(folders):
            try:
                state = read_state(folder)
            except CheckpointError as error:
                problems.append(str(error))
            else:
                skipped = "".join(f"; {problem}" for problem in problems)
                tell(f"warning: {self.path / 'latest'} names no checkpoint: going on from "
                     f"{folder.name}, the newest intact one{skipped}")  # fmt: skip
                return state
        found = "; ".join(problems) or "`latest` names one that is gone, and there is no other"
        raise CheckpointError(
            f"no checkpoint in {self.path} is intact: {found}; "
            "to start again, choose another folder with --run"
        )

    def _way_out(self, damaged: Path) -> str:
        """What can be resumed without `damaged`, and how."""
        for folder in reversed(self._folders()):
            if folder == damaged:
                continue
            try:
                read_state(folder)
            except CheckpointError:
                continue
            return f"{folder.name} is intact: move {damaged} away, and --resume goes on from it"
        return "no other checkpoint is intact: to start again, choose another folder with --run"

    def _folders(self) -> list[Path]:
        """Every checkpoint's folder, damaged or not, by step."""
        found = [f for f in self.path.glob("step-*") if _STEP.fullmatch(f.name) and f.is_dir()]
        return sorted(found)

    def _point_at(self, name: str) -> None:
        aside = self.path / ".latest"
        aside.write_text(name + "\n")
        _flush(aside)
        os.replace(aside, self.path / "latest")
        _flush(self.path)


class _Remembering:
    """A file that takes the digest of what is written, which torch does in order, and remembers
    the OSError of a write, which torch's zip writer may swallow."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return int(self._raw.write(data))
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._raw.flush()


def _sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
