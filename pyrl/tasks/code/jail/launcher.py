"""Forks a supervisor a request, so that a sandbox does not wait for an interpreter to start.

    caller ── launcher ── supervisor …

No program, and nothing of a request but its mode, ever comes to this process: each supervisor is a
fork of one that has run nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
from collections.abc import Callable
from typing import Any

from . import cases, supervisor

LINK = 0  # the socket that requests come by; its end is the order to stop
_MODE_BYTES = 64


def serve() -> Callable[[], Any]:
    """A message is a mode and three descriptors: a supervisor's input, output and errors.

    The third stays open here until the supervisor has been reaped, after a line with its exit code
    unless that is 0: whoever reads it to the end knows that nothing is left. Returns in a
    supervisor's process, what is to be run there.
    """
    cases.preload()
    link = socket.socket(fileno=LINK)
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, _note)
    errors: dict[int, int] = {}  # of each supervisor's process
    poll = select.poll()
    for descriptor in (LINK, woken):
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if woken in ready:
            os.read(woken, 1 << 12)
            _reap(errors)
        if LINK in ready:
            mode, taken, _, _ = socket.recv_fds(link, _MODE_BYTES, 3)
            if not mode:
                os._exit(0)  # what still runs dies with its parent
            pid = os.fork()
            if pid == 0:
                link.detach()
                return functools.partial(_become, mode.decode(), taken)
            errors[pid] = taken.pop()
            for descriptor in taken:
                os.close(descriptor)


def _note(*_: object) -> None:
    """A handler has to be there for the signal to wake `serve`."""


def _reap(errors: dict[int, int]) -> None:
    """Those that have ended: a line of how, and the end of what they said."""
    while errors:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        descriptor = errors.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            with contextlib.suppress(OSError):  # nobody listens, or nobody reads
                os.write(descriptor, f"exit code {code}\n".encode())
        os.close(descriptor)


def _become(mode: str, taken: list[int]) -> Callable[[], None]:
    """Turns this process into a supervisor."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()  # its signals to its group are not for others
    for target, source in enumerate(taken):
        os.dup2(source, target)
    os.closerange(3, 1 << 16)
    return supervisor.main(mode)
