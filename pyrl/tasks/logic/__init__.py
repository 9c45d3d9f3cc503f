"""Logic and algorithmic puzzles of the `reasoning_gym` package, scored by its own scorers."""

from pyrl.tasks.logic.findings import CURATED, EXCLUDED, LEVELS
from pyrl.tasks.logic.task import Logic

__all__ = ["CURATED", "EXCLUDED", "LEVELS", "Logic"]
