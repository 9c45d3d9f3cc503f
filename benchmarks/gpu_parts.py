"""The parts of `make gpu-check`, the headline first, and the process that runs them one by one.

python benchmarks/gpu_parts.py RESULTS.jsonl UNTIL NAME ... [--without NAME:IMPLEMENTATION ...]

Tells gpu_check.py what it does on standard output, a line each: `@begin NAME`, `@at NAME
IMPLEMENTATION`, `@end NAME`, `@failed NAME reason`, `@broke NAME reason` (a CUDA error, after which
this process is of no use), `@skip NAME` (its budget would pass UNTIL, seconds since 1970).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import HERE, write_rows
from logits_peers import LogitsCase
from peers import Case
from registry import select
from row_peers import RowCase
from small_peers import SmallCase
from suite import CANNOT, BrokenDeviceError, op_named, run_case
from table import show

#: Everything but what compiles or autotunes, which would cost half a minute a shape.
USUAL = ("gemm", "naive", "liger-batch", "liger-ce", "liger-triton", "trl", "trl-logits", "cce",
         "verl-triton", "quack", "pyrl-torch", "pyrl-triton", "pyrl-cuda")  # fmt: skip
#: Where [N, V] of the others no longer fits or takes too long.
LEAN = ("gemm", "liger-batch", "pyrl-triton", "pyrl-cuda")
#: A part may take this many times its budget before it is ended.
PATIENCE = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Tests, one case of the grid, or one sweep, and about how many seconds it takes on an H100."""

    name: str
    kind: str
    """`tests`, `grid` or `sweep`."""
    seconds: float
    op: str = ""
    case: Any = None
    rounds: int = 7
    names: tuple[str, ...] | None = None
    paths: tuple[str, ...] = ()


def _loss(n: int, d: int, v: int, kept: float = 1.0, **options: Any) -> Part:
    dtype = options.pop("dtype", "bfloat16")
    case = Case(tokens=n, hidden=d, vocab=v, dtype=dtype, kept_share=kept, device="cuda")
    tail = ("" if kept == 1 else f"-kept{kept:.0%}") + ("" if dtype == "bfloat16" else f"-{dtype}")
    defaults = {"seconds": 25.0, "names": USUAL, "name": f"loss-{n}x{d}x{v}{tail}"}
    return Part(kind="grid", op="linear_policy_loss", case=case, **{**defaults, **options})


def _small(op: str) -> Part:
    case = SmallCase(op=op, tokens=2**22, device="cuda")
    return Part(kind="grid", name=op, op=op, case=case, seconds=40, rounds=15)


def _rows(op: str, dtype: str = "bfloat16") -> Part:
    case = RowCase(op=op, tokens=4096, vocab=151936, dtype=dtype)
    return Part(kind="grid", name=f"{op}-{dtype}", op=op, case=case, seconds=15, rounds=15)


def _logits(dtype: str) -> Part:
    op = "logits_policy_loss"
    case = LogitsCase(tokens=4096, vocab=151936, dtype=dtype, device="cuda")
    return Part(kind="grid", name=f"{op}-{dtype}", op=op, case=case, seconds=30, rounds=9)


def _tests(name: str, seconds: float, *paths: str) -> Part:
    return Part(kind="tests", name=f"tests-{name}", seconds=seconds, paths=paths)


def _sweep(name: str, seconds: float) -> Part:
    return Part(kind="sweep", name=f"sweep-{name}", seconds=seconds)


#: Right before fast, then the headline, then what says most per second.
PARTS: tuple[Part, ...] = (
    _tests("kernels", 60, "tests/kernels"),
    _tests("losses", 60, "tests/losses"),
    _loss(8192, 4096, 151936, seconds=60, names=None),
    _loss(8192, 4096, 151936, 0.5),
    _logits("bfloat16"),
    _rows("logits_stats"),
    _rows("logits_grad"),
    _sweep("chunk", 40),
    _small("policy_objective"),
    _small("group_advantage"),
    _sweep("stats_tile", 25),
    _sweep("grad_tile", 25),
    _loss(2048, 576, 49152),
    _loss(8192, 2048, 151936),
    _tests("ops", 90, "tests/ops", "tests/packing"),
    _loss(8192, 896, 151936),
    _loss(1937, 3584, 152064),
    _loss(8191, 2048, 32001),
    _loss(1388, 4096, 102400),
    _loss(65536, 2048, 151936, names=LEAN, rounds=3, seconds=40),
    _loss(8192, 4096, 151936, 0.2),
    _sweep("objective", 20),
    _loss(8192, 7168, 129280),
    _loss(8192, 5120, 152064),
    _loss(8192, 4096, 128256),
    _loss(8192, 3584, 152064),
    _loss(2048, 576, 49152, dtype="float32"),
    _logits("float32"),
    _rows("logits_stats", "float32"),
    _rows("logits_grad", "float32"),
)


