"""Compile every CUDA kernel for GPUs that need not be there, and read what the compiler made.

    python benchmarks/aot_cuda.py [--arch 90a] [--kernel logits_rows]

Prints kernel x architecture with registers a thread, shared memory, stack and spill bytes, from
ptxas. Exits 1 if a file does not compile, a kernel spills or keeps a stack frame (an array with
run-time indices in local memory), or there is no nvcc.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("80", "90a", "100")


class Resources(NamedTuple):
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def find(program: str) -> str | None:
    """Path of a CUDA tool: PATH, then $CUDA_HOME/bin."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(program) or (shutil.which(program, path=f"{home}/bin") if home else None)


def compile_cubin(nvcc: str, source: Path, arch: str, cubin: Path) -> str:
    """The text of ptxas -v; CalledProcessError if the file does not compile."""
    command = [
        nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-cubin", "-Xptxas", "-v",
        f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(cubin), str(source),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def demangled(names: list[str]) -> list[str]:
    """Kernel names without namespaces and arguments: `stats_kernel<float, true>`."""
    tool = find("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    text = subprocess.run([tool, *names], check=True, capture_output=True, text=True).stdout
    plain = []
    for line in text.splitlines():
        line = re.sub(r"\([^()]*anonymous namespace[^()]*\)|<unnamed>", "", line)
        line = re.sub(r"^void |pyrl::cuda::+|\(bool\)", "", line).replace("::", "")
        plain.append(line.partition("(")[0].replace("<0>", "<false>"))
    return plain


def resources(log: str) -> dict[str, Resources]:
    """Mangled kernel name -> what ptxas -v says of it."""

    def number(pattern: str, text: str) -> int:
        match = re.search(pattern, text)
        return int(match[1]) if match else 0

    found = {}
    for part in re.split(r"Compiling entry function ", log)[1:]:
        match = re.match(r"'(\w+)'", part)
        if match is None or "Used" not in part:
            raise SystemExit(f"aot_cuda: cannot read this report of ptxas:\n{part}")
        found[match[1]] = Resources(
            number(r"Used (\d+) registers", part),
            number(r"(\d+) bytes smem", part),
            number(r"(\d+) bytes stack frame", part),
            number(r"(\d+) bytes spill stores", part),
            number(r"(\d+) bytes spill loads", part),
        )
    return found


def compiled(
    nvcc: str, sources: Sequence[Path], architectures: Sequence[str]
) -> Iterator[tuple[str, str, str, Resources] | str]:
    """(file, kernel, architecture, resources) of every kernel, or what did not compile."""
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            for arch in architectures:
                cubin = Path(folder) / f"{source.stem}.{arch}.cubin"
                try:
                    found = resources(compile_cubin(nvcc, source, arch, cubin))
                except subprocess.CalledProcessError as error:
                    print(error.stderr, file=sys.stderr)
                    yield f"{source.name} does not compile for sm_{arch}"
                    continue
                for name, used in zip(demangled(list(found)), found.values(), strict=True):
                    yield source.stem, name, arch, used


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help=f"default {', '.join(ARCHITECTURES)}")
    parser.add_argument("--kernel", default="", help="only files whose name contains this")
    options = parser.parse_args()
    nvcc = find("nvcc")
    if nvcc is None:
        print("aot_cuda: no nvcc (PATH or $CUDA_HOME/bin)", file=sys.stderr)
        return 1
    sources = [s for s in sorted(SOURCES.glob("*.cu")) if options.kernel in s.name]
    if not sources:
        print(f"aot_cuda: no file of {SOURCES} matches {options.kernel!r}", file=sys.stderr)
        return 1

    table = Table("file", "kernel", "arch")
    for column in ("registers", "shared B", "stack B", "spill stores B", "spill loads B"):
        table.add_column(column, justify="right")
    problems = []
    for found in compiled(nvcc, sources, options.arch or ARCHITECTURES):
        if isinstance(found, str):
            problems.append(found)
            continue
        source, name, arch, used = found
        bad = used.stack or used.spill_stores or used.spill_loads
        if bad:
            problems.append(f"{name} uses local memory on sm_{arch}")
        table.add_row(source, name, f"sm_{arch}", *map(str, used), style="red" if bad else "")
    # Piped into a log there is no terminal to fit: names must not be cut.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for problem in problems:
        print(f"aot_cuda: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
