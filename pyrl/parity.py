"""What parity means here: error(backend) <= error(plain torch, same dtype) + margin, vs float64."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrl.ops.backend import backends, select

#: LOSSES: the margins over plain torch's own error, as relative norms. f16 has 8x bf16's precision.
MARGIN = {torch.float32: 5e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def serving(device: torch.device = DEVICE) -> list[str]:
    """Backends that run on this machine's test device, the oracle left out."""
    names = []
    for name, reason in backends().items():
        if reason is not None or name == "reference":
            continue
        try:
            select(name, device)
        except ValueError:
            continue
        names.append(name)
    return names


def relative(value: Tensor | None, truth: Tensor | None, size: Tensor | float = 0.0) -> float:
    """|value - truth| / max(|truth|, size) in float64; absolute where that is 0.

    size: the norm of the terms that truth is a sum of, where they may cancel.
    """
    assert (value is None) == (truth is None)
    if value is None or truth is None:
        return 0.0
    value, truth = value.double(), truth.double()
    assert value.shape == truth.shape and bool(value.isfinite().all())
    norm = max(truth.norm().item(), float(size))
    return (value - truth).norm().item() / (norm if norm > 0 else 1.0)
