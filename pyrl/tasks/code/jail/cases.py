"""The zygote: forks one process a call from a warm interpreter, reads what it says, limits it.

A program's process holds its own input and two pipes, nothing else: no expected answer ever comes
to this side of the request.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import importlib
import io
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import kernel, namespaces, seccomp

RESULT = 3  # the descriptor that a function's value is written to
LIMITED = b"+"  # the first byte there: from here on the program is to blame
ERROR_BYTES = 4096
NAME = "<program>"

#: What a program may import where it may not open files.
PRELOADED = (
    "abc", "array", "bisect", "calendar", "cmath", "collections", "collections.abc", "contextlib",
    "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "hashlib",
    "heapq", "io", "itertools", "json", "math", "numbers", "operator", "os", "queue", "random",
    "re", "secrets", "statistics", "string", "struct", "sys", "textwrap", "threading", "time",
    "traceback", "types", "typing", "unicodedata", "uuid",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What stands between a program and the machine; see `supervisor`."""

    files: str | None
    """`seccomp.instructions`; None = no filter."""
    user: int | None
    """The user that programs run as; None = this one."""
    alone: bool
    """This process is the first of a namespace of processes."""
    tmp: bool
    """Each call has an empty /tmp of its own."""
    counted: bool
    """RLIMIT_NPROC counts the program's processes, and no others."""


def preload() -> None:
    """Imports PRELOADED."""
    for name in PRELOADED:
        importlib.import_module(name)


def run(request: dict[str, Any], plan: Plan, results: int) -> Callable[[], None]:
    """Runs the calls of the request in turn. Returns only in a call's process."""
    limits, program = request["limits"], request["program"]
    sys.dont_write_bytecode = True
    _send(results, {"ready": True})
    end = time.monotonic() + limits["seconds"]
    for call in request["calls"]:
        start = time.monotonic()
        if start >= end:
            _send(results, {"status": "timeout", "seconds": 0.0})
            continue
        if plan.tmp:
            namespaces.fresh_tmp(limits["file_bytes"])
        stdin = _sealed(call["stdin"].encode(errors="replace"))
        pipes = [os.pipe() for _ in range(3)]  # output, errors, a function's value
        pid = os.fork()
        if pid == 0:
            taken = (stdin, *(pipe[1] for pipe in pipes))
            return functools.partial(_become, plan, limits, program, call["function"], taken)
        os.close(stdin)
        for pipe in pipes:
            os.close(pipe[1])
        told = _follow(
            pid, [pipe[0] for pipe in pipes], limits["output_bytes"], end, bool(call["function"])
        )
        if plan.alone:
            reap()
        told["seconds"] = time.monotonic() - start
        _send(results, told)
    os._exit(0)


def reap() -> None:
    """Ends all that is left of a call, daemons included."""
    while True:
        if os.getpid() == 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # everything in this namespace but us
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _send(results: int, line: dict[str, Any]) -> None:
    data = json.dumps(line).encode() + b"\n"
    while data:
        data = data[os.write(results, data) :]


