"""The inside of a scoring process (see `scoring`): one task, and calls of its methods."""

from __future__ import annotations

import contextlib
import math
import multiprocessing.spawn
import numbers
import os
import pickle
import reprlib
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from pyrl.tasks.protocol import Prompt, Task

ERROR_LENGTH = 500

_task: Task | None = None
_runs_script = False
_problem: str | None = "the process was not started by pyrl.tasks.scoring"


def main(pipe: Connection, lifeline: int) -> None:
    """A process of `pool.Pool`: (arguments of the parent, its script or None, serve, args) come
    first, and then `serve(pipe, *args)` works."""
    global _runs_script
    _lead_group(lifeline)
    try:
        sys.argv[:], script, serve, args = pickle.loads(pipe.recv_bytes())
        if script is not None:
            _runs_script = True
            multiprocessing.spawn.prepare(script)
            _runs_script = False
    except BaseException as error:  # noqa: BLE001  said to the parent, which gives up
        pipe.send(f"it could not begin: {describe(error)}")
        return
    serve(pipe, *args)


def check_not_in_script() -> None:
    """RuntimeError while a scoring process runs the parent's script, which would start others."""
    if _runs_script:
        raise RuntimeError(
            "a script that defines its task and scores must do the latter under "
            "`if __name__ == '__main__':`, because a scoring process imports it"
        )


def start(payload: bytes, files: dict[str, str]) -> None:
    """Prepares the process and loads the task; a failure is kept."""
    global _task, _problem
    _silence()
    try:
        from pyrl.tasks.registry import load_file

        for name, path in files.items():
            load_file(path, name)
        _task, _problem = pickle.loads(payload), None
    except BaseException as error:  # noqa: BLE001  user code; its failure is reported
        _problem = describe(error)


def serve(connection: Connection, payload: bytes, files: dict[str, str]) -> None:
    """A scoring process: loads the task, answers ("score" | "answer", prompt, completion)."""
    start(payload, files)
    failed = None if _problem is None else f"it could not load the task: {_problem}"
    answer_calls(connection, lambda name, *item: CALLS[name](*item), failed)


def answer_calls(
    connection: Connection, call: Callable[..., Any], problem: str | None = None
) -> None:
    """What a process of `pool.Pool` does: says why it cannot work, if it cannot, and then sends
    `call(*arguments)` for the arguments that come, until the pipe is closed."""
    connection.send(problem)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            arguments = pickle.loads(message)
        except BaseException as error:  # noqa: BLE001  a class that cannot be made here
            connection.send((None, f"could not be received by its process: {describe(error)}"))
            continue
        connection.send(call(*arguments))


def score(prompt: Prompt, completion: str) -> tuple[float, str | None]:
    """`judged` of the task's reward; NaN and the reason when there is none."""
    if _task is None:
        return math.nan, f"the task could not be loaded: {_problem}"
    try:
        return judged(_task.score(prompt, completion))
    except BaseException as error:  # noqa: BLE001  whatever a reward raises costs one sample
        return math.nan, describe(error)


def answer(prompt: Prompt, completion: str) -> tuple[str | None, str | None]:
    """`told` of the task's answer; None and the reason when it cannot be told."""
    if _task is None:
        return None, f"the task could not be loaded: {_problem}"
    try:
        return told(_task.answer(prompt, completion))  # type: ignore[attr-defined]
    except BaseException as error:  # noqa: BLE001  whatever the task raises costs one answer
        return None, describe(error)


CALLS = {"score": score, "answer": answer}


def told(answer: Any) -> tuple[str | None, str | None]:
    """(answer, None) for a string or None, else None and what is wrong with it."""
    if answer is None:
        return None, None
    if isinstance(answer, str):
        return str.__str__(answer), None  # of a subclass only the text
    return None, f"the answer is no string: {short(answer)}"


def judged(reward: Any) -> tuple[float, str | None]:
    """A real number that is finite in float32 (bool, int, float, Fraction, NumPy scalar,
    one-element tensor) and None; or NaN and what is wrong with it, in short: a reward can be huge,
    or not picklable.
    """
    number = reward
    if not isinstance(number, numbers.Real) and hasattr(number, "item"):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            number = number.item()  # np.bool_, a 0-d array or tensor; larger ones refuse
    if not isinstance(number, numbers.Real):
        return math.nan, f"the reward is no number: {short(reward)}"
    value = float(number)
    if not math.isfinite(value):
        return math.nan, f"the reward is {value}"
    try:
        struct.pack("<f", value)  # advantages are computed in float32
    except OverflowError:
        return math.nan, f"the reward is {value:g}, beyond float32"
    return value, None


def short(value: Any) -> str:
    """Type and abbreviated repr."""
    return f"{type(value).__name__} {reprlib.repr(value)}"[:ERROR_LENGTH]


def describe(error: BaseException) -> str:
    """Type, message and the line that raised, abbreviated."""
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    text = text if len(text) <= ERROR_LENGTH else text[:ERROR_LENGTH] + " …"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return text + place


def _lead_group(lifeline: int) -> None:
    """A session of its own: Ctrl-C in the terminal is the parent's, and a kill reaches what the
    process has started as well. Ends with its parent, however that ends: then nobody holds the
    other end of the lifeline."""
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: _kill_group())

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(lifeline, 1)
        _kill_group()

    threading.Thread(target=wait, daemon=True).start()


def _kill_group() -> None:
    os.killpg(0, signal.SIGKILL)


def _silence() -> None:
    """Sends the process's output nowhere, also that of C code and of its children."""
    with contextlib.suppress(OSError), open(os.devnull, "r+b") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
