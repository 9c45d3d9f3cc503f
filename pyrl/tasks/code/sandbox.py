"""Runs a program that nobody has read, in processes that can do no harm and leave nothing.

A sandbox is given a program and its calls: inputs, never the expected answers. Those stay with the
caller, who compares (`pyrl.tasks.code.judge`), so there is nothing that a program could look up,
and whatever it writes to the channel of its results is only another answer.
"""

from __future__ import annotations

import functools
import json
import math
import os
import select
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

Mode = Literal["auto", "namespaces", "bubblewrap", "rlimits"]
MODES: tuple[str, ...] = get_args(Mode)
Status = Literal["done", "crashed", "timeout", "output"]

#: mode → what is in force, for people.
DESCRIPTIONS = {
    "namespaces": "namespaces (user, network, process, mount, IPC) + {filter}rlimits",
    "bubblewrap": "bubblewrap + system-call filter + rlimits, files read-only",
    "rlimits": "system-call filter (no network, processes or files) + rlimits, no namespaces",
}
_JAIL = str(Path(__file__).with_name("jail"))
#: Seconds that starting and ending may take beyond the program's own.
_MARGIN = 10.0


class SandboxError(RuntimeError):
    """The sandbox itself failed: nothing is known of the program."""


@dataclass(frozen=True)
class Call:
    """One run of the program: with `stdin`, or of a function (`function` not empty)."""

    stdin: str = ""
    function: str = ""
    """A function of the program, or a method of its class `Solution`."""
    arguments: Sequence[Any] = ()
    """The function's arguments: JSON values."""


@dataclass(frozen=True)
class Limits:
    """What all calls of a program may use. ValueError for a value that is not positive."""

    seconds: float = 5.0
    """Wall time of all calls together; each may take as much processor time."""
    memory_mb: int = 512
    """Address space of a process, MiB; at least 64."""
    file_mb: int = 16
    """What a call may write to files, MiB."""
    output_bytes: int = 1 << 20
    """Standard output, or a function's value as JSON, of one call."""
    processes: int = 32
    """Threads, and processes where there is no filter that denies them."""
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 64 if name == "memory_mb" else 0
            if not (value > 0 and value >= least and math.isfinite(value)):
                wanted = f">= {least}" if least else "> 0"
                raise ValueError(f"{name}={value}: expected a number {wanted}")


@dataclass(frozen=True)
class Outcome:
    """What one call did."""

    status: Status
    """done: ended with exit code 0 (a function: and returned JSON); output: said too much."""
    stdout: str = ""
    """At most `Limits.output_bytes`; invalid UTF-8 becomes U+FFFD. Not kept of a function."""
    result: str | None = None
    """JSON, as the program's process wrote it: not checked."""
    error: str = ""
    """Of a crash: the last line of standard error, and how the process ended."""
    seconds: float = 0.0


class Sandbox(Protocol):
    """Runs programs."""

    def run(self, program: str, calls: Sequence[Call], limits: Limits) -> list[Outcome]:
        """The outcomes in the order of the calls; calls after the time is out are "timeout".

        Raises SandboxError when the sandbox failed, whatever the program did or would have done.
        """
        ...

    def isolation(self) -> str:
        """What stands between a program and the machine, in a line."""
        ...


class LocalSandbox:
    """Python programs in processes of this machine (Linux).

    Each call runs in a process of its own, forked from an interpreter that is started for this
    program (standard library only, hash seed 0), with rlimits (memory, processor time, file size,
    open files, threads; no core dumps), an almost empty environment, and a filter of system calls
    (`jail.seccomp`) that denies processes, signals to others, tracing, sockets and kernel memory.
    Around it, by `mode`:

    - "namespaces": no network, no other process, none of the machine's files but the interpreter's
      and the C library's (read-only), an empty /tmp of `file_mb` for each call. Ends when its first
      process ends, and that dies with this one. As root, programs run as a user that nobody is.
    - "bubblewrap": the same through `bwrap`, for kernels that allow namespaces to nobody else;
      nothing can be written.
    - "rlimits": no namespaces, so the filter denies opening any file; a program has the modules of
      `jail.cases.PRELOADED`.
    - "auto": the first of these that works here. Any other mode never falls back.

    syscall_filter: False leaves the namespaces and rlimits to it, as on processors whose calls
    `jail.seccomp` does not list; needs mode "namespaces".
    Raises ValueError for an unknown mode, SandboxError from `run` when the mode cannot be had.
    """

    def __init__(self, mode: str = "auto", *, syscall_filter: bool = True) -> None:
        if mode not in MODES:
            raise ValueError(f"sandbox={mode!r}: expected one of {', '.join(MODES)}")
        self.mode, self.syscall_filter = mode, syscall_filter

    def run(self, program: str, calls: Sequence[Call], limits: Limits) -> list[Outcome]:
        """See `Sandbox.run`."""
        mode = _best() if self.mode == "auto" else self.mode
        return _run(mode, self.syscall_filter, program, calls, limits)

    def isolation(self) -> str:
        """What is in force; SandboxError when the mode cannot be had."""
        mode = _best() if self.mode == "auto" else self.mode
        _probe(mode, self.syscall_filter)
        filtered = self.syscall_filter and os.uname().machine in ("x86_64", "aarch64")
        return DESCRIPTIONS[mode].format(filter="system-call filter + " if filtered else "")


