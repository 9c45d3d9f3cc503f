"""Forks a supervisor a request, so that a sandbox does not wait for an interpreter to start.

    caller ── launcher ── supervisor …

No program, and nothing of a request but its mode, ever comes to this process: each supervisor is a
fork of one that has run nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import resource
import select
import signal
import socket
from collections.abc import Callable
from typing import Any

from . import cases, kernel, supervisor

LINK = 0  # the socket that requests come by; its end is the order to stop
_MESSAGE_BYTES = 64


def serve() -> Callable[[], Any]:
    """A message is a mode, a number and three descriptors: a supervisor's input, output and errors;
    or "kill" and a number.

    The third stays open here until the supervisor has been reaped, after a line with its exit code
    unless that is 0: whoever reads it to the end knows that nothing is left. Returns in a
    supervisor's process, what is to be run there.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the caller's came along
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cases.preload()
    gc.freeze()  # forks share the pages of what exists by now
    link = socket.socket(fileno=LINK)
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, _note)
    launcher = os.getpid()
    running: dict[int, tuple[str, int]] = {}  # process → number, errors
    poll = select.poll()
    for descriptor in (LINK, woken):
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if woken in ready:
            os.read(woken, 1 << 12)
            _reap(running)
        if LINK not in ready:
            continue
        message, taken, _, _ = socket.recv_fds(link, _MESSAGE_BYTES, 3)
        if not message:
            os._exit(0)  # what still runs dies with its parent
        mode, _, number = message.decode().partition(" ")
        if mode == "kill":
            for one, (its, _) in running.items():
                if its == number:
                    os.kill(one, signal.SIGKILL)  # not reaped yet: the id is its own
        elif len(taken) == 3:
            pid = _fork(taken)
            if pid == 0:
                link.detach()
                return functools.partial(_become, mode, taken, launcher)
            if pid is not None:
                running[pid] = (number, taken.pop())
        for descriptor in taken:
            os.close(descriptor)


def _fork(taken: list[int]) -> int | None:
    """As os.fork; None, and a word to the caller, where there can be no more processes."""
    try:
        return os.fork()
    except OSError as error:
        _say(taken[2], f"no process for it: {error}")
        return None


def _note(*_: object) -> None:
    """A handler has to be there for the signal to wake `serve`."""


def _reap(running: dict[int, tuple[str, int]]) -> None:
    """Those that have ended: a line of how, and the end of what they said."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        _, errors = running.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            _say(errors, f"exit code {code}")
        os.close(errors)


def _say(errors: int, line: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(errors, line.encode() + b"\n")


def _become(mode: str, taken: list[int], launcher: int) -> Callable[[], None]:
    """Turns this process into a supervisor, which ends with its launcher."""
    kernel.die_with_parent()
    if os.getppid() != launcher:  # it has ended already
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()  # its signals to its group are not for others
    for target, source in enumerate(taken):
        os.dup2(source, target)
    os.closerange(3, 1 << 16)
    return supervisor.main(mode)
