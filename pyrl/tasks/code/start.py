"""Starts supervisors (`jail.supervisor`): as a command, or as forks of one warm interpreter."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence


class Supervisor:
    """One that runs. `control` is its input and `results` its output, for the caller to use."""

    def __init__(self, streams: Sequence[int], finish: Callable[[bool], None]) -> None:
        """streams: control, results, errors. finish(in_time): kills it unless in_time; reaps."""
        self.control, self.results, self._errors = streams
        self._finish = finish

    def end(self, seconds: float) -> str:
        """Closes its input, which stops it and leaves nothing of it; its own last words.

        After `seconds` it is killed, and what it started dies with it.
        """
        os.close(self.control)
        errors, in_time = read(self._errors, time.monotonic() + seconds)
        self._finish(in_time)
        for stream in (self.results, self._errors):
            os.close(stream)
        return errors.decode(errors="replace")


def read(stream: int, end: float) -> tuple[bytes, bool]:
    """What comes before the end of the stream and the time `end`; whether the former was first."""
    poll = select.poll()
    poll.register(stream, select.POLLIN | select.POLLHUP)
    parts: list[bytes] = []
    while poll.poll(max(0.0, end - time.monotonic()) * 1000):
        part = os.read(stream, 1 << 16)
        if not part:
            return b"".join(parts), True
        parts.append(part)
    return b"".join(parts), False


def by_command(words: Sequence[str]) -> Supervisor:
    """`words` start it."""
    with _pipes() as (ours, theirs):
        process = _start(words, *theirs)
    return Supervisor(ours, lambda in_time: _reap(process, in_time))


def by_fork(mode: str, words: Sequence[str]) -> Supervisor:
    """A fork of this process's launcher (`jail.launcher`), which `words` start where there is none.

    From any thread, and from a process that was forked while another thread was here.
    """
    with _pipes() as (ours, theirs):
        launcher = _shared.send(mode, theirs, words)

    def finish(in_time: bool) -> None:
        if not in_time:
            launcher.close()

    return Supervisor(ours, finish)


@contextlib.contextmanager
def _pipes() -> Iterator[tuple[list[int], list[int]]]:
    """Our ends and the supervisor's of its input, output and errors. Closes the supervisor's in
    the end, and ours where it could not be started."""
    (theirs_in, ours_in), (ours_out, theirs_out), (ours_err, theirs_err) = (
        os.pipe() for _ in range(3)
    )
    ours, theirs = [ours_in, ours_out, ours_err], [theirs_in, theirs_out, theirs_err]
    try:
        yield ours, theirs
    except BaseException:
        for stream in ours:
            os.close(stream)
        raise
    finally:
        for stream in theirs:
            os.close(stream)


def _start(words: Sequence[str], stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        words,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=_environment(),
        cwd="/",
        start_new_session=True,  # its signals to its group are not for us
    )


def _environment() -> dict[str, str]:
    """All that a program finds in `os.environ`: nothing of the user's."""
    told = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
    told |= {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}  # a set's order is the same in every run
    if sys.dont_write_bytecode:
        told["PYTHONDONTWRITEBYTECODE"] = "1"
    return told


def _reap(process: subprocess.Popen[bytes], in_time: bool) -> None:
    if not in_time:
        process.kill()
    process.wait()


class _Launcher:
    """The process, and the socket that it takes requests from; it ends when that is closed."""

    def __init__(self, words: Sequence[str]) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = _start(words, theirs.fileno(), subprocess.DEVNULL, subprocess.DEVNULL)

    def send(self, mode: str, streams: Sequence[int]) -> None:
        """OSError when it has ended."""
        socket.send_fds(self._link, [mode.encode()], streams)

    def close(self) -> None:
        """Ends it, and every supervisor of it at once."""
        self._link.close()
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """In a fork of the process that has it: its end is not to be waited for here."""
        self._link.close()
        self._process.returncode = 0


class _Shared:
    """This process's launcher."""

    def __init__(self) -> None:
        self._launcher: _Launcher | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forked)

    def send(self, mode: str, streams: Sequence[int], words: Sequence[str]) -> _Launcher:
        with self._lock:
            for _ in range(2):
                fresh = self._launcher is None
                launcher = self._launcher = self._launcher or _Launcher(words)
                try:
                    launcher.send(mode, streams)
                except OSError:  # it was killed since
                    launcher.close()
                    self._launcher = None
                    if fresh:
                        raise
                else:
                    return launcher
        raise AssertionError("the second launcher is a fresh one")

    def close(self) -> None:
        with self._lock:
            if self._launcher is not None:
                self._launcher.close()
            self._launcher = None

    def _forked(self) -> None:
        self._lock = threading.Lock()
        if self._launcher is not None:
            self._launcher.forget()
        self._launcher = None


_shared = _Shared()
