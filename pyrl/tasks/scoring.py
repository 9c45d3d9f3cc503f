"""Scores completions so that no reward function can lose a run."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from pyrl.tasks import worker
from pyrl.tasks.pool import CallLost, NoProcess, Pool
from pyrl.tasks.protocol import Prompt, Task
from pyrl.tasks.registry import loaded_files

#: Scorings that may wait for a process; `submit` waits for room when there are as many.
WAITING = 1024

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


@dataclass(frozen=True)
class Pending:
    """A scoring under way."""

    future: Future[Any]

    def result(self) -> Score:
        """Waits for it. Never raises for what a reward did."""
        return Score(*_result(self.future, "the reward", math.nan))


def _result(future: Future[Any], what: str, missing: Any) -> tuple[Any, str | None]:
    """(value, None), or `missing` and the reason."""
    try:
        return future.result()
    except CallLost as error:
        return missing, f"{what} {error}"


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
        self._pool: Pool | None = None
        self._starting = threading.Lock()
        self._closed = False

    def score(self, items: Sequence[tuple[Prompt, str]], *, answers: bool = False) -> list[Score]:
        """The scores in the order of the items.

        answers: also `task.answer(*items[i])`, in calls of their own after the rewards', each under
        the same deadline, so that no reward depends on whether answers were asked for. A call that
        fails leaves `answer_error`. ValueError when the task has no method `answer`.
        """
        self._check(answers)
        pending = [self.submit(prompt, completion) for prompt, completion in items]
        scores = [one.result() for one in pending]
        return self.with_answers(items, scores) if answers else scores

    def submit(self, prompt: Prompt, completion: str) -> Pending:
        """Starts one scoring and does not wait for it: sampling goes on meanwhile. It does wait for
        room where more than `WAITING` are open. May be called from any thread."""
        self._check()
        if self._in_process:
            return Pending(self._here("score", prompt, completion))
        return Pending(self._started().submit("score", prompt, completion))

    def with_answers(
        self, items: Sequence[tuple[Prompt, str]], scores: Sequence[Score]
    ) -> list[Score]:
        """The scores of the items, with what the items answer; see `score`."""
        self._check(answers=True)
        if self._in_process:
            told = [self._here("answer", *item) for item in items]
        else:
            pool = self._started() if items else None
            told = [pool.submit("answer", *item) for item in items] if pool else []
        return [
            replace(score, answer=answer, answer_error=error)
            for score, (answer, error) in zip(
                scores, (_result(one, "the answer", None) for one in told), strict=True
            )
        ]

    def close(self) -> None:
        """Ends the processes, also in the middle of an item. May be called twice."""
        self._closed = True
        with self._starting:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check(self, answers: bool = False) -> None:
        if self._closed:
            raise ValueError("this Scorer is closed")
        if answers and not self.has_answers:
            raise ValueError(f"task {self._task.name!r} has no method 'answer'")

    def _here(self, name: str, prompt: Prompt, completion: str) -> Future[Any]:
        """The call in this process, made."""
        future: Future[Any] = Future()
        judge = worker.judged if name == "score" else worker.told
        try:
            future.set_result(judge(getattr(self._task, name)(prompt, completion)))
        except CHECK_ERRORS as error:
            missing = math.nan if name == "score" else None
            future.set_result((missing, worker.describe(error)))
        return future

    def _started(self) -> Pool:
        """The pool, of which one process has said that it can score."""
        with self._starting:
            if self._pool is not None:
                return self._pool
            try:
                self._pool = Pool(
                    worker.serve,
                    (self._payload, loaded_files()),
                    workers=self._workers,
                    deadline=self._deadline,
                    startup=self._startup,
                    waiting=WAITING,
                )
            except NoProcess as error:
                if error.problem is not None:
                    raise RuntimeError(f"a scoring process cannot work: {error.problem}") from None
                raise RuntimeError(
                    f"scoring cannot start: the reward {error}. A script that trains must do so "
                    "under `if __name__ == '__main__':`, because a scoring process imports it again"
                ) from error
            return self._pool


def _pickled(task: Task) -> bytes:
    try:
        return pickle.dumps(task)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"task {task.name!r} cannot be sent to a scoring process ({error}). Define its class "
            "at the top level of a module or file, and keep open files, models and lambdas out of "
            "its attributes; or, if scoring cannot hang, set `trusted = True` on the class"
        ) from None
