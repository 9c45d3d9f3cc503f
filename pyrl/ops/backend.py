"""Which implementation runs: argument `backend=` > `PYRL_BACKEND` > the best one for the device.

An explicit choice never falls back: it raises with the reason. The automatic choice is logged once.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

logger = logging.getLogger("pyrl")

#: One line per backend: its module and the device types it serves, best first.
TABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "triton": ("pyrl.ops.backends.triton", ("cuda",)),
    "cuda": ("pyrl.ops.backends.cuda", ("cuda",)),
    "cpu": ("pyrl.ops.backends.cpu", ("cpu",)),
    "torch": ("pyrl.ops.backends.torch", ("cpu", "cuda", "mps", "xpu")),
}
NAMES = (*TABLE, "reference")


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run here; the message says why."""


class Backend(Protocol):
    """What a backend file supplies. `n` rows of a chunk of raw logits `z[n, V]`; fp32 vectors.

    `spans` int64 [n, 2] with `ids` int64 or int32: the softmax of row i runs over the tokens
    ids[spans[i, 0]:spans[i, 1]] only (none twice, the target among them), and dz is 0 elsewhere.
    `rows` int64 [n]: row i of the vectors is row rows[i] of z [N, V], whose columns are adjacent.
    """

    def unavailable_reason(self) -> str | None:
        """None if usable here, else why not."""
        ...

    def logits_stats(
        self,
        z: Tensor,
        target: Tensor,
        inv_temperature: Tensor,
        logit_scale: float,
        softcap: float,
        spans: Tensor | None = None,
        ids: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """logprob, entropy, lse [n] of softmax(x), x = softcap(z * scale) * inv_temperature."""
        ...

    def logits_grad_(
        self,
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
        """z <- dL/dz for dL/dlogprob = c, dL/dentropy = h, dL/dlse = g, in z's dtype.

        In place; with a `source` [N, V] the raw logits are its rows `rows`, and z [n, V] is only
        written. A row whose c, h and g are 0 becomes 0 and neither it nor its span is read.
        """
        ...

    def has_head_kernels(self, dtype: torch.dtype) -> bool:
        """Whether `head_stats` and `head_grad_` take heads of this dtype; only the CPU's do."""
        ...

    def head_stats(
        self,
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
        """`logits_stats` of z = x [n, D] @ weight.T + bias, rounded to the dtype of x.

        z.T [V, n] is kept for `head_grad_`: rows 0 ... near - 1 in the first columns of dweight
        [V, D] (near is n, or a multiple of 32), the others in far [V, n - near up to a multiple of
        32]; with near 0 and far None it is not kept.
        """
        ...

    def head_grad_(
        self,
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
        """Gradients for dL/dlogprob = c, dL/dentropy = h, dL/dlse = g of what `head_stats` kept.

        dhidden [n, D], of the dtype of x or fp32, is written; dbias fp32 [V] is added to; dweight
        is written by the `first` chunk, which may have logits in it, and added to by the others. In
        bf16, where `first` is not `last`, low uint8 [V, D] holds 8 more bits of its sums.
        """
        ...

    def objectives(self) -> int:
        """How many of `pyrl.ops.spec.OBJECTIVES`, from the first, have their formula here."""
        ...

    def objective_terms(
        self,
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
        """loss (0-d), dloss/dlogprob [T], dloss/dentropy [T], metrics (see ops/objective.py)."""
        ...

    def group_advantage_terms(
        self,
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
        """advantages fp32 [n], keep bool [n], metrics float64 (see ops/group_advantage.py) of
        float64 rewards [n]; group g is order[offsets[g] : offsets[g + 1]]."""
        ...

    def gae_terms(
        self,
        rewards: Tensor,
        values: Tensor,
        keep: Tensor,
        bounds: Tensor,
        bootstrap: Tensor,
        gamma: float,
        lam: float,
    ) -> tuple[Tensor, Tensor]:
        """advantages and returns fp32 [T] (see ops/gae.py)."""
        ...


class OneReadBackend(Backend, Protocol):
    """A backend that also goes from logits to the gradient of a policy loss in one read of them."""

    def logits_policy_grad_(
        self,
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`logits_stats`, `objective_terms` and `logits_grad_`: z <- dloss/dz, for a loss that does
        not couple tokens; logprob, entropy, lse [n].

        `rows`, `source` and z as in `logits_grad_`. A row that is not kept becomes 0, with outputs
        0, and is not read.
        """
        ...

    def logits_scale_(self, z: Tensor, factor: Tensor, rows: Tensor | None = None) -> None:
        """z[rows] *= factor (0-d, fp32), zeros staying 0; nothing is read where the factor is 1."""
        ...


@torch.compiler.assume_constant_result
def reads_once(name: str) -> bool:
    """Whether the backend is a `OneReadBackend`."""
    return name in TABLE and hasattr(load(name), "logits_policy_grad_")


def load(name: str) -> Backend:
    """The backend's module; callers have checked that it is usable."""
    module: ModuleType = importlib.import_module(TABLE[name][0])
    return cast(Backend, module)


@torch.compiler.assume_constant_result
def _reason(name: str) -> str | None:
    # A fact of the machine, so a traced graph may hold its value.
    return load(name).unavailable_reason()


def backends() -> dict[str, str | None]:
    """Every backend's name → None if it is usable here, else the printable reason why not."""
    reasons: dict[str, str | None] = {name: load(name).unavailable_reason() for name in TABLE}
    reasons["reference"] = None
    return reasons


def select(backend: str | None, device: torch.device, *, one_read: bool = False) -> str:
    """The name of the backend that runs on `device`; with `one_read`, of an `OneReadBackend`.

    Raises ValueError for an unknown name or a device the backend does not serve,
    BackendUnavailableError with the reason when it is known but unusable here, and
    NotImplementedError when it was asked for and does not read once.
    """
    choice = backend or os.environ.get("PYRL_BACKEND") or None
    if choice is None:
        return _automatic(device.type, one_read)
    if choice not in NAMES:
        source = "backend" if backend else "PYRL_BACKEND"
        raise ValueError(f"{source}={choice!r}: expected one of {sorted(NAMES)}")
    reason = None if choice == "reference" else _reason(choice)
    if reason is not None:
        raise BackendUnavailableError(f"backend {choice!r} is not usable here: {reason}")
    if one_read and not reads_once(choice):
        raise NotImplementedError(
            f"backend={choice!r} has no gradient_in_forward; 'cpu' and 'cuda' have"
        )
    if choice == "reference":
        return choice
    if device.type not in TABLE[choice][1] and not _interprets(choice, device):
        raise ValueError(
            f"backend={choice!r} serves {' and '.join(TABLE[choice][1])} tensors, "
            f"but the inputs are on {device}"
        )
    return choice


def select_formula(backend: str | None, device: torch.device, op: str) -> str:
    """`select` for an op that is a torch formula under autograd: "torch" or "reference".

    NotImplementedError for another backend that was asked for by name.
    """
    choice = backend or os.environ.get("PYRL_BACKEND") or "torch"
    name = select(choice, device)
    if name not in ("torch", "reference"):
        raise NotImplementedError(f"backend={name!r} has no {op}; 'torch' and 'reference' have")
    return name


def _interprets(name: str, device: torch.device) -> bool:
    # Triton's interpreter runs kernels on CPU tensors: correctness checks without a GPU.
    return name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def _automatic(device_type: str, one_read: bool) -> str:
    # Behind one more call: tracing looks through functools.cache.
    return _best(device_type, one_read)


@functools.cache
def _best(device_type: str, one_read: bool) -> str:
    skipped: list[str] = []
    for name, (_, devices) in TABLE.items():
        if device_type not in devices:
            continue
        reason = load(name).unavailable_reason()
        if reason is None and one_read and not reads_once(name):
            reason = "no gradient_in_forward"
        if reason is None:
            note = f" (not {'; '.join(skipped)})" if skipped else ""
            logger.info("pyrl backend for %s: %s%s", device_type, name, note)
            return name
        skipped.append(f"{name}: {reason}")
    raise BackendUnavailableError(f"no backend serves {device_type} tensors: {'; '.join(skipped)}")


def once_differentiable(name: str) -> None:
    """RuntimeError inside a backward that is itself being differentiated.

    A closed-form gradient has no graph: a second derivative would silently be 0.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name}: no second derivative (create_graph=True); backend='reference' has one"
        )
