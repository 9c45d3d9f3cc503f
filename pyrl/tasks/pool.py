"""Processes that make calls, one at a time each, under a deadline: a bad call costs only itself.

Every process has a pipe of its own and a thread here that serves it. No lock or queue is shared
with a process, so one that is killed at any moment, by anyone, leaves nothing locked behind.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

#: Seconds between looks at whether a silent process still lives: what it has started may hold its
#: end of the pipe open.
LOOK = 0.2

#: Processes that may end while they start before a call is given up for it.
STARTS = 3

STOPPED = "was not computed: the processes were stopped"


class CallLost(Exception):
    """The call has no result; the message continues "the reward …"."""


class NoProcess(CallLost):
    """No process could be started for it. `problem`: what the process itself says of that."""

    def __init__(self, why: str, problem: str | None = None) -> None:
        super().__init__(f"has no process to run in: {why}")
        self.problem = problem


class Pool:
    """`submit(*call)` is a future of what `serve`'s process answers to `call`.

    serve(connection, *args): the main function of a process (spawned, not forked: a fork of a
    process with torch's threads may deadlock). It sends None, or a text that says why it cannot
    work, and then an answer to every call it receives; it leads a process group of its own.

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
    ) -> None:
        self.deadline, self.startup = deadline, startup
        self._serve, self._args = serve, args
        self._context = multiprocessing.get_context("spawn")
        self._calls: queue.Queue[tuple[Future[Any], tuple[Any, ...]] | None] = queue.Queue(waiting)
        self._closed = threading.Event()
        self._ready: Future[None] = Future()
        self._slots = [_Slot(self) for _ in range(workers)]
        self._threads = [
            threading.Thread(target=target, daemon=True, name="pyrl scoring")
            for target in (*(slot.run for slot in self._slots), self._watch)
        ]
        for thread in self._threads:
            thread.start()
        try:
            self._ready.result()
        except BaseException:
            self.close()
            raise

    def submit(self, *call: Any) -> Future[Any]:
        """A future of the call's answer, or of `CallLost`. ValueError after `close`."""
        future: Future[Any] = Future()
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._calls.put((future, call), timeout=1.0)
                return future
        raise ValueError("the pool is closed")

    def close(self) -> None:
        """Kills the processes, also in the middle of a call; what is open gets `CallLost`."""
        self._closed.set()
        for slot in self._slots:
            slot.kill()
        for _ in self._slots:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(queue.Empty):  # a `submit` at the same moment
            while (job := self._calls.get_nowait()) is not None:
                job[0].set_exception(CallLost(STOPPED))

    def _watch(self) -> None:
        """Kills what is overdue. A thread of its own, because sending to a process that does not
        read may block as well."""
        while not self._closed.wait(min(self.deadline / 20, 0.1)):
            for slot in self._slots:
                if slot.due <= time.monotonic():
                    slot.overdue = True
                    slot.kill()


class _Slot:
    """One process after another, and the calls made to it."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.due = math.inf
        """When the present call must have ended, by the monotonic clock."""
        self.overdue = False
        self.process: Any = None
        self.pipe: Any = None

    def run(self) -> None:
        """Serves calls until the pool is closed."""
        pool = self.pool
        try:
            self._start()
        except NoProcess as error:
            _settle(pool._ready, error)
        else:
            _settle(pool._ready, None)
        while True:
            job = pool._calls.get()
            if job is None:
                break
            future, call = job
            try:
                for left in reversed(range(STARTS)):
                    if pool._closed.is_set():
                        raise CallLost(STOPPED)
                    try:
                        self._start()
                        break
                    except NoProcess:  # killed from outside, perhaps
                        if left == 0:
                            raise
                answer = self._call(call)
            except CallLost as error:
                future.set_exception(error)
            else:
                future.set_result(answer)
        self._end()

    def _start(self) -> None:
        """Makes sure that there is a process that can work."""
        if self.process is not None and self.process.is_alive():
            return
        self._end()
        pool = self.pool
        self.pipe, theirs = pool._context.Pipe()
        # A daemon: it ends with this process, even if nobody calls `close`.
        process = pool._context.Process(target=pool._serve, args=(theirs, *pool._args), daemon=True)
        try:
            process.start()
        except (OSError, RuntimeError) as error:
            raise NoProcess(str(error)) from error
        finally:
            theirs.close()
        self.process = process
        if pool._closed.is_set():  # `close` may have looked for a process before there was one
            self.kill()
        self.overdue, self.due = False, time.monotonic() + pool.startup
        try:
            problem = self._receive()
        except (EOFError, OSError):
            late = self.overdue
            why = f"none started within {pool.startup:g} s" if late else f"it {self._ending()}"
            self._end()
            raise NoProcess(why) from None
        finally:
            self.due = math.inf
        if problem is not None:
            self._end()
            raise NoProcess(problem, problem)

    def _call(self, call: tuple[Any, ...]) -> Any:
        try:
            message = pickle.dumps(call)
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
            raise CallLost(f"cannot be sent to its process: {error}") from None
        self.overdue, self.due = False, time.monotonic() + self.pool.deadline
        try:
            self.pipe.send_bytes(message)
            return self._receive()
        except (EOFError, OSError):
            late = self.overdue
            ending = f"took longer than its {self.pool.deadline:g} s" if late else self._ending()
            self._end()
            raise CallLost(ending) from None
        finally:
            self.due = math.inf

    def _receive(self) -> Any:
        """EOFError when the process has ended without an answer."""
        wait = multiprocessing.connection.wait
        while not wait([self.pipe, self.process.sentinel], LOOK):
            if not self.process.is_alive():
                break
        if not self.pipe.poll():
            raise EOFError
        return pickle.loads(self.pipe.recv_bytes())

    def _ending(self) -> str:
        self.process.join(1.0)
        return f"ended its process: exit code {self.process.exitcode}"

    def kill(self) -> None:
        """The process and what it has started. May be called from any thread."""
        process = self.process
        if process is None or process.pid is None:
            return
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(ValueError):  # closed meanwhile
            process.kill()

    def _end(self) -> None:
        if self.process is None:
            return
        self.kill()
        self.process.join()
        self.pipe.close()
        self.process = self.pipe = None


def _settle(future: Future[None], error: Exception | None) -> None:
    """The first of several outcomes."""
    if not future.done():
        with contextlib.suppress(InvalidStateError):
            future.set_exception(error) if error else future.set_result(None)
