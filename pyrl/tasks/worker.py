"""The inside of a scoring process (see `scoring`): one task, and calls of its methods."""

from __future__ import annotations

import contextlib
import math
import multiprocessing.connection
import numbers
import os
import pickle
import reprlib
import signal
import struct
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from pyrl.tasks.protocol import Prompt, Task

ERROR_LENGTH = 500

_task: Task | None = None
_problem: str | None = "the process was not started by pyrl.tasks.scoring"


def start(payload: bytes, files: dict[str, str]) -> None:
    """Prepares the process and loads the task; a failure is kept."""
    global _task, _problem
    _die_with_parent()
    _own_group()
    _silence()
    try:
        from pyrl.tasks.registry import load_file

        for name, path in files.items():
            load_file(path, name)
        _task, _problem = pickle.loads(payload), None
    except BaseException as error:  # noqa: BLE001  user code; its failure is reported
        _problem = describe(error)


def serve(connection: Connection, payload: bytes, files: dict[str, str]) -> None:
    """The process: says whether it can work, then answers calls ("score" | "answer", prompt,
    completion) until the pipe is closed."""
    start(payload, files)
    connection.send(None if _problem is None else f"it could not load the task: {_problem}")
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            name, prompt, completion = pickle.loads(message)
        except BaseException as error:  # noqa: BLE001  a class that cannot be made here
            connection.send((None, f"could not be received by its process: {describe(error)}"))
            continue
        connection.send(CALLS[name](prompt, completion))


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


def _own_group() -> None:
    """Own session: Ctrl-C in the terminal is the trainer's, and a kill reaches what a reward
    started as well."""
    if not hasattr(os, "setsid"):
        return
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: _kill_group())


def _kill_group() -> None:
    os.killpg(0, signal.SIGKILL)


def _die_with_parent() -> None:
    """Waits in a thread for the parent's end, so that even SIGKILL of a run leaves nothing."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        _kill_group() if hasattr(os, "killpg") else os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _silence() -> None:
    """Sends the process's output nowhere, also that of C code and of its children."""
    with contextlib.suppress(OSError), open(os.devnull, "r+b") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
