"""One row per op and implementation: where it comes from, when it can run, how it is called.

An implementation never imports its library until asked, so a missing peer is a row that says why.
To add one: write `make(case) -> call(inputs)` (library_peers.py for the head) and append an
`Implementation` here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import library_peers as libraries
import logits_peers
import peers
import row_peers
import small_peers
from harness import known_or_raise, version_of


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
    compiled: bool = False
    """torch.compile for one shape: the first call of each shape compiles."""
    rounds_logprob: bool = False
    """Its log-probs come in the inputs' dtype: in bf16 a ratio is then off by 2^-9 of |log-prob|,
    which is what it computes and not a mistake of its own (`suite.GATE_ROUNDED`)."""
    note: str = ""

    @property
    def version(self) -> str | None:
        return version_of(self.package)

    def cannot(self, device: str, dtype: str) -> str | None:
        """Why it has no figure on this device in this dtype, before anything is tried."""
        if device not in self.devices:
            return "needs a CUDA device" if device == "cpu" else f"does not run on {device}"
        if dtype not in self.dtypes:
            return f"takes {' or '.join(self.dtypes)}, not {dtype}"
        return None


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
_LOGITS = "logits_policy_loss"
_BOTH = ("float32", "bfloat16")
_F32 = ("float32",)
_HALF = ("bfloat16",)
_CUDA = ("cuda",)


def _loss(name: str, make: Callable[[Any], Any], package: str = "torch", **options: Any) -> Any:
    return Implementation(op=_LOSS, name=name, make=make, package=package, **options)


def _logits(name: str, make: Callable[[Any], Any], package: str = "torch", **options: Any) -> Any:
    return Implementation(op=_LOGITS, name=name, make=make, package=package, **options)


_through = libraries.from_logprob

REGISTRY: tuple[Implementation, ...] = (
    _loss("gemm", peers.make_gemm, role="limit",
          note="the three matrix products alone, 6NDV, outputs preallocated"),
    _loss("naive", peers.make_naive, note="logits.float(), cross_entropy, autograd"),
    _loss("torch.compile", peers.make_compiled, compiled=True,
          note="torch.compile of naive, fullgraph, static shapes"),
    _loss("torch-lce", _through(libraries.prepare_torch), rounds_logprob=True,
          note="torch.nn.functional.linear_cross_entropy, chunked (LinearCrossEntropyOptions())"),
    _loss("liger", libraries.make_liger(1), "liger-kernel", compiled=True,
          note="LigerFusedLinearGRPOLoss, compiled, chunk_size 1 (its default)"),
    _loss("liger-batch", libraries.make_liger(None), "liger-kernel", compiled=True,
          note="LigerFusedLinearGRPOLoss, compiled, chunk_size = the whole batch"),
    _loss("liger-ce", _through(libraries.prepare_liger_ce), "liger-kernel",
          note="LigerFusedLinearScaledCrossEntropy: CuTe on Hopper, chunked torch elsewhere"),
    _loss("liger-triton", libraries.make_liger_triton, "liger-kernel", devices=_CUDA,
          note="logits by torch, triton_grpo_loss, gradient in their memory"),
    _loss("trl", libraries.make_trl, "trl",
          note="ChunkedLogProbFunction as its trainers call it, clip loss in torch"),
    _loss("trl-logits", _through(libraries.prepare_trl_logits), "trl", rounds_logprob=True,
          note="GRPOTrainer without the fused head: logits, selective_log_softmax_and_entropy"),
    _loss("cce", _through(libraries.cce_preparer("cce")), "cut-cross-entropy", devices=_CUDA,
          dtypes=_HALF, note="cut-cross-entropy's Triton kernels, no gradient filter"),
    _loss("cce-compile", _through(libraries.cce_preparer("torch_compile")), "cut-cross-entropy",
          compiled=True, note="cut-cross-entropy's torch_compile implementation: kept rows only"),
    _loss("verl", _through(libraries.prepare_verl), "verl",
          note="FusedLinearForPPO, torch, chunks of 512 rows"),
    _loss("verl-triton", _through(libraries.prepare_verl_triton), "verl", devices=_CUDA,
          note="verl.utils.kernel.linear_cross_entropy"),
    _loss("quack", _through(libraries.prepare_quack), "quack-kernels", devices=_CUDA, dtypes=_HALF,
          note="linear_cross_entropy_func, reduction none, in-place backward"),
    *_pyrl(_LOSS, peers, dtypes=_BOTH),
    _logits("copy", logits_peers.make_copy, role="limit", note="a copy of the logits"),
    _logits("naive", logits_peers.make_naive, note="logits.float(), cross_entropy, autograd"),
    _logits("torch.compile", logits_peers.make_compiled, compiled=True,
            note="torch.compile of naive"),
    _logits("trl", logits_peers.maker(logits_peers.prepare_trl), "trl", rounds_logprob=True,
            note="selective_log_softmax_and_entropy, clip loss in torch"),
    _logits("quack", logits_peers.maker(logits_peers.prepare_quack), "quack-kernels",
            devices=_CUDA, note="quack.cross_entropy, in-place backward"),
    *_pyrl(_LOGITS, logits_peers, dtypes=_BOTH),
    *(
        Implementation(op=_LOGITS, name=f"pyrl-{backend}-inplace", package="pyrl", role="pyrl",
                       make=logits_peers.pyrl_maker(_LOGITS, backend, inplace=True),
                       backend=backend, devices=devices, note="the gradient in their memory")
        for backend, devices in (("cpu", ("cpu",)), ("triton", _CUDA), ("cuda", _CUDA))
    ),
    *(
        row
        for op in ("policy_objective", "group_advantage")
        for row in (
            Implementation(op=op, name="copy", make=small_peers.make_copy, role="limit",
                           dtypes=_F32, note="one copy of the op's inputs"),
            Implementation(op=op, name="naive", make=small_peers.make_naive(op), dtypes=_F32,
                           note="plain torch, autograd"),
            Implementation(op=op, name="torch.compile", make=small_peers.make_compiled(op),
                           dtypes=_F32, compiled=True, note="torch.compile of naive"),
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


def known_names(op: str) -> list[str]:
    """Of every row of `op`, whatever device it needs."""
    return [row.name for row in REGISTRY if row.op == op]


def select(
    op: str, *, device: str, dtype: str, names: tuple[str, ...] | None = None
) -> list[Implementation]:
    """The rows of `op` that exist for this device and dtype, in the table's order."""
    rows = [r for r in REGISTRY if r.op == op and r.cannot(device, dtype) is None]
    if names is not None:
        known_or_raise(op, names, known_names(op))
        rows = [r for r in rows if r.name in names]
    return rows


def elsewhere(op: str, *, device: str, dtype: str) -> list[tuple[Implementation, str]]:
    """The other rows of `op`, each with the reason why it has no figure here."""
    rows = [(r, r.cannot(device, dtype)) for r in REGISTRY if r.op == op]
    return [(row, reason) for row, reason in rows if reason is not None]


def find(op: str, name: str) -> Implementation:
    for row in REGISTRY:
        if (row.op, row.name) == (op, name):
            return row
    raise ValueError(f"no implementation {name!r} of {op!r}")