def _sealed(data: bytes) -> int:
    """A file in memory that holds `data` and can no more be changed or made larger."""
    file = os.memfd_create("stdin", os.MFD_ALLOW_SEALING)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]
    os.lseek(file, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def _follow(pid: int, pipes: list[int], most: int, end: float, function: bool) -> dict[str, Any]:
    """Reads the pipes until the process has ended, is out of time, or has said too much; reaps it.

    Closes the pipes. What is kept: `most` bytes of output (of a function: of its value), and
    ERROR_BYTES of errors; more errors, and what a function prints, are thrown away.
    """
    out, err, value = pipes
    kept = {out: bytearray(), err: bytearray(), value: bytearray()}
    room = {out: 0 if function else most, err: ERROR_BYTES, value: most + len(LIMITED)}
    judged = value if function else out
    poll, still = select.poll(), set(pipes)
    for pipe in pipes:
        os.set_blocking(pipe, False)
        poll.register(pipe, select.POLLIN | select.POLLHUP)
    life = pidfd(pid)
    if life is not None:
        poll.register(life, select.POLLIN)
    status, ended = "", False
    while not status and not ended:
        left = end - time.monotonic()
        if left <= 0:
            status = "timeout"
            break
        ready = {fd for fd, _ in poll.poll(1000 * (left if life is not None else min(left, 0.01)))}
        ended = life in ready if life is not None else _has_ended(pid)
        for pipe in sorted(still & ready) if not ended else sorted(still):
            while (part := _read(pipe)) is not None:
                space = room[pipe] - len(kept[pipe])
                kept[pipe] += part[: max(space, 0)]
                if pipe == judged and len(part) > space:
                    status = "output"
                if not part:
                    still.remove(pipe)
                    poll.unregister(pipe)
                if not part or status or not ended:  # after its end a pipe holds little: drain it
                    break
    os.kill(pid, signal.SIGKILL)
    _, code = os.waitpid(pid, 0)
    for descriptor in (*pipes, *([life] if life is not None else [])):
        os.close(descriptor)
    limited, result = kept[value].startswith(LIMITED), kept[value][len(LIMITED) :]
    if not status:
        status = "done" if code == 0 and (result or not function) else "crashed"
    if not limited and status != "timeout":
        status = "failed"
    told = {"status": status, "stdout": kept[out].decode(errors="replace")}
    failed = status in ("crashed", "failed")
    told["error"] = _reason(code, kept[err].decode(errors="replace")) if failed else ""
    if function and status == "done":
        told["result"] = result.decode(errors="replace")
    return told


def pidfd(pid: int) -> int | None:
    """A descriptor that polls as readable once the process has ended; None before Linux 5.3."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _read(pipe: int) -> bytes | None:
    """Some bytes, b"" at the end, None when there is nothing now."""
    try:
        return os.read(pipe, 1 << 16)
    except BlockingIOError:
        return None


def _reason(code: int, errors: str) -> str:
    """The last line of the errors, and how the process ended."""
    how = f"signal {os.WTERMSIG(code)}" if os.WIFSIGNALED(code) else f"exit {os.WEXITSTATUS(code)}"
    lines = errors.strip().splitlines()
    return f"{lines[-1][:300]} ({how})" if lines else how


def _become(
    plan: Plan, limits: dict[str, Any], program: str, function: str, taken: tuple[int, ...]
) -> None:
    """Turns this process into the program's; the arguments of a function come as its input."""
    for target, source in enumerate(taken):
        os.dup2(source, target + 10, inheritable=False)
    for target in range(len(taken)):
        os.dup2(target + 10, target)
    os.closerange(RESULT + 1, 1 << 16)
    os.setsid()
    _limit(limits, plan)
    _streams()
    os.write(RESULT, LIMITED)
    if not function:
        os.close(RESULT)
    if function:
        _exit_after(functools.partial(_call, program, function))
    else:
        _exit_after(functools.partial(_execute, program, "__main__"))


def _execute(program: str, name: str) -> dict[str, Any]:
    """Runs the program as module `name`; its names."""
    sys.argv = [NAME]
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(program, NAME, "exec"), module.__dict__)
    return module.__dict__


def _exit_after(body: Callable[[], object]) -> None:
    """Runs `body` and ends the process as the interpreter would: threads, exit handlers, streams.

    The interpreter's own way out frees every object of the warm heap, which takes six times as
    long as a short program.
    """
    code = 0
    try:
        body()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:  # noqa: BLE001  the program's; its last line is the reason
        # Without the frames: there may be millions.
        print("".join(traceback.format_exception_only(type(error), error)), file=sys.stderr)
        code = 1
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code & 0xFF)


def _limit(limits: dict[str, Any], plan: Plan) -> None:
    """Everything that binds this process, each for good."""
    if plan.user is not None:
        os.setgroups([])
        os.setresgid(plan.user, plan.user, plan.user)
        os.setresuid(plan.user, plan.user, plan.user)
    if plan.alone:
        kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    parent = os.getppid()
    kernel.die_with_parent()  # changing the user has cleared it
    if os.getppid() != parent or (plan.alone and parent != 1):
        os._exit(1)
    for name, value in (
        ("RLIMIT_AS", limits["memory_bytes"]),
        ("RLIMIT_CPU", int(limits["seconds"]) + 1),
        ("RLIMIT_FSIZE", limits["file_bytes"]),
        ("RLIMIT_NOFILE", limits["open_files"]),
        ("RLIMIT_NPROC", limits["processes"] if plan.counted else None),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
    ):
        if value is not None:
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
    if plan.files is not None:
        seccomp.install(os.getpid(), plan.files)


def _streams() -> None:
    """Python's streams over descriptors 0 to 2: ours belonged to the zygote."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
        binary = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
        errors = "backslashreplace" if name == "stderr" else "surrogateescape"
        stream = io.TextIOWrapper(
            binary, encoding="utf-8", errors=errors, line_buffering=name == "stderr"
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _call(program: str, function: str) -> None:
    """Writes the value of `function(*arguments)` as JSON. The function is the program's, or a
    method of its class `Solution`."""
    arguments = json.load(sys.stdin)
    dumps, write, close = json.dumps, os.write, os.close
    names = _execute(program, "solution")
    found = names.get(function)
    if found is None:
        found = getattr(names["Solution"](), function)
    data = dumps(found(*arguments)).encode()
    while data:
        data = data[write(RESULT, data) :]
    close(RESULT)
