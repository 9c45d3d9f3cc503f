"""`pyrl env`."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

import pyrl
from pyrl import env_report

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report() -> dict:
    return env_report.collect()


def printed(report: dict) -> str:
    out = io.StringIO()
    env_report.show(report, Console(file=out, width=200, highlight=False))
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


def test_says_why_each_absent_backend_is_absent(report: dict) -> None:
    assert report["backends"] == pyrl.backends()
    text = printed(report)
    for name, reason in report["backends"].items():
        wanted = "yes" if reason is None else f"no: {reason}"
        assert re.search(rf"^{name} +{re.escape(wanted)}", text, re.M), (name, text)


def test_reports_this_machine(report: dict) -> None:
    text = printed(report)
    assert report["packages"]["torch"] == torch.__version__
    assert report["cpu"]["model"] in text
    assert report["cpu"]["torch_threads"] == torch.get_num_threads()
    assert 0 < report["memory"]["available_gib"] <= report["memory"]["total_gib"]
    assert bool(report["cuda"]["devices"]) == torch.cuda.is_available()
    assert (report["cuda"]["reason"] is None) == torch.cuda.is_available()


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    env_report.main(json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["pyrl"]["version"] == pyrl.__version__
    assert set(found["backends"]) >= {"reference", "torch", "cpu", "triton", "cuda"}


def test_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    env_report.main()
    text = capsys.readouterr().out
    for title in ("This machine", "Backends", "Compiled modules", "Packages", "Environment"):
        assert title in text
    assert "\x1b" not in text


def test_shows_variables_and_flags_unknown_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRL_CACHE", "/somewhere")
    monkeypatch.setenv("PYRL_BAKEND", "torch")
    report = env_report.collect()
    assert report["environment"]["PYRL_CACHE"]["value"] == "/somewhere"
    assert report["unknown_environment"] == ["PYRL_BAKEND"]
    assert re.search(r"PYRL_BAKEND .*not a variable that pyrl reads", printed(report))


def test_a_machine_with_a_gpu(report: dict) -> None:
    device = {"name": "H100", "capability": "sm_90", "memory_gib": 79.1, "multiprocessors": 132}
    cuda = {"torch_cuda": "13.0", "devices": [device], "reason": None}
    text = printed({**report, "cuda": cuda})
    assert "H100, sm_90, 79.1 GiB, 132 multiprocessors, CUDA 13.0" in text


def test_the_table_of_variables_is_complete() -> None:
    """A variable that the code reads is in `pyrl env`, and the other way round."""
    read = set()
    files = [*ROOT.glob("pyrl/**/*.py"), *ROOT.glob("kernels/*.py"), ROOT / "setup.py"]
    for path in files:
        if path.name != "env_report.py":
            source = path.read_text()
            read |= set(re.findall(r"environ[^\n]*?[\"'](PYRL_[A-Z_]+)[\"']", source))
            read |= set(re.findall(r"getenv\([\"'](PYRL_[A-Z_]+)[\"']", source))
    for path in ROOT.glob("csrc/**/*"):
        if path.is_file():
            read |= set(re.findall(r"getenv\(\"(PYRL_[A-Z_]+)\"", path.read_text()))
    assert read == set(env_report.ENVIRONMENT)
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `(PYRL_[A-Z_]+)` \|", readme, re.M)) == read
