"""Triton kernels (kernels/, shipped as pyrl.kernels): compiled on a GPU, interpreted on the CPU."""

from __future__ import annotations

from typing import Any

import torch

from pyrl.kernels import unavailable_reason

__all__ = [
    "gae_terms",
    "group_advantage_terms",
    "has_head_kernels",
    "logits_grad_",
    "logits_stats",
    "objective_terms",
    "objectives",
    "unavailable_reason",
]


def has_head_kernels(dtype: torch.dtype) -> bool:
    """See `Backend.has_head_kernels`."""
    return False


# Imported on first call: triton itself is optional, and reads TRITON_INTERPRET when it is imported.
def logits_stats(*args: Any, **options: Any) -> Any:
    """See `Backend.logits_stats`."""
    from pyrl.kernels import logits, support

    given = {name: value for name, value in options.items() if value is not None}
    stats: Any = support.support_stats if "spans" in given else logits.logits_stats
    return stats(*args, **given)


def logits_grad_(*args: Any, **options: Any) -> None:
    """See `Backend.logits_grad_`."""
    from pyrl.kernels import logits, support

    given = {name: value for name, value in options.items() if value is not None}
    grad_: Any = support.support_grad_ if "spans" in given else logits.logits_grad_
    grad_(*args, **given)


def objectives() -> int:
    """See `Backend.objectives`."""
    from pyrl.kernels import objective_terms

    return len(objective_terms.OBJECTIVES)


def objective_terms(*args: Any) -> Any:
    """See `Backend.objective_terms`."""
    from pyrl.kernels import objective

    return objective.objective_terms(*args)


def group_advantage_terms(*args: Any) -> Any:
    """See `Backend.group_advantage_terms`."""
    from pyrl.kernels import group_advantage

    return group_advantage.group_advantage_terms(*args)


def gae_terms(*args: Any) -> Any:
    """See `Backend.gae_terms`."""
    from pyrl.kernels import gae

    return gae.gae_terms(*args)
