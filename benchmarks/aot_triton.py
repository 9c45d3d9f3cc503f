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

from pyrl.kernels import gae, group_advantage, logits, objective

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
        options = {k: kwargs.pop(k) for k in ("num_warps", "enable_fp_fusion") if k in kwargs}
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


def objective_variants() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every objective and KL with everything on, and the leanest and a plain call of each."""
    v, keep = torch.empty(1024), torch.ones(1024, dtype=torch.bool)
    for o, name in enumerate(objective.OBJECTIVES):
        for k, kl in enumerate(objective.KLS):
            full = torch.tensor([o, 0.2, 0.28, 3.0, k, 0.04, 0.01], dtype=torch.float64)
            yield (
                f"objective {name} dual {kl} bonus",
                lambda p=full: objective.objective_terms(v, v, v, v, v, v, keep, p),
            )
        plain = torch.tensor([o, 0.2, 0.28, 0.0, 2, 0.0, 0.0], dtype=torch.float64)
        yield (
            f"objective {name} old entropy",
            lambda p=plain: objective.objective_terms(v, v, v, None, v, v, keep, p),
        )
        yield (
            f"objective {name} on-policy",
            lambda p=plain: objective.objective_terms(v, None, None, None, v, v, keep, p),
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


def compile_all(architectures: tuple[int, ...], only: str) -> tuple[list[str], list[str]]:
    """Table rows and problems."""
    rows, problems = [], []
    for variants in (
        logits_variants(),
        objective_variants(),
        group_variants(),
        gae_variants(),
    ):
        for name, call in variants:
            if only not in name:
                continue
            launch = recorded(call)
            cells = []
            for arch in architectures:
                compiled = triton.compile(
                    source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options
                )
                used = resources(compiled.asm["cubin"])
                cells.append(f"{used.registers:4d} {used.stack:5d} {compiled.metadata.shared:6d}")
                if used.stack:
                    problems.append(f"{name} sm_{arch}: {used.stack} bytes of stack")
                # row * V, the only product of two scalars that can pass 2^31.
                wide = re.search(r"arith\.muli .* : i64", compiled.asm["ttir"])
                if "logits" in name and "V=1 " not in name and not wide:
                    problems.append(f"{name} sm_{arch}: row offsets are not 64-bit")
            rows.append(f"{name:44s} | " + " | ".join(cells))
    return rows, problems


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
