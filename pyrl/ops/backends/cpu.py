"""C++ kernels for the CPU (csrc/cpu), AVX-512 or AVX2 chosen at run time."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pyrl import _native


def unavailable_reason() -> str | None:
    """None if usable here, else why not."""
    return _native.native_reason()


@functools.cache
def has_head_kernels(dtype: torch.dtype) -> bool:
    """See `Backend.has_head_kernels`; bf16 needs AVX512-BF16, f32 AVX2."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    return torch.ops.pyrl_native.head_supported(dtype == torch.bfloat16)


def __getattr__(name: str) -> Any:
    # The registered ops carry the backend's own names; they exist once the library is loaded.
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(torch.ops.pyrl_native, name)
