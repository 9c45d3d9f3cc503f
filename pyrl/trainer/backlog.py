"""Rows that a full disk refuses wait in memory until it takes them: training need not stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Row = TypeVar("Row")


class Backlog(Generic[Row]):
    """`put(rows)` is `write(rows)` that never loses one: what an OSError keeps out goes first in
    the next `put`.

    write(rows): writes all of them or raises OSError; it may take rows it has written off the
    list. tell(text): is told once when writing fails and once when it works again; without it the
    OSError is raised, and the rows wait all the same.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[list[Row]], None],
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self._write, self._tell = write, tell
        self._waiting: list[Row] = []
        self._refused = False

    def put(self, rows: Sequence[Row] = ()) -> None:
        """Writes what waits, then `rows`."""
        self._waiting += rows
        if not self._waiting:
            return
        try:
            self._write(self._waiting)
        except OSError as error:
            if self._tell is None:
                raise
            if not self._refused:
                reason = error.strerror or error
                self._tell(f"warning: {self.name} could not be written: {reason}; what belongs "
                           "there waits in memory, and training goes on")  # fmt: skip
            self._refused = True
            return
        self._waiting.clear()
        if self._refused and self._tell is not None:
            self._tell(f"{self.name} is written again, with everything that waited")
        self._refused = False

    def close(self) -> None:
        """The last attempt; says what is lost if it fails too."""
        self.put()
        if self._waiting and self._tell is not None:
            rows = f"{len(self._waiting)} row{'s' if len(self._waiting) > 1 else ''}"
            self._tell(f"warning: {rows} of {self.name} could not be written and are lost")
