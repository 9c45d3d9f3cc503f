"""PYRL_BUILD: what each mode builds, refuses and installs, from a copy of the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "CMakeLists.txt", "pyproject.toml", "csrc", "kernels", "pyrl")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source checkout"),
]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
PIP = (sys.executable, "-m", "pip")
FLAGS = ("--no-deps", "--no-build-isolation")
NO_TOOLS = {"PATH": "/nonexistent", "CXX": "", "CUDACXX": "", "CUDA_HOME": ""}


@pytest.fixture
def sources(tmp_path):
    """A copy with nothing compiled: builds must not touch the checkout, nor find its results."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def setup_py(sources, mode, *command, **env):
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        env={**os.environ, "PYRL_BUILD": mode, **env},
        cwd=sources,
        capture_output=True,
        text=True,
    )


def wheel(sources, mode, **env):
    """Builds a wheel; returns its path and what the build printed."""
    out = sources.parent / "wheels"
    shutil.rmtree(out, ignore_errors=True)
    run = subprocess.run(
        [*PIP, "wheel", "-v", "-w", str(out), *FLAGS, str(sources)],
        env={**os.environ, "PYRL_BUILD": mode, **env},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (path,) = out.iterdir()
    return path, run.stdout + run.stderr


def unpack(path, target):
    with zipfile.ZipFile(path) as archive:
        archive.extractall(target)
        return sorted(n.rpartition("/")[2].split(".")[0] for n in archive.namelist() if ".so" in n)


def python(target, code):
    """Runs code with only `target`'s pyrl in sight."""
    check = f"import pyrl; assert pyrl.__file__.startswith({str(target)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", check + code],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=target,
        capture_output=True,
        text=True,
    )


USES_AN_OP = """
import torch
from pyrl import _native
print(_native.native_reason(), "|", _native.cuda_reason(), "|", _native.host_reason())
print(pyrl.backends())
import pyrl.kernels
h, w = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
pyrl.linear_logprob(h, w, torch.zeros(4, dtype=torch.int64)).logprob.sum().backward()
assert h.grad.isfinite().all()
"""


def test_an_unknown_mode_names_the_known_ones(sources):
    run = setup_py(sources, "gpu", "--version")
    assert run.returncode != 0
    assert "PYRL_BUILD='gpu': expected one of auto, python, cpu, cuda" in run.stderr


def test_pure_python(sources, tmp_path):
    path, log = wheel(sources, "python")
    assert path.name.endswith("-py3-none-any.whl")
    assert "PYRL_BUILD=python: pure Python" in log
    target = tmp_path / "target"
    assert unpack(path, target) == []
    run = python(target, USES_AN_OP)
    assert run.returncode == 0, run.stderr
    assert "pyrl/_C.so was not built" in run.stdout and "pyrl/_host was not built" in run.stdout


def test_auto_without_tools_is_pure_python_and_says_why(sources):
    run = setup_py(sources, "auto", "--version", **NO_TOOLS)
    assert run.returncode == 0, run.stderr
    assert "building as pure Python, missing a C++ compiler" in run.stderr


@pytest.mark.parametrize("mode", ("cpu", "cuda"))
def test_a_demanded_build_without_tools_is_an_error(sources, mode):
    run = setup_py(sources, mode, "--version", **NO_TOOLS)
    assert run.returncode != 0
    assert f"PYRL_BUILD={mode}: missing a C++ compiler" in run.stderr


def test_cuda_without_nvcc_is_an_error(sources, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in ("c++", "cmake"):
        (folder / program).symlink_to(shutil.which(program) or "/bin/false")
    env = {**NO_TOOLS, "PATH": str(folder)}
    run = setup_py(sources, "cuda", "--version", **env)
    assert run.returncode != 0
    assert "PYRL_BUILD=cuda: missing nvcc" in run.stderr
    # The same machine builds the C++ parts by itself.
    run = setup_py(sources, "auto", "--version", **env)
    assert run.returncode == 0 and "building pyrl._C, pyrl._host\n" in run.stderr


def test_a_failed_compile_is_an_error(sources):
    file = sources / "csrc" / "schema.cpp"
    file.write_text("#error broken on purpose\n" + file.read_text())
    run = setup_py(sources, "auto", "build")
    assert run.returncode != 0
    assert "broken on purpose" in run.stdout + run.stderr


def test_a_library_that_does_not_load_raises(sources, tmp_path):
    path, _ = wheel(sources, "python")
    target = tmp_path / "target"
    unpack(path, target)
    for name, error in (
        ("_C.so", "OSError"),
        ("_host" + sysconfig.get_config_var("EXT_SUFFIX"), "ImportError"),
    ):
        library = target / "pyrl" / name
        library.write_bytes(b"not a library")
        run = python(target, "from pyrl import _native")
        assert run.returncode != 0
        assert name in run.stderr and error in run.stderr
        library.unlink()


@needs_nvcc
def test_cuda_builds_whatever_torch_is_here(sources, tmp_path):
    path, _ = wheel(sources, "cuda", PYRL_CUDA_ARCHS="80-real")
    target = tmp_path / "target"
    assert unpack(path, target) == ["_C", "_C_cuda", "_host"]
    run = python(target, USES_AN_OP)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("None |")
    # No path of the building machine's torch stays in the libraries.
    for library in (target / "pyrl").glob("_C*.so"):
        dynamic = subprocess.run(
            ["readelf", "-d", library], check=True, capture_output=True, text=True
        )
        assert "RPATH" not in dynamic.stdout and "RUNPATH" not in dynamic.stdout


def test_editable_install_follows_the_mode(sources, tmp_path):
    """Libraries land beside pyrl/; a later pure-Python install removes them."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    site = next((environment / "lib").glob("python*/site-packages"))
    # The dependencies of this environment, but not its own editable pyrl.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    interpreter = environment / "bin" / "python"

    def install(mode):
        run = subprocess.run(
            [*PIP, "--python", interpreter, "install", *FLAGS, "--ignore-installed", "-e", sources],
            env={**os.environ, "PYRL_BUILD": mode},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]

    def used():
        code = f"import pyrl; {USES_AN_OP}\nprint(pyrl.__file__, pyrl.kernels.__file__)"
        run = subprocess.run(
            [interpreter, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert str(sources / "pyrl") in run.stdout and str(sources / "kernels") in run.stdout
        return run.stdout

    install("cpu")
    built = sorted(p.name.split(".")[0] for p in (sources / "pyrl").glob("*.so"))
    assert built == ["_C", "_host"]
    assert used().startswith("None |")
    install("python")
    assert list((sources / "pyrl").glob("*.so")) == []
    assert used().startswith("pyrl/_C.so was not built")
