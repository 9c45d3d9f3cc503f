"""The kernels for lesser CPUs give the same answers: their tests again, one set a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyrl import _native

if _native.native_reason() is not None:
    pytest.skip(_native.native_reason(), allow_module_level=True)


@pytest.mark.parametrize(
    ("name", "tests"),
    [
        ("portable", "test_logits_rows.py"),
        ("avx2", "test_logits_rows.py"),
        ("avx2", "test_head.py"),
    ],
)
def test_instruction_set(name, tests):
    if name == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    file = Path(__file__).with_name(tests)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "PYRL_CPU_ISA": name},
        capture_output=True,
        text=True,
        cwd=file.parents[2],
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


def test_an_unknown_set_is_an_error():
    code = (
        "import torch; from pyrl import _native; one = torch.ones(1);"
        "torch.ops.pyrl_native.logits_stats(torch.zeros(1, 4), one.long(), one, 1.0, 0.0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYRL_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "PYRL_CPU_ISA=sse9: expected portable, avx2 or avx512" in run.stderr
