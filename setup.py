"""Builds the compiled parts of pyrl with CMake.

PYRL_BUILD chooses:
  auto    (default) C++ if a compiler, CMake and torch are here; CUDA too if nvcc is here and torch
          is a CUDA build; pure Python, with the reason printed, if a tool is missing.
  python  pure Python.
  cpu     C++ only; a missing tool is an error.
  cuda    C++ and CUDA; nvcc is demanded, a CUDA build of torch is not (the result then loads
          where torch has CUDA).
A failed compile is an error in every mode. PYRL_CUDA_ARCHS (CMake syntax) overrides the targets.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "python", "cpu", "cuda")
#: Opened by torch.ops.load_library, not imported: plain file names, no Python version in them.
TORCH_LIBRARIES = ("_C", "_C_cuda")
HOST = "pyrl._host"


def torch_folder() -> Path | None:
    """Where torch is installed, without importing it (seconds)."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_version() -> dict[str, str | None]:
    """The globals of torch/version.py: `__version__`, `cuda`."""
    folder = torch_folder()
    return runpy.run_path(str(folder / "version.py")) if folder else {}


def tool(name: str, variable: str | None = None) -> str | None:
    """Path of a program: $variable, then PATH, then beside this Python (a venv not activated)."""
    name = (variable and os.environ.get(variable)) or name
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def nvcc() -> str | None:
    """Path of nvcc: $CUDACXX, PATH, then $CUDA_HOME/bin."""
    home = os.environ.get("CUDA_HOME")
    return tool("nvcc", "CUDACXX") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def missing_for_cpu() -> list[str]:
    """What the C++ parts need and this machine lacks."""
    missing = []
    if not (tool("c++", "CXX") or tool("g++") or tool("clang++")):
        missing.append("a C++ compiler (c++, g++, clang++ or $CXX)")
    if not tool("cmake"):
        missing.append("cmake")
    if torch_folder() is None:
        missing.append("torch in the build environment (pip install --no-build-isolation)")
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    return missing


def choose() -> list[str]:
    """Names of the extensions to build, by PYRL_BUILD and the tools here."""
    mode = os.environ.get("PYRL_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"PYRL_BUILD={mode!r}: expected one of {', '.join(MODES)}")
    if mode == "python":
        print("pyrl: PYRL_BUILD=python: pure Python, no compiled backend", file=sys.stderr)
        return []
    missing = missing_for_cpu()
    if missing:
        if mode != "auto":
            raise SystemExit(f"PYRL_BUILD={mode}: missing {'; '.join(missing)}")
        print(f"pyrl: building as pure Python, missing {'; '.join(missing)}", file=sys.stderr)
        return []
    extensions = ["pyrl._C", HOST]
    if mode == "cuda" and not nvcc():
        raise SystemExit("PYRL_BUILD=cuda: missing nvcc (PATH, $CUDACXX or $CUDA_HOME/bin)")
    if mode == "cuda" or (mode == "auto" and nvcc() and torch_version().get("cuda")):
        extensions.append("pyrl._C_cuda")
    print(f"pyrl: building {', '.join(extensions)}", file=sys.stderr)
    return extensions


class CMakeBuild(build_ext):
    """One CMake run builds every extension; setuptools places the results."""

    def get_ext_filename(self, name: str) -> str:
        # setuptools asks with the full name or with its last part only.
        if name.rpartition(".")[2] in TORCH_LIBRARIES:
            return str(Path(*name.split("."))) + ".so"
        return super().get_ext_filename(name)

    def run(self) -> None:
        # A build folder may hold libraries of an earlier mode: they must not enter this wheel.
        for path in Path(self.build_lib, "pyrl").glob("*.so"):
            path.unlink()
        self.libraries_at = Path(self.build_temp).resolve() / "cmake"
        self.cmake()
        super().run()

    def cmake(self) -> None:
        names = [e.name for e in self.extensions]
        pybind11 = subprocess.check_output(
            [sys.executable, "-m", "pybind11", "--cmakedir"], text=True
        ).strip()
        cmake = str(tool("cmake"))  # choose() has found it
        configure = [
            cmake, "-S", str(ROOT), "-B", str(self.libraries_at),
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            f"-DPYRL_TORCH={torch_folder()}",
            f"-DPYRL_CUDA={'ON' if 'pyrl._C_cuda' in names else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11}",
        ]  # fmt: skip
        ninja = tool("ninja")
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if "pyrl._C_cuda" in names:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc()}")
            if os.environ.get("PYRL_CUDA_ARCHS"):
                configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={os.environ['PYRL_CUDA_ARCHS']}")
        jobs = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(self.libraries_at), "--parallel", jobs], check=True)

    def build_extension(self, ext: Extension) -> None:
        built = self.libraries_at / "lib" / Path(self.get_ext_filename(ext.name)).name
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))


class BuildPython(build_py):
    """Editable installs: removes libraries of an earlier mode, which would still be loaded."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            names = [e.name.rpartition(".")[2] for e in self.distribution.ext_modules or []]
            for path in (ROOT / "pyrl").glob("_*.so"):
                if path.name.split(".")[0] not in names:
                    path.unlink()


setup(
    packages=[*find_packages(include=["pyrl", "pyrl.*"]), "pyrl.kernels"],
    package_dir={"pyrl.kernels": "kernels"},
    # Stated, not gathered: MANIFEST.in is about the source archive, not about what is installed.
    include_package_data=False,
    package_data={"pyrl": ["py.typed"], "pyrl.trainer": ["page/*"]},
    ext_modules=[Extension(name, sources=[]) for name in choose()],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)
