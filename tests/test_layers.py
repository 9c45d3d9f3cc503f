"""Imports go downward only; only one file imports vllm; kernels import torch and triton only."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Rooms from the bottom up; a room may import itself and what stands before its line. Rooms of one
#: line are peers and do not import each other, except as `PEERS` says.
LAYERS = [
    {"pyrl._native", "pyrl._host", "pyrl.kernels"},
    {"pyrl.ops"},
    {"pyrl.losses", "pyrl.packing", "pyrl.parity"},
    {"pyrl"},  # the package's own namespace: `from pyrl import LossSpec`
    {"pyrl.models", "pyrl.nn", "pyrl.testing"},
    {"pyrl.algorithms", "pyrl.tasks", "pyrl.rollout"},
    {"pyrl.trainer"},
    {"pyrl.certify", "pyrl.env_report", "pyrl.integrations", "pyrl.repro"},
    {"pyrl.cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
#: `_native` describes the compiled ops to torch, their number of metrics included.
PEERS = {("pyrl._native", "pyrl.ops")}


def modules():
    for path in sorted((ROOT / "pyrl").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, ".".join(p for p in parts if p != "__init__")
    for path in sorted((ROOT / "kernels").glob("*.py")):
        yield path, "pyrl.kernels." + path.stem


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2])


def imports(path: Path, module: str):
    """Absolute names of every import anywhere in the file, those inside functions too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base]).rstrip(".")
            # `from pyrl import models` imports a room, `from pyrl import pack` the namespace.
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in LEVEL else base


def test_imports_go_downward():
    wrong = []
    for path, module in modules():
        here = room(module)
        assert here in LEVEL, f"{path} belongs to no room of LAYERS"
        if module == "pyrl":
            continue  # the namespace gathers names from every room
        for name in imports(path, module):
            there = room(name)
            if not name.startswith("pyrl") or there == here or (here, there) in PEERS:
                continue
            if there not in LEVEL or LEVEL[there] >= LEVEL[here]:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_vllm_stays_in_one_file():
    users = {
        m for path, m in modules() for name in imports(path, m) if name.split(".")[0] == "vllm"
    }
    assert users <= {"pyrl.rollout.vllm_engine", "pyrl.env_report"}, users


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "pyrl", *sys.stdlib_module_names}
    for path, module in modules():
        if module.startswith("pyrl.kernels"):
            used = {name.split(".")[0] for name in imports(path, module)}
            assert used <= allowed, (module, used - allowed)


def test_benchmarks_never_import_tests():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert not any(name.split(".")[0] == "tests" for name in imports(path, "benchmarks.x")), (
            path
        )


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("pyrl", "kernels", "csrc", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".cu", ".h", ".cuh"}
        and (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long, long


def test_the_namespace_is_lazy_and_complete():
    code = (
        "import sys, pyrl; assert 'torch' not in sys.modules; "
        "assert set(pyrl.__all__) == set(pyrl._HOME) <= set(dir(pyrl)); "
        "[getattr(pyrl, name) for name in pyrl.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
