"""Triton kernels of the fused losses; shipped as `pyrl.kernels`.

Importable without triton: only its modules (`logits`, `objective`, ...) need it. They run
compiled on a CUDA device, or interpreted (slow, for correctness) on any device where
TRITON_INTERPRET=1 was set before triton was imported.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

if __name__ == "kernels":
    raise ImportError("import pyrl.kernels: the folder kernels/ is not a package of its own")

__all__ = ["unavailable_reason"]

#: bf16 arithmetic and Triton's code generator both want at least this.
_MIN_CAPABILITY = (8, 0)


def unavailable_reason() -> str | None:
    """None if the kernels can run here, else the printable reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        if _imported_uninterpreted():
            return "TRITON_INTERPRET=1 was set after triton was imported"
        return None
    if not torch.cuda.is_available():
        return "no CUDA device and TRITON_INTERPRET is not 1"
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        found, wanted = (".".join(map(str, c)) for c in (capability, _MIN_CAPABILITY))
        return f"the CUDA device has compute capability {found}, the kernels need {wanted}"
    return None


def _imported_uninterpreted() -> bool:
    # triton decides at import whether its own library functions (tl.sum, ...) are interpreted.
    language = sys.modules.get("triton.language")
    return language is not None and type(language.sum).__name__ == "JITFunction"
