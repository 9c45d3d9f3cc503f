"""Rows of data files and of Hugging Face data sets, their fields, and their two sides."""

from __future__ import annotations

import csv
import difflib
import json
import random
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from pyrl.tasks.generated import side
from pyrl.tasks.protocol import Split

Row = Mapping[str, Any]

#: How a file's name ends → the reader of `datasets`.
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REASON = 300  # characters of a library's error message that are passed on


class Rows(Sequence[Row]):
    """Some rows of a data set, each read when it is asked for; `numbers` says which, None = all."""

    def __init__(self, name: str, rows: Sequence[Row], numbers: Sequence[int] | None = None):
        self.name, self._rows = name, rows
        self._numbers = range(len(rows)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._rows[n] for n in self._numbers[index]]
        return self._rows[self.number(index)]

    def number(self, index: int) -> int:
        """The row's number in the whole data set, from 0. IndexError beyond the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._numbers[index]

    def some(self, indices: Iterable[int]) -> Rows:
        """Those of these indices."""
        return Rows(self.name, self._rows, array("q", (self.number(i) for i in indices)))

    def where(self, index: int) -> str:
        """ "NAME row N", for messages; rows are numbered from 0."""
        return f"{self.name} row {self.number(index)}"


def load_rows(source: str, *, split: str = "train", subset: str | None = None) -> Rows:
    """The rows of a .jsonl, .json, .parquet or .csv file, of a folder of a data set, or of
    "owner/name" on the Hugging Face hub (`datasets` keeps them on disk, not in memory).

    split: as `datasets` names it, slices too ("train[:1%]"); a file has only "train".
    subset: the name of the hub data set's configuration. A CSV file's values stay strings.
    ValueError in one line: a missing file (with near names), an empty one, a broken line (with its
    number), an unknown id, split or subset, a hub that cannot be reached.
    ModuleNotFoundError without the package `datasets`.
    """
    path = Path(source).expanduser()
    if path.is_file():
        rows = _load(source, READERS.get(_suffix(path)), path, split, subset)
    elif path.is_dir():
        rows = _load(source, str(path), None, split, subset)
    elif _HUB_ID.fullmatch(source) and path.suffix not in READERS:
        rows = _load(source, source, None, split, subset)
    else:
        raise ValueError(f"data {source!r}: {_missing(path)}")
    if not len(rows):
        raise ValueError(f"data {source!r}: split {split!r} has no rows")
    return Rows(path.name if path.exists() else source, rows)


def field(row: Row, names: str | Sequence[str], what: str, where: str) -> Any:
    """The row's value under `names`, or the first of several names that is there and not None.

    "a.b" is the field "b" of the field "a" (unless the row has a field of just that name).
    what: the value's meaning, where: the row's place, both for the ValueError, which lists the
    fields that there are.
    """
    for name in (names,) if isinstance(names, str) else names:
        value = _nested(row, name)
        if value is not None:
            return value
    wanted = repr(names) if isinstance(names, str) else "one of " + ", ".join(map(repr, names))
    here = ", ".join(map(repr, row))
    raise ValueError(f"{where}: no {what}: expected the field {wanted}; it has {here}")


def split_rows(
    rows: Rows, key: Callable[[Row, str], str | None], heldout: Rows | None = None
) -> dict[Split, Rows]:
    """The two sides of a data set: of each row, `generated.side(key(row, where))`, whatever the
    order of the rows. With `heldout` rows, these and the others whose key they do not have.

    key: what makes two rows the same to a model, such as the question; equal keys are never on
    both sides, and a row whose key is None is left out. One pass over all rows; only their numbers
    are kept.
    ValueError when a side is empty.
    """
    numbers: dict[Split, array[int]] = {"train": array("q"), "heldout": array("q")}
    held = set()
    if heldout is not None:
        for i, row in enumerate(heldout):
            content = key(row, heldout.where(i))
            if content is not None:
                held.add(content)
                numbers["heldout"].append(heldout.number(i))
    for i, row in enumerate(rows):
        content = key(row, rows.where(i))
        if content is None or content in held:
            continue
        numbers[side(content) if heldout is None else "train"].append(rows.number(i))
    of = rows if heldout is None else heldout
    sides: dict[Split, Rows] = {
        "train": Rows(rows.name, rows._rows, numbers["train"]),
        "heldout": Rows(of.name, of._rows, numbers["heldout"]),
    }
    for name, one in sides.items():
        if not len(one):
            raise ValueError(
                f"data {rows.name!r}: none of its {len(rows)} rows is left for {name}; "
                + ("name held-out data of its own" if heldout is None else "see the held-out data")
            )
    return sides


def read_sides(
    key: Callable[[Row, str], str | None],
    *,
    data: str,
    split: str,
    subset: str | None,
    heldout_data: str | None,
    heldout_split: str | None,
    limits: Mapping[Split, int | None],
    seed: int,
) -> dict[Split, Rows]:
    """`split_rows` of `data`; held out is its own share, or all of `heldout_split` of
    `heldout_data` (each as in `data` where only the other is named). Of a side with a limit, that
    many rows drawn by `seed`, in their order.
    """
    rows = load_rows(data, split=split, subset=subset)
    held = None
    if heldout_data is not None or heldout_split is not None:
        own = heldout_data is None
        held = load_rows(
            data if heldout_data is None else heldout_data,
            split=heldout_split or "train",
            subset=subset if own else None,
        )
    sides = split_rows(rows, key, held)
    for name, limit in limits.items():
        some = sides[name]
        if limit is not None and limit < len(some):
            chosen = random.Random(f"{seed} {name}").sample(range(len(some)), limit)
            sides[name] = some.some(sorted(chosen))
    return sides


def _load(
    source: str, reader: str | None, path: Path | None, split: str, subset: str | None
) -> Sequence[Row]:
    if reader is None:
        assert path is not None
        raise ValueError(f"data {source!r}: {path.suffix!r} is none of {', '.join(READERS)}")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'data {source!r} needs the package datasets: pip install "pyrl[tasks]"'
        ) from error
    bars = path is not None and not datasets.are_progress_bars_disabled()
    try:
        if path is None:
            return datasets.load_dataset(reader, subset, split=split)
        if subset is not None:
            raise ValueError(f"a file has no subset {subset!r}")
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        options = _csv_options(path, datasets) if reader == "csv" else {}
        if bars:
            datasets.disable_progress_bars()  # a local file takes a moment
        return datasets.load_dataset(reader, data_files=str(path), split=split, **options)
    except (
        datasets.exceptions.DatasetsError,
        OSError,  # also of the hub: not found, no access, no connection
        RuntimeError,
        StopIteration,  # a file of blank lines
        ValueError,
    ) as error:
        reason = (_broken_line(path) if reader == "json" and path else None) or _reason(error)
        raise ValueError(f"data {source!r}: {reason}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _csv_options(path: Path, datasets: Any) -> dict[str, Any]:
    """Every column a string, as written: "007" is no number and "NA" is not missing."""
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    strings = datasets.Features({name: datasets.Value("string") for name in header})
    return {"features": strings, "keep_default_na": False}


def _broken_line(path: Path) -> str | None:
    """The first line of a JSON file that is wrong, looked for only after reading it has failed."""
    if _suffix(path) == ".json":
        try:
            json.loads(path.read_bytes())
        except json.JSONDecodeError as error:
            return f"line {error.lineno}: {error.msg}"
        except UnicodeDecodeError as error:
            return str(error)
        return None
    blank = None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                blank = blank or number
                continue
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                return f"line {number} is no JSON: {getattr(error, 'msg', error)}"
            except RecursionError:
                return f"line {number} is nested too deeply"
            if not isinstance(value, dict):
                return f"line {number} is a {type(value).__name__}, expected an object of fields"
    return f"line {blank} is blank" if blank else None  # not every reader minds these


def _reason(error: BaseException) -> str:
    """The library's message in one line, with that of what caused it."""
    causes: list[str] = []
    at: BaseException | None = error
    while at is not None and len(causes) < 2:
        causes.append(" ".join(str(at).split()) or type(at).__name__)
        at = at.__cause__
    if causes == ["StopIteration"]:
        return "there are no rows"
    return ": ".join(causes)[:_REASON]


def _missing(path: Path) -> str:
    folder = path.parent
    names: Iterable[str] = (f.name for f in folder.iterdir()) if folder.is_dir() else ()
    near = difflib.get_close_matches(path.name, list(names), n=3)
    hint = f"; near: {', '.join(near)}" if near else ""
    return f'no such file, and no "owner/name" of the Hugging Face hub{hint}'


def _nested(row: Any, name: str) -> Any:
    if not isinstance(row, Mapping):
        return None
    if name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    return _nested(row.get(first), rest) if dot else None
