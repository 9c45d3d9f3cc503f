"""`pyrl bench` starts benchmarks/run.py of the checkout, and says what to do without one."""

import subprocess
import sys
from pathlib import Path

import pytest

from pyrl import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def started(monkeypatch):
    commands = []

    def fake(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", fake)
    return commands


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--static"],
        ["--only", "packing", "--rounds", "2", "--out", "x", "--quick", "--all",
         "--implementations", "pyrl-native"],
    ],
)  # fmt: skip
def test_flags_pass_on_and_the_status_comes_back(started, given):
    assert cli.main(["bench", *given]) == 3
    ((python, script, *rest),) = started
    assert python == sys.executable and Path(script) == ROOT / "benchmarks" / "run.py"
    assert sorted(rest) == sorted(given)


def test_an_installed_wheel_says_what_to_do(started, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "pyrl" / "cli.py"))
    assert cli.main(["bench"]) == 2
    text = capsys.readouterr().err
    assert "not part of an installed wheel" in text and "[bench]" in text
    assert not started


def test_the_script_takes_what_the_command_passes():
    import run

    given = ["--only", "report", "--quick", "--all", "--rounds", "2", "--out", "x"]
    args = run.arguments(given)
    assert (args.only, args.quick, args.all, args.rounds, args.out) == (
        "report", True, True, 2, Path("x"),
    )  # fmt: skip
