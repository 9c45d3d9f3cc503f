"""The trainer: a recipe, a loop of one sitting, and everything a run leaves behind."""

from typing import TYPE_CHECKING, Any

from pyrl.trainer.config import Config
from pyrl.trainer.recipe import ConfigError, load

if TYPE_CHECKING:
    from pyrl.trainer.loop import train

__all__ = ["Config", "ConfigError", "load", "train"]


def __getattr__(name: str) -> Any:
    # The loop imports transformers; reading a recipe or a report should not wait for it.
    if name == "train":
        from pyrl.trainer.loop import train

        return train
    raise AttributeError(f"module 'pyrl.trainer' has no attribute {name!r}")
