"""What a run knows of its past, and how a resumed run finds it again."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyrl.trainer.checkpoint import CheckpointError, Checkpoints
from pyrl.trainer.config import Config
from pyrl.trainer.optimizer import MasterAdamW
from pyrl.trainer.recipe import ConfigError
from pyrl.trainer.tracking import RunFolder


@dataclasses.dataclass
class Progress:
    """Beside weights and moments; part of every checkpoint."""

    step: int = 0
    drawn: dict[str, int] = dataclasses.field(default_factory=dict)
    """Prompts drawn so far from each domain ("" where there is no mixture)."""
    resets: int = 0
    """Times that the reference has become the policy ..."""
    reset_step: int = 0
    """... the last time after this step."""
    seconds: float = 0.0
    seconds_by_phase: dict[str, float] = dataclasses.field(default_factory=dict)
    sampled_tokens: int = 0
    samples: int = 0
    """Completions sampled, those of pilots included."""
    peak_rss_mib: float = 0.0
    heldout_before: dict[str, float] | None = None


def recover(
    folder: RunFolder, checkpoints: Checkpoints, config: Config, tell: Callable[[str], None]
) -> dict[str, Any] | None:
    """The state to go on from; None when the run broke off before its first checkpoint.

    CheckpointError where there is none, although one was due: to start again would be a surprise.
    """
    saved = checkpoints.load(tell)
    if saved is not None:
        step = saved["progress"].get("step", 0)
        check_identity(saved["identity"], config, folder.path, step)
        return saved
    step, every = folder.last_step(), config.train.checkpoint_every
    if folder.summary_path.exists() or (step is not None and 0 < every <= step):
        raise CheckpointError(
            f"{folder.path} has recorded {step or 0} steps, and {checkpoints.path} holds no "
            "checkpoint of them: put it back, or start again in another folder with --run"
        )
    return None


def restore(saved: dict[str, Any], optimizer: MasterAdamW) -> Progress:
    """Puts the state's masters and moments into `optimizer`; returns its progress."""
    try:
        optimizer.load_state_dict(saved["optimizer"])
        return Progress(**saved["progress"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint is not one of this version: {type(error).__name__}: {error}"
        ) from error


def check_identity(
    saved: dict[str, Any], config: Config, path: os.PathLike[str], step: int
) -> None:
    """ConfigError when the checkpoint belongs to a run of other settings: two would be mixed.

    Stages that begin after `step`, and how long the present one still lasts, may change.
    """
    ours, present = config.identity(), config.stage(max(step, 1))

    def ahead(key: str) -> bool:
        if not key.startswith("stages."):
            return False
        _, i, rest = key.split(".", 2)
        return int(i) > present or (int(i) == present and rest == "steps")

    different = [
        f"{key} = {saved.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted({*saved, *ours})
        if not _same(saved.get(key), ours.get(key)) and not ahead(key)
    ]
    if different:
        raise ConfigError(
            f"{path} cannot be resumed with this configuration: {'; '.join(different)} "
            f"(its own settings: {Path(path) / 'config.toml'})"
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-15)  # a TOML text may round the last bit
    return bool(a == b)
