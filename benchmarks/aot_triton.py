"""Compile every Triton kernel for GPUs that need not be there, and read what the compiler made.

    python -m benchmarks.aot_triton [--arch 90] [--kernel objective]

The launchers themselves choose the variants: each is called on small CPU tensors with the launch
recorded instead of run, so block sizes, warps and constexprs are those of kernels/tuning.py. Prints
kernel x architecture with registers a thread, stack bytes (spills) and shared memory, from the
cubin. Exits 1 if a compilation fails, a kernel spills, or row offsets are not 64-bit.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pyrl.kernels import gae, group_advantage, logits, objective, support
from pyrl.ops.spec import LossSpec

ARCHITECTURES = (80, 90, 100)
POINTER_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


class Resources(NamedTuple):
    registers: int
    stack: int
    shared: int


def recorded(call: Callable[[], Any]) -> Launch:
    """The kernel launch that `call` would make, without running it."""
    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        known = ("num_warps", "maxnreg", "enable_fp_fusion")
        options = {k: kwargs.pop(k) for k in known if k in kwargs}
        bound = inspect.signature(self.fn).bind(*args, **kwargs)
        launches.append(Launch(self, dict(bound.arguments), options))

    original = JITFunction.run
    JITFunction.run = record
    try:
        call()
    finally:
        JITFunction.run = original
    (launch,) = launches  # every launcher makes exactly one
    return launch


def source(launch: Launch) -> ASTSource:
    """What the just-in-time compiler would compile for this launch, alignment included."""
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        # The just-in-time compiler compiles None and the integer 1 in.
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constexprs[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTER_TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = parameter.annotation_type
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constexprs, attributes)


def logits_variants() -> Iterator[tuple[str, Callable[[], Any]]]:
    """dtype x softcap, for a vocabulary of aligned and of odd size, a small one, and 1."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for softcap in (0.0, 30.0):
            for V in (32000, 32001, 1024, 1):
                z = torch.empty(2, V, dtype=dtype)
                target, row = torch.zeros(2, dtype=torch.int64), torch.empty(2)
                kind = f"{str(dtype)[6:]} V={V} " + ("softcap " if softcap else "")
                yield (
                    f"logits_stats {kind}",
                    lambda z=z, t=target, r=row, s=softcap: logits.logits_stats(z, t, r, 1.0, s),
                )
                for g, name in ((None, ""), (row, "lse-grad")):
                    yield (
                        f"logits_grad_ {kind}{name}",
                        lambda z=z, t=target, r=row, s=softcap, g=g: logits.logits_grad_(
                            z, t, r, 1.0, s, r, r, r, r, g
                        ),
                    )


def row_variants() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Rows that lie anywhere and their gradient elsewhere; supports of either integer type."""
    target, row = torch.zeros(2, dtype=torch.int64), torch.empty(2)
    spans = torch.zeros(2, 2, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for V in (32000, 32001):
            z = torch.empty(2, V, dtype=dtype)
            head, grad = (target, row, 1.0, 30.0), (row, row, row, row, row)
            kind = f"{str(dtype)[6:]} V={V} "
            yield (
                f"logits_stats {kind}rows",
                lambda z=z, head=head: logits.logits_stats(z, *head, target),
            )
            yield (
                f"logits_grad_ {kind}rows",
                lambda z=z, head=head, g=grad: logits.logits_grad_(z, *head, *g, target),
            )
            yield (
                f"logits_grad_ {kind}rows source",
                lambda z=z, head=head, g=grad: logits.logits_grad_(z, *head, *g, target, z),
            )
            for ids in (torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)):
                csr = (spans, ids)
                name = f"{kind}{str(ids.dtype)[6:]} "
                yield (
                    f"support_stats {name}",
                    lambda z=z, head=head, csr=csr: support.support_stats(z, *head, *csr),
                )
                yield (
                    f"support_grad_ {name}",
                    lambda z=z, head=head, g=grad, csr=csr: support.support_grad_(
                        z, *head, *g, *csr
                    ),
                )
            yield (
                f"support_stats {kind}rows",
                lambda z=z, head=head, csr=csr: support.support_stats(z, *head, *csr, target),
            )
            yield (
                f"support_grad_ {kind}rows source",
                lambda z=z, head=head, g=grad, csr=csr: support.support_grad_(
                    z, *head, *g, *csr, target, z
                ),
            )


def objective_variants() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every policy term with every option that needs registers, token by token and by sequence; the
    plain calls; every KL and correction."""
    v, keep = torch.empty(1024), torch.ones(1024, dtype=torch.bool)
    bounds = torch.zeros(9, dtype=torch.int64)

    def variant(name: str, full: bool, **options: Any) -> tuple[str, Callable[[], Any]]:
        spec = LossSpec(**options)
        b = bounds if spec.couples_tokens else None
        path = "token" if b is None else "sequence"
        old, ref, rollout = v, v if spec.needs_ref or full else None, v if full else None
        return f"objective {path:8s} {name}", lambda: objective.objective_terms(
            v, v, old, ref, rollout, v, v, keep, b, spec.params()
        )

    clips = {"objective": "clip", "dual_clip": 3.0, "delta": 4.0}
    kl = {"kl_coef": 0.04, "kl_ratio_weighted": True, "kl_clamp": 10.0}
    full = {**kl, "entropy_coef": 0.01, "correction": "mis"}
    shared = {**full, "correction_level": "geometric", "off_policy_threshold": 0.1}
    terms: dict[str, dict[str, Any]] = {
        "reinforce": {"objective": "reinforce"},
        "clip dual delta": clips,
        "cispo": {"objective": "cispo"},
        "sapo": {"objective": "sapo"},
        "dppo tv": {"objective": "dppo"},
        "dppo kl": {"objective": "dppo", "dppo_divergence": "kl"},
    }
    for name, term in terms.items():
        yield variant(name, False, **term)
        yield variant(f"{name} full", True, **term, **full)
        level = "token" if "dppo" in name else "sequence"
        yield variant(f"{name} {level} full", True, ratio_level=level, **term, **shared)
    yield variant("clip sequence", False, ratio_level="sequence")
    yield variant("clip sequence_token full", True, ratio_level="sequence_token", **clips, **shared)
    for name in ("gmpo", "vespo"):
        level = {"correction_level": "token"} if name == "vespo" else {}
        yield variant(name, False, objective=name)
        yield variant(f"{name} full", True, objective=name, **{**shared, **level})
    for name in ("k1", "k2", "k3", "abs", "k3_st"):
        yield variant(f"clip {name}", False, kl=name, **kl)
    for name in ("tis", "icepop"):
        yield variant(f"clip {name}", True, correction=name)
    plain = LossSpec().params()
    yield (
        "objective token    clip on-policy",
        lambda: objective.objective_terms(v, None, None, None, None, v, v, keep, None, plain),
    )


