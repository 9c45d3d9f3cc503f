"""`pyrl bench --static`: the GPU kernels without a GPU. No figure here is measured on one.

    python benchmarks/run.py --static [--quick]

What the compilers made of every kernel for sm_90 (registers, stack, shared memory, spills), and
bytes and flops counted against the H100's and the H200's limits (static_counts.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import static_table
from harness import conditions, version_of, write_rows
from static_counts import CHUNK_BYTES, GPUS, Pipeline, row_counts, vector_counts

NAME = "static"
#: The grid's (N, D, V), and N 65,536 once.
HEADS: tuple[tuple[int, int, int], ...] = (
    (8192, 4096, 151936), (8192, 896, 151936), (8192, 2048, 151936), (8192, 3584, 152064),
    (8192, 4096, 128256), (8192, 5120, 152064), (8192, 7168, 129280), (8192, 576, 49152),
    (1937, 3584, 152064), (1388, 4096, 102400), (8191, 2048, 32001), (65536, 4096, 151936),
)  # fmt: skip
#: The odd (N, V) of the grid and SmolLM2's, for the row kernels.
ODD = ((1937, 152064), (1388, 102400), (8191, 32001), (2048, 49152))
KEPT = (1.0, 0.5, 0.2)
TOKENS = 2**22


def run(
    out: Path,
    *,
    quick: bool = False,
    everything: bool = False,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Every row, written to `out`/static.jsonl in place of what it held: the rows of one commit.
    `quick` compiles one kernel of each compiler."""
    rows = list(counted())
    for compile_, what in ((compiled_triton, "Triton"), (compiled_cuda, "CUDA")):
        say(f"static: compiling the {what} kernels for sm_90")
        rows += compile_(quick)
    path = out / f"{NAME}.jsonl"
    path.unlink(missing_ok=True)
    write_rows(path, rows)
    return rows


def base(name: str, kind: str, **fields: Any) -> dict[str, Any]:
    where = conditions("cpu")
    kept = ("torch", "triton", "python", "commit", "date")
    return {
        "op": NAME, "implementation": name, "kind": kind, "package": "pyrl",
        "version": version_of("pyrl"), "measured": False, **{key: where[key] for key in kept},
        **fields,
    }  # fmt: skip


def counted() -> Iterator[dict[str, Any]]:
    """Bytes, flops and floors of the kernels and of the head's pipeline."""
    where = base("", "")
    counts = [
        *(c for dtype in ("bfloat16", "float32") for c in row_counts(8192, 151936, dtype)),
        *(c for n, v in ODD for c in row_counts(n, v, "bfloat16")),
        *vector_counts(TOKENS),
    ]
    for count in counts:
        for gpu in GPUS:
            yield where | {
                "implementation": count.name, "kind": "kernel", "dtype": count.dtype,
                "shape": list(count.shape), "kept_share": 1.0, "device": gpu.name,
                "status": "counted", "least_bytes": count.least, "moved_bytes": count.moved,
                "exponentials": count.exponentials,
                "floor_ms": round(count.floor_ms(gpu), 4),
                "least_ms": round(count.least_ms(gpu), 4),
            }  # fmt: skip
    for n, d, v in HEADS:
        for share in KEPT if (n, d, v) == HEADS[0] else KEPT[:1]:
            pipe = Pipeline(tokens=n, hidden=d, vocab=v, kept=round(n * share))
            for gpu in GPUS:
                yield where | {
                    "implementation": "linear_policy_loss", "kind": "pipeline",
                    "dtype": "bfloat16", "shape": [n, d, v], "kept_share": share,
                    "device": gpu.name, "status": "counted", "flops": pipe.flops,
                    "chunks": pipe.chunks, "chunk_bytes": CHUNK_BYTES,
                    "glue_bytes": pipe.glue_bytes, "sum_bytes": pipe.sum_bytes,
                    "peak_mib": round(pipe.peak_bytes / 2**20),
                    "gemm_ms": round(pipe.gemm_ms(gpu), 3),
                    "floor_ms": round(pipe.floor_ms(gpu), 3),
                    "least_ms": round(pipe.least_ms(gpu), 3),
                }  # fmt: skip


def compiled_triton(quick: bool) -> list[dict[str, Any]]:
    """A row a variant that the launchers choose; one that says why where nothing compiles."""
    common = {"dtype": None, "shape": [], "kept_share": 1.0, "device": "sm_90"}
    if version_of("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        reason = "package triton is not installed"
        if version_of("triton") is not None:
            reason = "TRITON_INTERPRET=1 interprets kernels: there is nothing to compile"
        return [base("triton", "compiled", **common, status="absent", reason=reason)]
    import aot_triton

    rows = []
    where = base("", "compiled", **common)
    for found in aot_triton.compiled((90,), lambda name: not quick or name == "gae"):
        row = where | {
            "implementation": found.name.strip(), "settings": "triton",
            "status": "failed" if found.problems else "ok", "registers": found.used.registers,
            "stack_bytes": found.used.stack, "shared_bytes": found.used.shared,
            # A spill of Triton's is bytes of the stack: its kernels have no arrays of their own.
            "spill_bytes": found.used.stack,
        }  # fmt: skip
        if found.problems:
            row["reason"] = "; ".join(found.problems)
        rows.append(row)
    return rows


def compiled_cuda(quick: bool) -> list[dict[str, Any]]:
    common = {"dtype": None, "shape": [], "kept_share": 1.0, "device": "sm_90a"}
    import aot_cuda

    nvcc = aot_cuda.find("nvcc")
    if nvcc is None:
        reason = "no nvcc (PATH or $CUDA_HOME/bin)"
        return [base("cuda", "compiled", **common, status="absent", reason=reason)]
    rows = []
    where = base("", "compiled", **common)
    sources = [s for s in sorted(aot_cuda.SOURCES.glob("*.cu")) if not quick or s.stem == "gae"]
    for found in aot_cuda.compiled(nvcc, sources, ["90a"]):
        if isinstance(found, str):
            rows.append(where | {"implementation": found.split()[0], "settings": "cuda",
                                 "status": "failed", "reason": found})  # fmt: skip
            continue
        source, name, _, used = found
        spills = used.spill_stores + used.spill_loads
        rows.append(where | {
            "implementation": name, "settings": f"cuda {source}.cu",
            "status": "failed" if spills or used.stack else "ok", "registers": used.registers,
            "stack_bytes": used.stack, "shared_bytes": used.shared, "spill_bytes": spills,
            **({"reason": "uses local memory"} if spills or used.stack else {}),
        })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    static_table.show(rows)
