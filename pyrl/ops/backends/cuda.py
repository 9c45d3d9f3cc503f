"""CUDA C++ kernels (csrc/cuda) behind the same schemas as the CPU's."""

from __future__ import annotations

from typing import Any

import torch

from pyrl import _native


def unavailable_reason() -> str | None:
    """None if usable here, else why not."""
    reason = _native.cuda_reason()
    if reason is None and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    return reason


def has_head_kernels(dtype: torch.dtype) -> bool:
    """See `Backend.has_head_kernels`."""
    return False


def __getattr__(name: str) -> Any:
    # The registered ops carry the backend's own names; they exist once the library is loaded.
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(torch.ops.pyrl_native, name)
