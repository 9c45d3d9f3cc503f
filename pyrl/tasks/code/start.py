"""Starts supervisors (`jail.supervisor`): as a command, or as forks of one warm interpreter."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import itertools
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

# Streams are files rather than numbers: an interrupt anywhere closes what nobody holds any more.
Streams = tuple[io.FileIO, io.FileIO, io.FileIO]


class Supervisor:
    """One that runs. `control` is its input and `results` its output, for the caller to use."""

    def __init__(
        self,
        streams: Streams,
        kill: Callable[[], None],
        reap: Callable[[float], None],
        why: Callable[[], str],
    ) -> None:
        """streams: control, results, errors. kill(): ends it. reap(seconds): waits for its end no
        longer than that. why(): what else is known of its end, for one that left no words; it may
        wait a second for that."""
        self.control, self.results, self._errors = streams
        self._kill, self._reap = kill, reap
        self.why = why

    def end(self, seconds: float) -> str:
        """Closes its input, which stops it and leaves nothing of it; its own last words.

        After `seconds` it is killed, and what it started dies with it; twice that is the longest
        that this takes.
        """
        self.control.close()
        with self.results, self._errors:
            errors, in_time = read(self._errors, time.monotonic() + seconds)
            if not in_time:
                self._kill()
                errors += f"killed: it did not end within {seconds:g} s\n".encode()
                errors += read(self._errors, time.monotonic() + seconds)[0]
            self._reap(seconds)
        return errors.decode(errors="replace")


def read(stream: io.FileIO, end: float) -> tuple[bytes, bool]:
    """What comes before the end of the stream and the time `end`; whether the former was first."""
    poll = select.poll()
    poll.register(stream, select.POLLIN | select.POLLHUP)
    parts: list[bytes] = []
    while poll.poll(max(0.0, end - time.monotonic()) * 1000):
        part = stream.read(1 << 16) or b""
        if not part:
            return b"".join(parts), True
        parts.append(part)
    return b"".join(parts), False


def by_command(words: Sequence[str]) -> Supervisor:
    """`words` start it. OSError where they cannot."""
    with _pipes() as (ours, theirs):
        process = _run(words, *(stream.fileno() for stream in theirs))

    def reap(seconds: float) -> None:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:  # it has closed its errors and lives on
            process.kill()
            process.wait()

    return Supervisor(ours, process.kill, reap, lambda: f"exit code {process.returncode}")


def by_fork(mode: str, words: Sequence[str]) -> Supervisor:
    """A fork of this process's launcher (`jail.launcher`), which `words` start where there is none.

    From any thread, and in a process that was forked while another thread was here. OSError where
    it cannot be had.
    """
    return _shared.supervisor(mode, words)


@contextlib.contextmanager
def _pipes() -> Iterator[tuple[Streams, Streams]]:
    """Our ends and the supervisor's of its input, output and errors; closes the supervisor's in the
    end, and ours where it could not be started."""
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        ends: list[tuple[io.FileIO, io.FileIO]] = []
        for mine_writes in (True, False, False):
            reading, writing = os.pipe()
            pair = io.FileIO(reading, "r"), io.FileIO(writing, "w")
            mine, other = reversed(pair) if mine_writes else pair
            ends.append((ours.enter_context(mine), theirs.enter_context(other)))
        (a, x), (b, y), (c, z) = ends
        yield (a, b, c), (x, y, z)
        ours.pop_all()


def _run(words: Sequence[str], stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
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


class _Launcher:
    """The process, and the socket that it takes requests from; it ends when that is closed."""

    def __init__(self, words: Sequence[str]) -> None:
        self.user = (os.geteuid(), os.getegid())
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.settimeout(None)  # whatever the program's default is
        self._ids = itertools.count()
        reading, writing = os.pipe()
        self._errors = io.FileIO(reading, "r")
        with theirs, io.FileIO(writing, "w") as errors:
            self.process = _run(words, theirs.fileno(), subprocess.DEVNULL, errors.fileno())

    def start(self, mode: str, theirs: Streams) -> int:
        """Asks for a supervisor; its number. ConnectionError when the process has ended."""
        number = next(self._ids)
        streams = [stream.fileno() for stream in theirs]
        socket.send_fds(self._link, [f"{mode} {number}".encode()], streams)
        return number

    def kill(self, number: int) -> None:
        """Ends one supervisor, or all where the process does not listen."""
        try:
            self._link.send(f"kill {number}".encode(), socket.MSG_DONTWAIT)
        except OSError:
            self._end()

    def reap(self, seconds: float) -> None:
        """What `Supervisor` reaps by: the process itself does it."""

    def last_words(self) -> str:
        """Why it has ended; "" where it lives a second on: its streams close before its end."""
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            return ""
        said, _ = read(self._errors, time.monotonic() + 1)
        lines = said.decode(errors="replace").strip().splitlines()
        return f"its launcher ended: {(lines or [f'exit code {self.process.returncode}'])[-1]}"

    def close(self) -> None:
        """Ends it, and every supervisor of it at once."""
        self._link.close()
        self._end()
        self.process.wait()

    def _end(self) -> None:
        with contextlib.suppress(PermissionError):  # it is who we were; without its link it ends
            self.process.kill()

    def forget(self) -> None:
        """In a fork of the process that has it: its end is not to be waited for here."""
        self._link.close()
        self.process.returncode = 0


class _Shared:
    """This process's launcher. The lock also keeps a fork from taking a supervisor's ends along."""

    def __init__(self) -> None:
        self.launcher: _Launcher | None = None
        self._lock = threading.RLock()
        atexit.register(self.close)
        os.register_at_fork(
            before=lambda: self._lock.acquire(),
            after_in_parent=lambda: self._lock.release(),
            after_in_child=self._forked,
        )

    def supervisor(self, mode: str, words: Sequence[str]) -> Supervisor:
        with self._lock:
            for _ in range(2):
                fresh = self.launcher is None
                launcher = self._current(words)
                with _pipes() as (ours, theirs):
                    try:
                        number = launcher.start(mode, theirs)
                    except ConnectionError:  # it was killed since
                        self.close()
                        if fresh:
                            raise OSError(launcher.last_words()) from None
                        continue
                kill = functools.partial(launcher.kill, number)
                return Supervisor(ours, kill, launcher.reap, launcher.last_words)
        raise AssertionError("the second launcher is a fresh one")

    def _current(self, words: Sequence[str]) -> _Launcher:
        user = (os.geteuid(), os.getegid())
        if self.launcher is not None and self.launcher.user != user:
            self.close()
        self.launcher = self.launcher or _Launcher(words)
        return self.launcher

    def close(self) -> None:
        with self._lock:
            if self.launcher is not None:
                self.launcher.close()
            self.launcher = None

    def _forked(self) -> None:
        self._lock = threading.RLock()
        if self.launcher is not None:
            self.launcher.forget()
        self.launcher = None


_shared = _Shared()
