"""Folders that are whole or absent, and transformers without its progress bars."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging as hf_logging


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings and no progress bars from transformers inside; settings restored after."""
    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def whole_folder(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` only if the body succeeds.

    An existing `path` is replaced, or, with `keep_existing`, wins (two processes may build the
    same folder: the second discards its own). On an error `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = aside / "new"
        new.mkdir()
        yield new
        old = aside / "old"
        if path.exists() and not keep_existing:
            os.rename(path, old)
        try:
            os.rename(new, path)  # onto a folder that is not empty this fails: the race's verdict
        except OSError:
            if old.exists():
                os.rename(old, path)
            if not (keep_existing and path.exists()):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
