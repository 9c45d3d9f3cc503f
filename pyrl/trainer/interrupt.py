"""Ctrl-C: the first one lets the step finish, the second one aborts.

The handler only sets a flag: it may run in the middle of a print, and must not start another.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context manager; `requested` turns true at the first SIGINT, the second is KeyboardInterrupt.
    `announce`, called often, tells the user soon after.

    Outside the main thread, where Python allows no signal handler, it never turns true.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.requested = False
        self._announced = False
        self._notify = notify
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def announce(self) -> None:
        """Says once, outside the handler, that the request was heard."""
        if self.requested and not self._announced:
            self._announced = True
            self._notify("stopping after this step, with a checkpoint; Ctrl-C again aborts at once")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
