"""Thousands of puzzles into a file, by processes that may fail."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrl.tasks.temporal_clue.store import Record, parse, record

if TYPE_CHECKING:
    from pebble import ProcessPool

#: Seeds in a row without a new puzzle after which a level counts as exhausted.
BARREN = 2000
#: Processes in a row that end without a result after which it is not the seeds' fault.
CRASHES = 3


class Crashed(RuntimeError):
    """The worker processes cannot work."""


@dataclass
class Progress:
    """How far the writing is."""

    puzzles: int = 0
    resumed: int = 0
    """Of these, found in the file that an interrupted call left."""
    failed: int = 0
    """Seeds that gave no puzzle."""
    late: int = 0
    """Seeds that took longer than the deadline."""
    repeated: int = 0
    """Seeds whose puzzle, by its key, the file has already."""
    puzzle_seconds: float = 0.0
    """Time that the new puzzles took in their processes, all together."""
    seconds: float = 0.0
    """Time since the start."""

    @property
    def mean_seconds(self) -> float:
        """Of one new puzzle, in its process; 0 before the first."""
        return self.puzzle_seconds / max(self.puzzles - self.resumed, 1)


def write(
    path: str | os.PathLike[str],
    count: int,
    *,
    seed: int = 0,
    level: str = "published",
    workers: int = 1,
    deadline: float = 300.0,
    seen: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Writes the first `count` different puzzles of the seeds seed, seed + 1, … in their order.

    What is written depends on neither the number of workers nor on their speed, unless a seed takes
    longer than `deadline` seconds. A seed that does, or that fails, or whose puzzle repeats an
    earlier one, is counted and skipped. The file appears when it is complete. An interrupted call
    leaves `part_file(...)`, and the same call goes on from there.

    seen: called after every seed. ValueError for bad arguments, for a part file of something else,
    and when BARREN seeds in a row give no new puzzle. Crashed when CRASHES processes in a row end.
    """
    for name, number in (("count", count), ("workers", workers)):
        if number < 1:
            raise ValueError(f"{name}={number}: expected at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed}: expected at least 0")
    if not deadline > 0:
        raise ValueError(f"deadline={deadline}: expected seconds > 0")
    check_generator(level)
    target, part = Path(path), part_file(path, seed, level)
    if target.is_dir():
        raise ValueError(f"{target} is a folder; expected a file to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    earlier = _resumed(part, seed, level)[:count]
    keys = {r.key for r in earlier}
    progress = Progress(puzzles=len(earlier), resumed=len(earlier))
    start = time.monotonic()
    following = earlier[-1].seed + 1 if earlier else seed
    with open(part, "wb") as file:
        file.writelines(r.line() for r in earlier)
        file.flush()
        with _Seeds(workers, level, deadline, following) as seeds:
            barren = 0
            while progress.puzzles < count:
                made = seeds.next(count - progress.puzzles)
                barren += 1
                if made.line is None:
                    progress.late += made.late
                    progress.failed += not made.late
                elif made.key in keys:
                    progress.repeated += 1
                else:
                    keys.add(made.key)
                    file.write(made.line)
                    file.flush()
                    progress.puzzles += 1
                    progress.puzzle_seconds += made.seconds
                    barren = 0
                progress.seconds = time.monotonic() - start
                seen(progress)
                if barren >= BARREN:
                    raise ValueError(
                        f"level {level!r}: no new puzzle in {BARREN} seeds after "
                        f"{progress.puzzles} puzzles; ask for fewer, or for another level"
                    )
        os.fsync(file.fileno())
    os.replace(part, target)
    return progress


def part_file(path: str | os.PathLike[str], seed: int, level: str) -> Path:
    """Where the puzzles are until the file is complete."""
    target = Path(path)
    return target.with_name(f".{target.name}.{level}-{seed}.part")


def check_generator(level: str) -> None:
    """Raises ValueError unless puzzles of the level can be generated here."""
    from pyrl.tasks.temporal_clue.generate import LEVELS

    if level not in LEVELS:
        raise ValueError(f"level={level!r}: expected one of {', '.join(LEVELS)}")
    if importlib.util.find_spec("ortools") is None:
        raise ValueError('no package ortools, which makes the puzzles: pip install "pyrl[tasks]"')


def _resumed(part: Path, seed: int, level: str) -> list[Record]:
    if not part.is_file():
        return []
    content = part.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines()  # the last may be half written
    found: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            one = parse(line)
            if one.level != level or one.seed < (found[-1].seed + 1 if found else seed):
                raise ValueError(f"seed {one.seed} of level {one.level!r} does not belong here")
        except ValueError as error:
            raise ValueError(f"{part}:{number}: {error}; delete the file") from None
        found.append(one)
    return found


@dataclass(frozen=True)
class _Made:
    line: bytes | None
    key: str = ""
    seconds: float = 0.0
    late: bool = False


class _Seeds:
    """What came of each seed, in the order of the seeds; several are being worked on."""

    def __init__(self, workers: int, level: str, deadline: float, first: int) -> None:
        import pebble

        self._pool: ProcessPool = pebble.ProcessPool(
            max_workers=workers, initializer=_ignore_interrupts,
            context=multiprocessing.get_context("spawn"),
        )  # fmt: skip
        self._level, self._deadline, self._next = level, deadline, first
        self._window = 4 * workers  # the ones behind a slow seed wait for it, done
        self._pending: deque[Any] = deque()
        self._crashes = 0

    def __enter__(self) -> _Seeds:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()

    def next(self, wanted: int) -> _Made:
        """What came of the next seed; `wanted`: how many more are needed at least."""
        from pebble import ProcessExpired

        while len(self._pending) < min(wanted, self._window):
            call = (self._next, self._level)
            self._pending.append(self._pool.schedule(_make, args=call, timeout=self._deadline))
            self._next += 1
        future = self._pending.popleft()
        try:
            made: _Made = future.result()
        except (TimeoutError, FutureTimeoutError):
            return _Made(None, late=True)
        except ProcessExpired as error:
            self._crashes += 1
            if self._crashes == CRASHES:
                raise Crashed(
                    f"{CRASHES} processes ended one after the other without a puzzle; the last had "
                    f"exit code {error.exitcode}"
                ) from None
            return _Made(None)
        self._crashes = 0
        return made


def _ignore_interrupts() -> None:
    """Ctrl-C in the terminal is the parent's, which ends its processes itself."""
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _make(seed: int, level: str) -> _Made:
    from pyrl.tasks.temporal_clue.generate import generate

    start = time.monotonic()
    try:
        found = record(generate(seed, level))
    except ValueError:  # the generator found no puzzle in this seed
        return _Made(None)
    return _Made(found.line(), found.key, time.monotonic() - start)
