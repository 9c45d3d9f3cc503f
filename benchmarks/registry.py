"""One row per op and implementation: where it comes from, when it can run, how it is called.

An implementation never imports its library until asked, so a missing peer is a row that says why.
To add one: write `make(case) -> call(inputs)` in peers.py and append an `Implementation` here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import peers
import row_peers
import small_peers
from harness import version_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute an op."""

    op: str
    name: str
    make: Callable[[Any], Callable[[Any], Any]]
    """make(case) -> call(inputs): raises ImportError, NotImplementedError or RuntimeError with the
    reason when this implementation cannot do the case."""
    package: str = "torch"
    backend: str | None = None
    role: str = "peer"
    """`limit` (what the ratios are against), `peer`, or `pyrl`."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    note: str = ""

    @property
    def version(self) -> str | None:
        return version_of(self.package)


def _pyrl(op: str, module: Any, *, dtypes: tuple[str, ...]) -> list[Implementation]:
    devices = {"torch": ("cpu", "cuda"), "cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",)}
    return [
        Implementation(
            op=op,
            name=f"pyrl-{backend}",
            make=module.pyrl_maker(op, backend),
            package="pyrl",
            backend=backend,
            role="pyrl",
            devices=where,
            dtypes=dtypes,
        )
        for backend, where in devices.items()
    ]


_LOSS = "linear_policy_loss"
_BOTH = ("float32", "bfloat16")
_F32 = ("float32",)

REGISTRY: tuple[Implementation, ...] = (
    Implementation(op=_LOSS, name="gemm", make=peers.make_gemm, role="limit",
                   note="the three matrix products alone, 6NDV, outputs preallocated"),
    Implementation(op=_LOSS, name="naive", make=peers.make_naive,
                   note="logits.float(), cross_entropy, autograd"),
    Implementation(op=_LOSS, name="torch.compile", make=peers.make_compiled,
                   note="torch.compile of naive, fullgraph, static shapes"),
    Implementation(op=_LOSS, name="liger", make=peers.make_liger(1), package="liger-kernel",
                   note="LigerFusedLinearGRPOLoss, compiled, chunk_size 1 (its default)"),
    Implementation(op=_LOSS, name="liger-batch", make=peers.make_liger(None),
                   package="liger-kernel",
                   note="LigerFusedLinearGRPOLoss, compiled, chunk_size = the whole batch"),
    Implementation(op=_LOSS, name="trl", make=peers.make_trl, package="trl",
                   note="ChunkedLogProbFunction as its trainers call it, clip loss in torch"),
    *_pyrl(_LOSS, peers, dtypes=_BOTH),
    *(
        row
        for op in ("policy_objective", "group_advantage")
        for row in (
            Implementation(op=op, name="copy", make=small_peers.make_copy, role="limit",
                           dtypes=_F32, note="one copy of the op's inputs"),
            Implementation(op=op, name="naive", make=small_peers.make_naive(op), dtypes=_F32,
                           note="plain torch, autograd"),
            Implementation(op=op, name="torch.compile", make=small_peers.make_compiled(op),
                           dtypes=_F32, note="torch.compile of naive"),
            *_pyrl(op, small_peers, dtypes=_F32),
        )
    ),
    *(
        row
        for op in row_peers.OPS
        for row in (
            Implementation(op=op, name="copy", make=row_peers.make_copy, role="limit", dtypes=_BOTH,
                           note="a copy that moves the op's bytes"),
            *_pyrl(op, row_peers, dtypes=_BOTH),
        )
    ),
)  # fmt: skip


def select(
    op: str, *, device: str, dtype: str, names: tuple[str, ...] | None = None
) -> list[Implementation]:
    """The rows of `op` that exist for this device and dtype, in the table's order."""
    rows = [r for r in REGISTRY if r.op == op and device in r.devices and dtype in r.dtypes]
    if names is not None:
        known = {r.name for r in REGISTRY if r.op == op}
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{op} has no implementation {name!r}: expected one of {sorted(known)}"
                )
        rows = [r for r in rows if r.name in names]
    return rows


def find(op: str, name: str) -> Implementation:
    for row in REGISTRY:
        if (row.op, row.name) == (op, name):
            return row
    raise ValueError(f"no implementation {name!r} of {op!r}")
