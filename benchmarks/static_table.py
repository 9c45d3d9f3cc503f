"""Tables of the static rows: floors by kernel, the head's pipeline, what the compilers made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from table import markdown_cells, number, print_cells

Row = dict[str, Any]
NOTE = (
    "**No figure of this section was measured on a GPU.** Bytes and flops are counted from what "
    "each kernel reads and writes; floors divide them by the vendors' figures (H100 SXM 3.35 TB/s, "
    "H200 4.8 TB/s, both 989 TFLOP/s of dense bf16), which no run reaches fully."
)
KERNEL_COLUMNS = (
    "kernel", "shape", "dtype", "least MB", "moved MB", "moved / least", "H100 ms, at least",
    "H200 ms, at least",
)  # fmt: skip
PIPELINE_COLUMNS = (
    "N D V", "kept", "chunks", "TFLOP", "GEMMs ms", "glue GB", "dW sums GB", "as written ms",
    "with one glue pass and dW summed in the GEMM", "on an H200 ms", "peak GiB",
)  # fmt: skip
COMPILED_COLUMNS = ("kernel", "from", "registers", "stack B", "shared B", "spilled B")


def by_gpu(rows: Sequence[Row], kind: str) -> list[tuple[Row, Row]]:
    """(H100's row, H200's row) of each count."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for r in rows:
        if r["kind"] == kind:
            key = (r["implementation"], tuple(r["shape"]), r["dtype"], r["kept_share"])
            found.setdefault(key, {})[r["device"]] = r
    return [(each["H100 SXM"], each["H200"]) for each in found.values()]


def kernel_cells(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [
            a["implementation"], " ".join(map(str, a["shape"])), a["dtype"],
            f"{a['least_bytes'] / 1e6:.1f}", f"{a['moved_bytes'] / 1e6:.1f}",
            f"{a['moved_bytes'] / a['least_bytes']:.2f}", number(a["floor_ms"]),
            number(b["floor_ms"]),
        ]
        for a, b in by_gpu(rows, "kernel")
    ]  # fmt: skip


def pipeline_cells(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [
            " ".join(map(str, a["shape"])), f"{a['kept_share']:.0%}", str(a["chunks"]),
            f"{a['flops'] / 1e12:.2f}", number(a["gemm_ms"]), f"{a['glue_bytes'] / 1e9:.1f}",
            f"{a['sum_bytes'] / 1e9:.1f}", number(a["floor_ms"]), number(a["least_ms"]),
            number(b["floor_ms"]), f"{a['peak_mib'] / 1024:.2f}",
        ]
        for a, b in by_gpu(rows, "pipeline")
    ]  # fmt: skip


def compiled_cells(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for r in rows:
        if r["kind"] != "compiled":
            continue
        head = [r["implementation"], r.get("settings", "–")]
        if "registers" not in r:
            lines.append([*head, f"{r['status']}: {r['reason']}", "", "", ""])
            continue
        keys = ("registers", "stack_bytes", "shared_bytes", "spill_bytes")
        lines.append([*head, *(str(r[key]) for key in keys)])
    return lines


def families(rows: Sequence[Row]) -> list[list[str]]:
    """Compiled variants of a Triton kernel in one line: the range of each figure."""
    lines: list[list[str]] = []
    groups: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        if r["kind"] == "compiled" and "registers" in r:
            name = r["implementation"].split("<")[0].split()[0]
            groups.setdefault((name, r["settings"]), []).append(r)
    for (name, settings), members in groups.items():
        spans = []
        for key in ("registers", "stack_bytes", "shared_bytes", "spill_bytes"):
            low, high = (pick(m[key] for m in members) for pick in (min, max))
            spans.append(str(low) if low == high else f"{low}–{high}")
        lines.append([f"{name} ({len(members)})", settings, *spans])
    lines += [c for c in compiled_cells(rows) if c[2].startswith(("absent", "failed"))]
    return lines


def show(rows: Sequence[Row]) -> None:
    print_cells("kernels, counted: no GPU was used", KERNEL_COLUMNS, kernel_cells(rows), 3)
    print_cells("hidden → loss, counted", PIPELINE_COLUMNS, pipeline_cells(rows), 1)
    print_cells("compiled for sm_90", COMPILED_COLUMNS, compiled_cells(rows), 2)


def markdown(rows: Sequence[Row]) -> str:
    first = rows[0]
    return "\n".join([
        NOTE, "",
        "### Kernels: bytes against the least that must move", "",
        *markdown_cells(KERNEL_COLUMNS, kernel_cells(rows)), "",
        "### Hidden states to policy loss in bf16, forward + backward", "",
        "GEMMs: 6NDV over the kept rows at 989 TFLOP/s. Glue: the passes over each chunk's fp32 "
        "logits (statistics, gradient in place, cast). dW sums: each chunk's fp32 product written "
        "and added. Milliseconds are an H100's where not said. Peak: above inputs and gradients.",
        "", *markdown_cells(PIPELINE_COLUMNS, pipeline_cells(rows)), "",
        "### What the compilers made for sm_90", "",
        "In brackets: how many variants; their lowest and highest figure. Every variant is a row "
        "of results/static.jsonl.", "",
        *markdown_cells(COMPILED_COLUMNS, families(rows)), "",
        f"triton {first['triton']}, torch {first['torch']}, commit {first['commit']}, "
        f"{first['date'][:10]}", "",
    ])  # fmt: skip
