"""What the package promises before any kernel runs: lazy import, printable reasons, compilation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from pyrl import kernels

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_imports_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import pyrl.kernels
print(pyrl.kernels.unavailable_reason())
del sys.modules["triton"]
sys.path.insert(0, ".")
try:
    import kernels
except ImportError as error:
    print(error)
print("triton" in sys.modules)
"""
    reason, refusal, loaded = python(code).splitlines()
    assert reason == "triton is not installed"
    assert refusal.startswith("import pyrl.kernels")
    assert loaded == "False"


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.unavailable_reason() == "no CUDA device and TRITON_INTERPRET is not 1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "7.5" in str(kernels.unavailable_reason())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert kernels.unavailable_reason() is None


def test_interpreter_chosen_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    class JITFunction:  # what triton's library functions are when they are not interpreted
        pass

    loaded = types.SimpleNamespace(sum=JITFunction())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton.language", loaded)
    assert kernels.unavailable_reason() == "TRITON_INTERPRET=1 was set after triton was imported"


def test_imports_are_torch_triton_and_relative() -> None:
    allowed = {"torch", "triton", "__future__", "typing", "importlib", "math", "os", "sys"}
    for path in (ROOT / "kernels").glob("*.py"):
        names = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
        roots = {name.split(".")[0] for name in names} - {""}
        assert roots <= allowed, f"{path.name}: {roots - allowed}"


@pytest.mark.slow
def test_every_variant_compiles_without_spills() -> None:
    code = "import sys; from benchmarks.aot_triton import main; sys.argv[1:] = ['--arch', '90']; "
    output = python(code + "raise SystemExit(main())", TRITON_INTERPRET="0")
    assert output.count(" | ") >= 50
