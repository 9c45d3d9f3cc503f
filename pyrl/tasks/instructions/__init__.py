"""The quickstart task: write one sentence that keeps the constraints of the prompt."""

from pyrl.tasks.instructions.task import DEFAULT_CONSTRAINTS, Instructions

__all__ = ["DEFAULT_CONSTRAINTS", "Instructions"]