def group_variants() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every method with ids, and with offsets, every filter and the population std."""
    n = 64
    rewards, order = torch.empty(n, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    for method, name in enumerate(group_advantage.METHODS):
        for index, rest in (
            (order, (True, 1e-6, 0, False, 0.0, 1.0)),
            (None, (False, 1e-6, 7, True, -1.0, 2.0)),
        ):
            yield (
                f"group_advantage {name}" + ("" if index is not None else " offsets filters"),
                lambda i=index, m=method, r=rest: group_advantage.group_advantage_terms(
                    rewards, i, offsets, m, *r
                ),
            )


def gae_variants() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The one variant of gae."""
    v, keep = torch.empty(64), torch.ones(64, dtype=torch.bool)
    bounds = torch.zeros(9, dtype=torch.int64)
    yield "gae", lambda: gae.gae_terms(v, v, keep, bounds, v[:8], 1.0, 0.95)


def resources(cubin: bytes) -> Resources:
    """Registers, stack and shared bytes, as the cubin states them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", text))
    return Resources(int(fields["REG"]), int(fields["STACK"]), int(fields["SHARED"]))


class Compiled(NamedTuple):
    name: str
    arch: int
    used: Resources
    problems: list[str]


def compiled(architectures: tuple[int, ...], wanted: Callable[[str], bool]) -> Iterator[Compiled]:
    """Every variant whose name is wanted, for each architecture in turn."""
    for variants in (
        logits_variants(),
        row_variants(),
        objective_variants(),
        group_variants(),
        gae_variants(),
    ):
        for name, call in variants:
            if not wanted(name):
                continue
            launch = recorded(call)
            for arch in architectures:
                made = triton.compile(
                    source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options
                )
                used = resources(made.asm["cubin"])._replace(shared=made.metadata.shared)
                problems = []
                if used.stack:
                    problems.append(f"{name} sm_{arch}: {used.stack} bytes of stack")
                # row * stride, the only product of two scalars that can pass 2^31.
                wide = re.search(r"arith\.muli .* : i64", made.asm["ttir"])
                if "V=" in name and "V=1 " not in name and not wide:
                    problems.append(f"{name} sm_{arch}: row offsets are not 64-bit")
                yield Compiled(name, arch, used, problems)


def compile_all(architectures: tuple[int, ...], only: str) -> tuple[list[str], list[str]]:
    """Table rows and problems."""
    cells: dict[str, list[str]] = {}
    problems = []
    for found in compiled(architectures, lambda name: only in name):
        used = found.used
        text = f"{used.registers:4d} {used.stack:5d} {used.shared:6d}"
        cells.setdefault(found.name, []).append(text)
        problems += found.problems
    return [f"{name:44s} | " + " | ".join(each) for name, each in cells.items()], problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--kernel", default="", help="only variants whose name contains this")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 interprets kernels: there is nothing to compile")
        return 2
    rows, problems = compile_all(tuple(options.arch), options.kernel)
    print(f"triton {triton.__version__}; registers, stack bytes, shared bytes")
    print(f"{'kernel':44s} | " + " | ".join(f"sm_{a:<14d}" for a in options.arch))
    print("\n".join(rows))
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
