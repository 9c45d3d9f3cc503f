"""Reads one request, lets `cases` run it, and ends with everything that it started.

    caller ── supervisor ── (namespaces) ── zygote ── one process a call

The request comes on standard input as a length and JSON; results go to standard output, a line of
JSON each. The end of standard input is the order to stop: the caller closes it, or has died.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import struct
from collections.abc import Callable
from typing import Any

from . import cases, kernel, namespaces, seccomp

CONTROL, RESULTS = 0, 1


def main(mode: str) -> Callable[[], None]:
    """Serves one request. Returns in the process of a call only: what it returns is to be run.

    mode: "namespaces" makes its own; "inside" finds itself in a sandbox with a process namespace
    and a root of its own; "rlimits" has neither.
    """
    parent = os.getppid()
    kernel.die_with_parent()
    _die_first()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # no process of the same user may trace ours
    request: dict[str, Any] = json.loads(_read(struct.unpack("<Q", _read(8))[0]))
    try:
        plan = _prepare(mode, request)
        kernel.die_with_parent()  # entering namespaces has cleared it
        if os.getppid() != parent:
            os._exit(1)
        alive, held = os.pipe()  # the second end is this process's alone: it closes with it
        zygote = os.fork()
    except OSError as error:
        os.write(RESULTS, json.dumps({"error": str(error)}).encode() + b"\n")
        os._exit(1)
    if zygote != 0:
        os.close(RESULTS)  # its end tells the caller that the zygote's is there
        _watch(zygote, plan.alone)
        os._exit(0)
    kernel.die_with_parent()
    os.close(held)
    if select.select([alive], [], [], 0)[0]:  # it had ended before that was said
        os._exit(1)
    os.close(alive)
    results = os.dup(RESULTS)
    os.close(CONTROL)
    os.close(RESULTS)
    return cases.run(request, plan, results)


def _die_first() -> None:
    """When the machine is out of memory, the kernel ends this and what it starts before others."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _read(count: int) -> bytes:
    """Exactly `count` bytes of the request; ends the process when the caller has gone."""
    parts = []
    while count > 0:
        part = os.read(CONTROL, min(count, 1 << 20))
        if not part:
            os._exit(1)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _prepare(mode: str, request: dict[str, Any]) -> cases.Plan:
    """Enters what `mode` says. OSError with the reason where that cannot be had."""
    filtered = bool(request["filter"])
    missing = seccomp.reason() if filtered else "it is turned off"
    if mode != "namespaces":
        if missing:
            raise OSError(f"there is no filter of system calls: {missing}")
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        if mode == "inside":
            return cases.Plan(files="read", user=None, alone=False, tmp=False, counted=False)
        cases.preload()
        user = namespaces.another_user() if os.geteuid() == 0 else None
        return cases.Plan(files="none", user=user, alone=False, tmp=False, counted=user is not None)
    as_root = os.geteuid() == 0
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # the maps of users are files of this process
    wide = namespaces.enter()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    # RLIMIT_NPROC never binds root, and before Linux 5.14 it counts all processes of a user.
    release = tuple(int(n) for n in re.findall(r"\d+", os.uname().release)[:2])
    counted = wide or (not as_root and release >= (5, 14))
    if missing and not counted:
        raise OSError(f"nothing bounds the number of processes, and there is no filter: {missing}")
    return cases.Plan(
        files=None if missing else "all",
        user=1 if wide else None,
        alone=True,
        tmp=True,
        counted=counted,
    )


def _watch(zygote: int, alone: bool) -> None:
    """Until the zygote ends, or the caller wants it to; then nothing of it is left."""
    waiting = select.poll()
    waiting.register(CONTROL, select.POLLIN | select.POLLHUP)
    life = cases.pidfd(zygote)
    if life is not None:
        waiting.register(life, select.POLLIN)
    while not waiting.poll(None if life is not None else 20):
        if os.waitid(os.P_PID, zygote, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
    os.kill(zygote, signal.SIGKILL)  # not reaped yet: the id is its own
    os.waitpid(zygote, 0)  # in a namespace of processes: returns after the last one has ended
    if not alone:
        cases.reap()