def run_part(part: Part, results: Path, without: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The part's rows; RuntimeError where tests fail."""
    if part.kind == "tests":
        run_tests(part, results.parent)
        return []
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    if part.kind == "sweep":
        import gpu_sweeps

        return gpu_sweeps.run(part.name.removeprefix("sweep-"))

    def say(text: str) -> None:
        _, found, implementation = text.partition("checking ")
        if found:
            print(f"@at {part.name} {implementation}", flush=True)

    # One call a timing: a second one would add to the gradients of the first.
    rows = run_case(
        op_named(part.op), part.case, rounds=part.rounds, names=part.names, slow=8, say=say,
        without=without,
    )  # fmt: skip
    if isinstance(part.case, SmallCase):
        add_launches(part, rows)
    return rows


def run_tests(part: Part, folder: Path) -> None:
    """pytest in a process of its own: its log beside the results."""
    command = [
        sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
        "-m", "not slow and not vllm", *part.paths,
    ]  # fmt: skip
    if importlib.util.find_spec("xdist") is not None:  # most of it is compiling, on the host
        command += ["-n", "4"]
    with (folder / f"{part.name}.log").open("w") as log:
        done = subprocess.run(command, cwd=HERE.parent, stdout=log, stderr=subprocess.STDOUT)
    lines = (folder / f"{part.name}.log").read_text(errors="replace").strip().splitlines()
    if done.returncode != 0:
        raise RuntimeError(f"pytest exited with {done.returncode}: {lines[-1] if lines else ''}")
    print(lines[-1])


def launches(call: Callable[[], Any]) -> dict[str, Any]:
    """Kernels one call launches, and whether it makes the host wait for the device."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        waits = None
    except RuntimeError as error:
        waits = str(error).splitlines()[0][:160]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        torch.cuda.synchronize()
    kernels = [
        event for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]  # fmt: skip
    return {"kernels": len(kernels), "host_waits": waits}


def add_launches(part: Part, rows: list[dict[str, Any]]) -> None:
    """`kernels` and `host_waits` for the implementations of a [T]-sized op."""
    inputs = op_named(part.op).draw(part.case, 0)
    for impl in select(part.op, device="cuda", dtype=part.case.dtype):
        row = next((r for r in rows if r["implementation"] == impl.name), None)
        if row is not None and row["status"] == "ok":
            call = impl.make(part.case)
            inputs.clear()
            try:
                row.update(launches(lambda call=call: call(inputs)))
            except RuntimeError as error:  # the times stand without it
                row["host_waits"] = f"not counted: {error}".splitlines()[0][:160]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("until", type=float)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--without", nargs="+", default=[])
    args = parser.parse_args(arguments)
    by_name = {part.name: part for part in PARTS}
    for name in args.names:
        part = by_name[name]
        if time.time() + part.seconds > args.until:
            print(f"@skip {name}", flush=True)
            continue
        print(f"@begin {name}", flush=True)
        without = [w.removeprefix(f"{name}:") for w in args.without if w.startswith(f"{name}:")]
        try:
            rows = run_part(part, args.results, without)
        except BrokenDeviceError as error:
            print(f"@at {name} {error.implementation}", flush=True)
            print(f"@broke {name} {error}", flush=True)
            return 1
        # What a part may raise: its own checks, the CUDA runtime, a missing module of a sweep.
        except CANNOT as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            broke = "CUDA error" in str(error)
            print(f"{'@broke' if broke else '@failed'} {name} {reason}", flush=True)
            if broke:
                return 1
            continue
        write_rows(args.results, [{**row, "part": name} for row in rows])
        if rows:
            show(rows)
        print(f"@end {name}", flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:]))
