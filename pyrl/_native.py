"""Loads the compiled libraries beside this file and says, per library, why it is absent.

`_C.so` (schemas and CPU kernels) and `_C_cuda.so` (CUDA kernels) register operators of
`torch.ops.pyrl_native`; `_host` is a Python module of integer planners. A library that was not
built leaves a printable reason; a library that is there but does not load raises.
"""

from __future__ import annotations

import importlib
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).resolve().parent
_PURE = "was not built: a pure-Python install (PYRL_BUILD=cpu says which tool is missing)"


def _load(name: str) -> bool:
    path = _FOLDER / f"{name}.so"
    if path.exists():
        torch.ops.load_library(str(path))
    return path.exists()


def _load_cuda() -> str | None:
    if _CPU_REASON is not None:
        return _CPU_REASON  # the schemas are in _C
    if torch.version.cuda is None:
        # It links to libtorch_cuda.so, which this torch lacks.
        return f"torch {torch.__version__} has no CUDA"
    if _load("_C_cuda"):
        return None
    return "pyrl/_C_cuda.so was not built: reinstall where nvcc is (PYRL_BUILD=cuda demands it)"


def _load_host() -> str | None:
    # Only beside this file: an editable install elsewhere must not lend its module.
    if PathFinder.find_spec("_host", [str(_FOLDER)]) is None:
        return f"pyrl/_host {_PURE}"
    importlib.import_module("pyrl._host")
    return None


_CPU_REASON = None if _load("_C") else f"pyrl/_C.so {_PURE}"
_CUDA_REASON = _load_cuda()
_HOST_REASON = _load_host()


def native_reason() -> str | None:
    """None if the C++ CPU kernels are loaded, else why not."""
    return _CPU_REASON


def cuda_reason() -> str | None:
    """None if the CUDA kernels are loaded, else why not (a GPU is another question)."""
    return _CUDA_REASON


def host_reason() -> str | None:
    """None if the planners of `pyrl._host` are loaded, else why not."""
    return _HOST_REASON


if _CPU_REASON is None:

    @torch.library.register_fake("pyrl_native::logits_stats")
    def _(
        z: Tensor,
        target: Tensor,
        inv_temperature: Tensor,
        logit_scale: float,
        softcap: float,
        spans: Tensor | None = None,
        ids: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = target.shape[0]
        return (
            z.new_empty(n, dtype=torch.float32),
            z.new_empty(n, dtype=torch.float32),
            z.new_empty(n, dtype=torch.float32),
        )

    @torch.library.register_fake("pyrl_native::logits_grad_")
    def _(
        z: Tensor,
        target: Tensor,
        inv_temperature: Tensor,
        logit_scale: float,
        softcap: float,
        lse: Tensor,
        entropy: Tensor,
        c: Tensor,
        h: Tensor,
        g: Tensor | None,
        spans: Tensor | None = None,
        ids: Tensor | None = None,
        rows: Tensor | None = None,
        source: Tensor | None = None,
    ) -> None:
        return None

    @torch.library.register_fake("pyrl_native::logits_policy_grad_")
    def _(
        z: Tensor,
        target: Tensor,
        inv_temperature: Tensor,
        logit_scale: float,
        softcap: float,
        old: Tensor | None,
        ref: Tensor | None,
        rollout: Tensor | None,
        advantage: Tensor,
        weight: Tensor,
        keep: Tensor,
        params: Tensor,
        rows: Tensor | None = None,
        source: Tensor | None = None,
        ctas: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = target.shape[0]
        return (
            z.new_empty(n, dtype=torch.float32),
            z.new_empty(n, dtype=torch.float32),
            z.new_empty(n, dtype=torch.float32),
        )

    @torch.library.register_fake("pyrl_native::logits_scale_")
    def _(z: Tensor, factor: Tensor, rows: Tensor | None = None) -> None:
        return None

    @torch.library.register_fake("pyrl_native::head_stats")
    def _(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        inv_temperature: Tensor,
        logit_scale: float,
        softcap: float,
        dweight: Tensor | None,
        near: int,
        far: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = target.shape[0]
        return (
            x.new_empty(n, dtype=torch.float32),
            x.new_empty(n, dtype=torch.float32),
            x.new_empty(n, dtype=torch.float32),
        )

    @torch.library.register_fake("pyrl_native::head_grad_")
    def _(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        inv_temperature: Tensor,
        logit_scale: float,
        softcap: float,
        dweight: Tensor | None,
        near: int,
        far: Tensor | None,
        lse: Tensor,
        entropy: Tensor,
        c: Tensor,
        h: Tensor,
        g: Tensor | None,
        dhidden: Tensor | None,
        low: Tensor | None,
        dbias: Tensor | None,
        first: bool,
        last: bool,
    ) -> None:
        return None

    @torch.library.register_fake("pyrl_native::objective_terms")
    def _(
        logprob: Tensor,
        entropy: Tensor | None,
        old: Tensor | None,
        ref: Tensor | None,
        rollout: Tensor | None,
        advantage: Tensor,
        weight: Tensor,
        keep: Tensor,
        bounds: Tensor | None,
        params: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from pyrl.ops.spec import METRICS

        return (
            logprob.new_empty(()),
            torch.empty_like(logprob),
            torch.empty_like(logprob),
            logprob.new_empty(len(METRICS), dtype=torch.float64),
        )

    @torch.library.register_fake("pyrl_native::group_advantage_terms")
    def _(
        rewards: Tensor,
        order: Tensor | None,
        offsets: Tensor,
        method: int,
        unbiased: bool,
        eps: float,
        filters: int,
        drop: bool,
        offset: float,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from pyrl.ops.group_advantage import METRICS

        return (
            torch.empty_like(rewards, dtype=torch.float32),
            torch.empty_like(rewards, dtype=torch.bool),
            rewards.new_empty(len(METRICS), dtype=torch.float64),
        )

    @torch.library.register_fake("pyrl_native::gae_terms")
    def _(
        rewards: Tensor,
        values: Tensor,
        keep: Tensor,
        bounds: Tensor,
        bootstrap: Tensor,
        gamma: float,
        lam: float,
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(rewards), torch.empty_like(rewards)