class _Unavailable(SandboxError):
    """The kernel, or the machine, does not give what a mode needs."""


@functools.lru_cache(maxsize=1)
def _best() -> str:
    reasons = []
    for mode in MODES[1:]:
        try:
            _probe(mode, True)
        except _Unavailable as error:
            reasons.append(str(error))
        else:
            return mode
    raise SandboxError(f"no sandbox works here: {'; '.join(reasons)}")


def _probe(mode: str, filtered: bool) -> None:
    """Raises SandboxError unless a program runs."""
    _run(mode, filtered, "", [Call()], Limits())


def _run(
    mode: str, filtered: bool, program: str, calls: Sequence[Call], limits: Limits
) -> list[Outcome]:
    request = {
        "program": program,
        "filter": filtered,
        "calls": [
            {
                "function": call.function,
                "stdin": json.dumps(call.arguments) if call.function else call.stdin,
            }
            for call in calls
        ],
        "limits": {
            "seconds": limits.seconds,
            "memory_bytes": limits.memory_mb << 20,
            "file_bytes": limits.file_mb << 20,
            "output_bytes": limits.output_bytes,
            "processes": limits.processes,
            "open_files": limits.open_files,
        },
    }
    data = json.dumps(request).encode()
    if not sys.platform.startswith("linux"):
        raise _Unavailable(f"{mode}: needs Linux, and this is {sys.platform}")
    process = subprocess.Popen(
        _command(mode),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(),
        cwd="/",
        start_new_session=True,  # its signals to its group are not for us
        bufsize=0,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        try:
            process.stdin.write(struct.pack("<Q", len(data)))
            _write(process.stdin.fileno(), data)
        except BrokenPipeError:
            pass  # it has said why
        lines = _lines(process.stdout.fileno(), time.monotonic() + limits.seconds + _MARGIN)
    finally:
        errors = _end(process)
    first = lines[0] if lines else {}
    if "error" in first:
        raise _Unavailable(f"{mode}: {first['error']}")
    told = lines[1:]
    if "ready" not in first or len(told) != len(calls):
        last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        where = f"after {len(told)} of {len(calls)} calls" if "ready" in first else "at its start"
        kind = SandboxError if "ready" in first or mode != "bubblewrap" else _Unavailable
        raise kind(f"{mode}: the sandbox ended {where}: {last[0][:300]}")
    for i, outcome in enumerate(told):
        if outcome["status"] == "failed":
            raise SandboxError(f"{mode}: call {i} could not be limited: {outcome['error']}")
    return [Outcome(**outcome) for outcome in told]


def _command(mode: str) -> list[str]:
    """The supervisor's command line."""
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    jail = [python, "-s", "-S", _JAIL]
    if mode != "bubblewrap":
        return [*jail, mode, f"of-{os.getpid()}"]
    program = shutil.which("bwrap")
    if program is None:
        raise _Unavailable("bubblewrap: no program `bwrap` on the PATH")
    from pyrl.tasks.code.jail import namespaces

    binds: list[str] = []
    paths = sysconfig.get_paths()
    for folder in namespaces.folders([paths["stdlib"], paths["platstdlib"]]):
        binds += ["--ro-bind", os.path.realpath(folder), folder]
        for hidden in namespaces.packages(folder):
            binds += ["--tmpfs", hidden]
    binds += ["--ro-bind", python, python, "--ro-bind", _JAIL, _JAIL]
    flags = ["--unshare-all", "--die-with-parent", "--new-session", "--dir", "/tmp"]
    return [program, *flags, "--chdir", "/tmp", *binds, "--", *jail, "inside", f"of-{os.getpid()}"]


def _environment() -> dict[str, str]:
    """All that a program finds in `os.environ`: nothing of the user's."""
    told = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
    told |= {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}  # a set's order is the same in every run
    if sys.dont_write_bytecode:
        told["PYTHONDONTWRITEBYTECODE"] = "1"
    return told


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _lines(descriptor: int, end: float) -> list[dict[str, Any]]:
    """The lines of JSON until the end of the stream, or as many as came before `end`."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    parts = []
    while poll.poll(max(0.0, end - time.monotonic()) * 1000):
        part = os.read(descriptor, 1 << 16)
        if not part:
            break
        parts.append(part)
    whole = b"".join(parts).split(b"\n")[:-1]
    return [json.loads(line) for line in whole]


def _end(process: subprocess.Popen[bytes]) -> str:
    """Closing its input stops the supervisor, which leaves nothing; its own last words."""
    assert process.stdin is not None and process.stderr is not None
    process.stdin.close()
    try:
        process.wait(_MARGIN)
    except subprocess.TimeoutExpired:
        process.kill()  # what it started dies with it
        process.wait()
    errors = process.stderr.read()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    return errors.decode(errors="replace")
