"""Science and technology: multiple choice, numbers with units, short texts."""

from pyrl.tasks.stem.task import Stem

__all__ = ["Stem"]
