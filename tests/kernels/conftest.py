"""The kernels run compiled on a GPU; without one, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from pyrl.kernels import unavailable_reason

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = [
        "test_logits.py",
        "test_support.py",
        "test_objective.py",
        "test_group_advantage.py",
        "test_gae.py",
    ]


@pytest.fixture(scope="session")
def device() -> torch.device:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
