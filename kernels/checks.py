"""What the launchers refuse: kernels index flat memory, so a strided vector would be misread."""

from __future__ import annotations

import torch
from torch import Tensor


def require(dtype: torch.dtype, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """ValueError naming the first of `tensors` that is not contiguous, `dtype` and `shape`; None
    passes."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected a contiguous {dtype} tensor of shape {list(shape)}, got "
                f"{tensor.dtype} of shape {list(tensor.shape)} and strides {list(tensor.stride())}"
            )
