"""Scores completions so that no reward function can lose a run."""

from __future__ import annotations

import math
import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from pyrl.tasks import worker
from pyrl.tasks.protocol import Prompt, Task
from pyrl.tasks.registry import loaded_files

if TYPE_CHECKING:
    from pebble import ProcessFuture, ProcessPool

T = TypeVar("T")

#: What a pure check raises when it has a bug. In-process scoring loses the sample for these.
CHECK_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Score:
    """A reward, or NaN and the reason why there is none."""

    reward: float
    error: str | None = None
    answer: str | None = None
    """The final answer, if it was asked for; None where the completion has none."""
    answer_error: str | None = None
    """Why it is not known whether, and what, the completion answers."""


class Scorer:
    """`score(items)[i].reward = task.score(*items[i])`, whatever `task.score` does.

    A call that raises, exits, crashes, is still running after `deadline` seconds, or returns
    anything but a number that is finite in float32 gets `Score(nan, reason)`; all the other items
    get their rewards.

    A task runs in `workers` processes of its own, which can be killed; they start on the first
    call, are replaced when they die, and end with `close()`, or with this process however that
    ends. Processes are spawned, not forked: a fork of a process with torch's threads may deadlock.
    What a reward prints is discarded. A task that declares `trusted = True` (pure, bounded code,
    such as this package's own string checks) is called right here instead: a process adds nothing
    where nothing can hang, and costs a copy of every completion.

    Raises ValueError for workers < 1, deadline <= 0, or a task that cannot be sent to a process,
    and RuntimeError when processes cannot be started.
    """

    def __init__(
        self, task: Task, workers: int = 1, deadline: float = 10.0, *, startup: float = 120.0
    ) -> None:
        """startup: seconds a process may take until it has loaded the task."""
        if workers < 1:
            raise ValueError(f"workers={workers}: expected at least 1")
        if not deadline > 0:
            raise ValueError(f"deadline={deadline}: expected seconds > 0")
        self._task, self._workers, self._deadline, self._startup = task, workers, deadline, startup
        #: Whether the task can tell a completion's final answer.
        self.has_answers = callable(getattr(task, "answer", None))
        self._in_process = getattr(task, "trusted", False) is True
        self._payload = b"" if self._in_process else _pickled(task)
        self._pool: ProcessPool | None = None
        self._closed = False

    def score(self, items: Sequence[tuple[Prompt, str]], *, answers: bool = False) -> list[Score]:
        """The scores in the order of the items.

        answers: also `task.answer(*items[i])`, in calls of their own after the rewards', each under
        the same deadline, so that no reward depends on whether answers were asked for. A call that
        fails leaves `answer_error`. ValueError when the task has no method `answer`.
        """
        if self._closed:
            raise ValueError("this Scorer is closed")
        if answers and not self.has_answers:
            raise ValueError(f"task {self._task.name!r} has no method 'answer'")
        if not items:
            return []
        if self._in_process:
            scores = [self._score_here(prompt, completion) for prompt, completion in items]
        else:
            found = self._mapped(worker.score, items, "the reward", math.nan)
            scores = [Score(*pair) for pair in found]
        if not answers:
            return scores
        told = (
            [self._answer_here(prompt, completion) for prompt, completion in items]
            if self._in_process
            else self._mapped(worker.answer, items, "the answer", None)
        )
        return [
            replace(score, answer=answer, answer_error=error)
            for score, (answer, error) in zip(scores, told, strict=True)
        ]

    def _mapped(
        self,
        call: Callable[[Prompt, str], tuple[T, str | None]],
        items: Sequence[tuple[Prompt, str]],
        what: str,
        missing: T,
    ) -> list[tuple[T, str | None]]:
        """`call` of every item in the processes; `missing` and the reason where it ended badly."""
        pool = self._started()
        futures = [pool.schedule(call, args=item, timeout=self._deadline) for item in items]
        return [self._result(future, what, missing) for future in futures]

    def close(self) -> None:
        """Ends the processes, also in the middle of an item. May be called twice."""
        self._closed = True
        self._stop()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _score_here(self, prompt: Prompt, completion: str) -> Score:
        try:
            return Score(*worker.judged(self._task.score(prompt, completion)))
        except CHECK_ERRORS as error:
            return Score(math.nan, worker.describe(error))

    def _answer_here(self, prompt: Prompt, completion: str) -> tuple[str | None, str | None]:
        try:
            return worker.told(self._task.answer(prompt, completion))  # type: ignore[attr-defined]
        except CHECK_ERRORS as error:
            return None, worker.describe(error)

    def _started(self) -> ProcessPool:
        """The pool, after its processes have said that they can score."""
        if self._pool is not None and self._pool.active:
            return self._pool
        self._stop()
        import pebble

        self._pool = pebble.ProcessPool(
            max_workers=self._workers,
            initializer=worker.start,
            initargs=(self._payload, loaded_files()),
            context=multiprocessing.get_context("spawn"),
        )
        try:
            problem = self._pool.schedule(worker.problem).result(timeout=self._startup)
        except (FutureTimeoutError, BrokenProcessPool, pebble.ProcessExpired) as error:
            self._stop()
            raise RuntimeError(
                f"no scoring process started within {self._startup:g} s "
                f"({type(error).__name__}). A script that trains must do so under "
                "`if __name__ == '__main__':`, because a scoring process imports it again"
            ) from error
        except BaseException:
            self._stop()
            raise
        if problem is not None:
            self._stop()
            raise RuntimeError(f"a scoring process could not load the task: {problem}")
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _result(
        self, future: ProcessFuture[tuple[T, str | None]], what: str, missing: T
    ) -> tuple[T, str | None]:
        from pebble import ProcessExpired

        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, (TimeoutError, FutureTimeoutError)):
            return missing, f"{what} took longer than its {self._deadline:g} s"
        if isinstance(error, ProcessExpired):
            return missing, f"{what} ended its process: exit code {error.exitcode}"
        return missing, worker.describe(error)


def _pickled(task: Task) -> bytes:
    try:
        return pickle.dumps(task)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"task {task.name!r} cannot be sent to a scoring process ({error}). Define its class "
            "at the top level of a module or file, and keep open files, models and lambdas out of "
            "its attributes; or, if scoring cannot hang, set `trusted = True` on the class"
        ) from None
