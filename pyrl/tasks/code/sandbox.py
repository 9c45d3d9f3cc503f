"""Runs a program that nobody has read, in processes that can do no harm and leave nothing.

A sandbox is given a program and its calls: inputs, never the expected answers. Those stay with the
caller, who compares (`pyrl.tasks.code.judge`), so there is nothing that a program could look up,
and whatever it writes to the channel of its results is only another answer.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import struct
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from pyrl.tasks.code import start

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
    """Address space of a process, MiB; at least 64, of which the interpreter takes about 25."""
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

    Each call runs in a process of its own, forked from one that was forked for this program
    (standard library only, hash seed 0). It has rlimits (memory, processor time, file size, open
    files, threads; no core dumps), an almost empty environment, and a filter of system calls
    (`jail.seccomp`) that denies processes, signals to others, tracing, the network and kernel
    memory. Around it, by `mode`:

    - "namespaces": no network, no other process, none of the machine's files but the interpreter's
      and the C library's (read-only), an empty /tmp of `file_mb` for each call. Ends when its first
      process ends, and that dies with this one. As root, programs run as a user that nobody is.
    - "bubblewrap": the same through `bwrap`, for kernels that allow namespaces to nobody else;
      nothing can be written.
    - "rlimits": no namespaces, so the filter denies opening any file; a program has the modules of
      `jail.cases.PRELOADED`.
    - "auto": the first of these that works here. Any other mode never falls back.

    But for "bubblewrap", programs are forked from an interpreter that runs none: one for all
    sandboxes of this process, with the limits and the niceness that this process has when the first
    program starts it. It ends with this process.

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
    supervisor = _supervisor(mode)
    lines: list[dict[str, Any]] = []
    try:
        with contextlib.suppress(BrokenPipeError):  # it has said why
            _write(supervisor.control.fileno(), struct.pack("<Q", len(data)) + data)
        end = time.monotonic() + limits.seconds + _MARGIN
        told, _ = start.read(supervisor.results, end)
        lines = [json.loads(line) for line in told.split(b"\n")[:-1]]
    finally:
        errors = supervisor.end(_MARGIN)
    first = lines[0] if lines else {}
    if "error" in first:
        raise _Unavailable(f"{mode}: {first['error']}")
    outcomes = lines[1:]
    if "ready" not in first or len(outcomes) != len(calls):
        said = errors.strip() or supervisor.why() or "it said nothing"
        where = f"after {len(outcomes)} of {len(calls)} calls"
        where = where if "ready" in first else "at its start"
        kind = SandboxError if "ready" in first or mode != "bubblewrap" else _Unavailable
        raise kind(f"{mode}: the sandbox ended {where}: {said.splitlines()[-1][:300]}")
    for i, outcome in enumerate(outcomes):
        if outcome["status"] == "failed":
            raise SandboxError(f"{mode}: call {i} could not be limited: {outcome['error']}")
    return [Outcome(**outcome) for outcome in outcomes]


def _supervisor(mode: str) -> start.Supervisor:
    """Starts the supervisor of one request."""
    try:
        if mode == "bubblewrap":
            return start.by_command(_bubblewrap())
        return start.by_fork(mode, [*_jail(), "serve", f"of-{os.getpid()}"])
    except OSError as error:
        raise SandboxError(f"{mode}: it could not be started: {error}") from error


def _jail() -> list[str]:
    return [_python(), "-s", "-S", _JAIL]


def _python() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _bubblewrap() -> list[str]:
    """The supervisor's command line."""
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
    python = _python()
    binds += ["--ro-bind", python, python, "--ro-bind", _JAIL, _JAIL]
    flags = ["--unshare-all", "--die-with-parent", "--new-session", "--dir", "/tmp"]
    inside = [*_jail(), "inside", f"of-{os.getpid()}"]
    return [program, *flags, "--chdir", "/tmp", *binds, "--", *inside]


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
