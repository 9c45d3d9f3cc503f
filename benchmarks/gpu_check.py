"""What a GPU can show, in under ten minutes: python benchmarks/gpu_check.py [--part NAME]

The parts run in the order of PARTS and each writes its rows to $OUT/gpu_check.jsonl (default:
benchmarks/results/) as it ends. A part that the file already holds for this device and commit is
skipped, so a run that was cut short goes on where it stopped; --again measures it anew. A part is
not begun when its time would run past --minutes. Without a CUDA device it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import HERE, commit, device_name, read_rows, write_rows
from peers import Case
from registry import select
from row_peers import RowCase
from small_peers import SmallCase
from suite import op_named, run_case
from table import show

FILE = "gpu_check.jsonl"
#: Everything but torch.compile, whose compilation would cost half a minute a shape.
USUAL = ("gemm", "naive", "liger", "liger-batch", "trl", "pyrl-torch", "pyrl-triton", "pyrl-cuda")
#: Where [N, V] of the others no longer fits or takes too long.
LEAN = ("gemm", "liger-batch", "pyrl-triton", "pyrl-cuda")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One case of the grid, and about how many seconds it takes on an H100."""

    name: str
    op: str
    case: Any
    seconds: float
    rounds: int = 7
    names: tuple[str, ...] | None = None


def _loss(n: int, d: int, v: int, kept: float = 1.0, **options: Any) -> Part:
    dtype = options.pop("dtype", "bfloat16")
    case = Case(tokens=n, hidden=d, vocab=v, dtype=dtype, kept_share=kept, device="cuda")
    tail = ("" if kept == 1 else f"-kept{kept:.0%}") + ("" if dtype == "bfloat16" else f"-{dtype}")
    defaults = {"seconds": 25.0, "names": USUAL, "name": f"loss-{n}x{d}x{v}{tail}"}
    return Part(op="linear_policy_loss", case=case, **{**defaults, **options})


def _small(op: str) -> Part:
    return Part(
        name=op, op=op, case=SmallCase(op=op, tokens=2**22, device="cuda"), seconds=40, rounds=15
    )


def _rows(op: str, dtype: str = "bfloat16") -> Part:
    case = RowCase(op=op, tokens=4096, vocab=151936, dtype=dtype)
    return Part(name=f"{op}-{dtype}", op=op, case=case, seconds=15, rounds=15)


#: The headline first, then what says most per second.
PARTS: tuple[Part, ...] = (
    _loss(8192, 4096, 151936, seconds=60, names=None),
    _loss(8192, 4096, 151936, 0.5),
    _rows("logits_stats"),
    _rows("logits_grad"),
    _small("policy_objective"),
    _small("group_advantage"),
    _loss(2048, 576, 49152),
    _loss(8192, 2048, 151936),
    _loss(8192, 896, 151936),
    _loss(1937, 3584, 152064),
    _loss(8191, 2048, 32001),
    _loss(1388, 4096, 102400),
    _loss(65536, 2048, 151936, names=LEAN, rounds=3, seconds=40),
    _loss(8192, 4096, 151936, 0.2),
    _loss(8192, 7168, 129280),
    _loss(8192, 5120, 152064),
    _loss(8192, 4096, 128256),
    _loss(8192, 3584, 152064),
    _loss(2048, 576, 49152, dtype="float32"),
    _rows("logits_stats", "float32"),
    _rows("logits_grad", "float32"),
)


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
    """`kernels` and `host_waits` for this package's rows of a [T]-sized op."""
    inputs = op_named(part.op).draw(part.case, 0)
    for impl in select(part.op, device="cuda", dtype=part.case.dtype):
        row = next(r for r in rows if r["implementation"] == impl.name)
        if row["status"] == "ok":
            call = impl.make(part.case)
            row.update(launches(lambda call=call: call(inputs)))
            inputs.clear()


def held(path: Path, part: Part) -> bool:
    """The file has this part's rows for this device and commit."""
    return any(
        row["op"] == part.op
        and row["shape"] == part.case.shape
        and (row["dtype"], row["kept_share"]) == (part.case.dtype, part.case.kept_share)
        and row["device"] == device_name("cuda")
        and row["commit"] == commit() != "unknown"
        for row in read_rows(path)
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=[p.name for p in PARTS], metavar="NAME",
                        help="only these: " + " ".join(p.name for p in PARTS))  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts together")
    parser.add_argument("--again", action="store_true", help="measure parts the file already holds")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu_check needs a CUDA device: torch.cuda.is_available() is False "
            f"(torch {torch.__version__}); the CPU benchmarks are `python benchmarks/run.py`",
            file=sys.stderr,
        )
        return 2
    out = Path(os.environ.get("OUT") or HERE / "results") / FILE
    began, left = time.perf_counter(), []
    for part in PARTS:
        if (args.part and part.name not in args.part) or (not args.again and held(out, part)):
            continue
        spent = time.perf_counter() - began
        if spent + part.seconds > args.minutes * 60:
            left.append(part.name)
            continue
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        rows = run_case(
            op_named(part.op), part.case, rounds=part.rounds, names=part.names,
            inner=1 if part.op == "linear_policy_loss" else 5, say=lambda text: None,
        )  # fmt: skip
        if isinstance(part.case, SmallCase):
            add_launches(part, rows)
        for row in rows:
            row["part"] = part.name
        write_rows(out, rows)
        show(rows)
        print(f"{part.name}: {time.perf_counter() - began - spent:.0f} s", flush=True)
    if left:
        print(f"not begun for lack of time (run again, or --part NAME): {' '.join(left)}")
    print(f"rows in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
