"""Verifiable tasks: prompts with code that scores completions. See `protocol.Task`.

Nothing here imports torch: scoring processes start in a fraction of a second.
"""

from pyrl.tasks.mixture import Mixture
from pyrl.tasks.protocol import (
    SPLITS,
    LazyPrompts,
    Prompt,
    Split,
    Task,
    check_split,
    split_prompts,
    user_prompt,
)
from pyrl.tasks.registry import get_task, task_names
from pyrl.tasks.scoring import Pending, Score, Scorer

__all__ = [
    "SPLITS",
    "LazyPrompts",
    "Mixture",
    "Pending",
    "Prompt",
    "Score",
    "Scorer",
    "Split",
    "Task",
    "check_split",
    "get_task",
    "split_prompts",
    "task_names",
    "user_prompt",
]
