"""Processes that make calls, one at a time each, under a deadline: a bad call costs only itself.

Every process has a pipe of its own and a thread here that serves it. No lock or queue is shared
with a process, so one that is killed at any moment, by anyone, leaves nothing locked behind.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any

from pyrl.tasks.worker import check_not_in_script, describe

#: Seconds between looks at whether a silent process still lives: what it has started may hold its
#: end of the pipe open.
LOOK = 0.2

#: Processes that may end while they start before a call is given up for it.
STARTS = 3

#: A new interpreter's program: the parent's import path first, everything else is `worker.main`'s.
BOOT = """\
import pickle, sys
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
sys.path[:] = pickle.loads(pipe.recv_bytes())
from pyrl.tasks.worker import main
main(pipe, int(sys.argv[2]))
"""

STOPPED = "was not computed: the processes were stopped"


class CallLost(Exception):
    """The call has no result; the message continues "the reward …"."""


class Overdue(CallLost):
    """It ran into the deadline."""


class NoProcess(CallLost):
    """No process could be started for it. `problem`: what the process itself says of that."""

    def __init__(self, why: str, problem: str | None = None) -> None:
        super().__init__(f"has no process to run in: {why}")
        self.problem = problem


class Pool:
    """`submit(*call)` is a future of what `serve`'s process answers to `call`.

    serve(connection, *args): the main function of a process, which is a new interpreter: a fork of
    a process with torch's threads may deadlock. It sends None, or a text that says why it cannot
    work, and then an answer to every call it receives. main: it also needs classes that are defined
    in the script of this process, and so runs that script again, with all that it imports.

    A call that outlives `deadline` seconds, or whose process ends, gets `CallLost`; the process is
    killed with its group, and another one started for the next call. At most `waiting` calls are in
    the queue: `submit` waits for room, so that scoring cannot fall behind without end.

    NoProcess when none says within `startup` seconds that it can work.
    """

    def __init__(
        self,
        serve: Callable[..., None],
        args: tuple[Any, ...],
        *,
        workers: int,
        deadline: float,
        startup: float,
        waiting: int = 1024,
        main: bool = False,
    ) -> None:
        self.deadline, self.startup, self.waiting = deadline, startup, waiting
        check_not_in_script()
        again = script() if main else None
        self.orders = pickle.dumps(sys.path), pickle.dumps((sys.argv, again, serve, args))
        self.ready: Future[None] = Future()
        self._calls: deque[tuple[Future[Any], tuple[Any, ...]]] = deque()
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._slots = [_Slot(self) for _ in range(workers)]
        self._threads = [
            threading.Thread(target=target, daemon=True, name="pyrl scoring")
            for target in (*(slot.run for slot in self._slots), self._watch)
        ]
        for thread in self._threads:
            thread.start()
        try:
            self.ready.result()
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._closed.is_set()

    def submit(self, *call: Any) -> Future[Any]:
        """A future of the call's answer, or of `CallLost`. ValueError after `close`."""
        future: Future[Any] = Future()
        with self._changed:
            self._changed.wait_for(lambda: self.closed or len(self._calls) < self.waiting)
            if self.closed:
                raise ValueError("the pool is closed")
            self._calls.append((future, call))
            self._changed.notify_all()
        return future

    def next_call(self) -> tuple[Future[Any], tuple[Any, ...]] | None:
        """The call that has waited longest, when there is one; None when the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or len(self._calls) > 0)
            if self.closed:
                return None
            self._changed.notify_all()
            return self._calls.popleft()

    def close(self) -> None:
        """Kills the processes, also in the middle of a call; what is open gets `CallLost`."""
        with self._changed:
            self._closed.set()
            open_calls = list(self._calls)
            self._calls.clear()
            self._changed.notify_all()
        for future, _ in open_calls:
            future.set_exception(CallLost(STOPPED))
        for slot in self._slots:
            slot.kill()
        for thread in self._threads:
            thread.join()

    def _watch(self) -> None:
        """Kills what is overdue. A thread of its own, because sending to a process that does not
        read may block as well."""
        while not self._closed.wait(min(self.deadline / 20, 0.1)):
            for slot in self._slots:
                slot.kill_if_overdue()


class _Slot:
    """One process after another, and the calls made to it."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.process: Any = None
        self.pipe: Any = None
        self.lifeline: int | None = None
        self._lock = threading.Lock()
        self._due = math.inf
        """When the present call must have ended, by the monotonic clock."""
        self._overdue = False

    def run(self) -> None:
        """Serves calls until the pool is closed. Every call is answered, whatever goes wrong."""
        pool = self.pool
        try:
            self._start()
            _settle(pool.ready, None)
        except BaseException as error:  # noqa: BLE001  else `Pool` would wait for ever
            _settle(pool.ready, error)
        while (job := pool.next_call()) is not None:
            future, call = job
            try:
                future.set_result(self._answer(call))
            except CallLost as error:
                future.set_exception(error)
            except BaseException as error:  # noqa: BLE001  else nobody would serve what follows
                future.set_exception(CallLost(f"could not be computed: {describe(error)}"))
                self._end()
        self._end()

    def _answer(self, call: tuple[Any, ...]) -> Any:
        for left in reversed(range(STARTS)):
            if self.pool.closed:
                raise CallLost(STOPPED)
            try:
                self._start()
                break
            except NoProcess:  # killed from outside, perhaps
                if left == 0:
                    raise
        try:
            message = pickle.dumps(call)
        except BaseException as error:  # noqa: BLE001  whatever an object's own code raises
            raise CallLost(f"cannot be sent to its process: {describe(error)}") from None
        try:
            with self._limit(self.pool.deadline):
                self.pipe.send_bytes(message)
                answer = self._receive()
        except (EOFError, OSError):
            lost = CallLost(self._ending())
            if self._overdue:
                lost = Overdue(f"took longer than its {self.pool.deadline:g} s")
            self._end()
            raise lost from None
        if self._overdue:  # it answered while it was being killed
            self._end()
        return answer

    def _start(self) -> None:
        """Makes sure that there is a process that can work."""
        if self.process is not None and self.process.poll() is None:
            return
        self._end()
        pool = self.pool
        try:
            self.pipe, theirs = multiprocessing.Pipe()
            # It ends when nobody holds the other end of its lifeline, which only this process does.
            line, self.lifeline = os.pipe()
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-c", BOOT, str(theirs.fileno()), str(line)],
                    pass_fds=(theirs.fileno(), line), stdin=subprocess.DEVNULL,
                )  # fmt: skip
            finally:
                theirs.close()
                os.close(line)
        except (OSError, RuntimeError) as error:
            raise NoProcess(str(error)) from error
        self.process = process
        if pool.closed:  # `close` may have looked for a process before there was one
            self.kill()
        try:
            with self._limit(pool.startup):
                for order in pool.orders:
                    self.pipe.send_bytes(order)
                problem = self._receive()
        except (EOFError, OSError):
            late = self._overdue
            why = f"none started within {pool.startup:g} s" if late else f"it {self._ending()}"
            self._end()
            raise NoProcess(why) from None
        if problem is not None:
            self._end()
            raise NoProcess(problem, problem)

    @contextlib.contextmanager
    def _limit(self, seconds: float) -> Iterator[None]:
        """The process is killed if what is inside takes longer."""
        with self._lock:
            self._overdue, self._due = False, time.monotonic() + seconds
        try:
            yield
        finally:
            with self._lock:
                self._due = math.inf

    def kill_if_overdue(self) -> None:
        """The watch's; it cannot hit a later call."""
        with self._lock:
            if self._due <= time.monotonic():
                self._overdue = True
                self.kill()

    def _receive(self) -> Any:
        """EOFError when the process has ended without an answer."""
        while not self.pipe.poll(LOOK):
            if self.process.poll() is not None and not self.pipe.poll():
                raise EOFError
        return pickle.loads(self.pipe.recv_bytes())

    def _ending(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        return f"ended its process: exit code {self.process.returncode}"

    def kill(self) -> None:
        """The process and what it has started. May be called from any thread."""
        process = self.process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # before it leads its group

    def _end(self) -> None:
        process, pipe, lifeline = self.process, self.pipe, self.lifeline
        self.process = self.pipe = self.lifeline = None
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        if pipe is not None:
            pipe.close()
        if lifeline is not None:
            os.close(lifeline)


def script() -> dict[str, str]:
    """How the script that this process runs is run again, as `multiprocessing.spawn` takes it.
    ValueError when it has no file: a notebook, an interactive session."""
    found = sys.modules["__main__"]
    name = getattr(getattr(found, "__spec__", None), "name", None)
    if name is not None:
        return {"init_main_from_name": name}
    path = getattr(found, "__file__", None)
    if path is None or not os.path.isfile(path):
        raise ValueError(
            "what is defined in an interactive session cannot be sent to another process: put the "
            "task's class into a file, or set `trusted = True` on it if scoring cannot hang"
        )
    return {"init_main_from_path": os.path.abspath(path)}


def _settle(future: Future[None], error: BaseException | None) -> None:
    """The first of several outcomes."""
    if not future.done():
        with contextlib.suppress(InvalidStateError):
            future.set_exception(error) if error else future.set_result(None)
