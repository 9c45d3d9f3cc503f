"""The run folder's files and the sinks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyrl.trainer import tracking
from pyrl.trainer.tracking import RunFolder, plain, read_jsonl, write_atomic


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_makes_the_folder_with_its_parents_when_told(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    assert run.make() is run and run.path.is_dir()
    assert run.metrics_path == tmp_path / "a" / "b" / "metrics.jsonl"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(1.5), 1.5),
        (torch.tensor(3), 3),
        (torch.tensor(0.25, dtype=torch.bfloat16), 0.25),
        (torch.tensor(2.0, requires_grad=True), 2.0),
        (torch.tensor(float("nan")), None),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (float("inf"), None),
        (float("-inf"), None),
        (True, True),
        (None, None),
        ("text", "text"),
        (Path("a/b"), "a/b"),
        ({"x": [torch.tensor(1), (float("nan"), 2)]}, {"x": [1, [None, 2]]}),
    ],
)
def test_plain(value: Any, expected: Any) -> None:
    converted = plain(value)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, torch.zeros(2)]}, r"metrics\.a\[1\]: a Tensor of shape \(2,\)"),
        ({"b": object()}, r"metrics\.b: a object cannot"),
    ],
)
def test_plain_names_what_it_cannot_write(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        plain(value, "metrics")


def test_metrics_are_one_line_a_step_and_on_disk_at_once(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2):
        run.append_metrics({"step": step, "loss": torch.tensor(0.5 * step), "kl": float("nan")})
        assert lines(run.metrics_path)[-1] == {"step": step, "loss": 0.5 * step, "kl": None}
    assert len(lines(run.metrics_path)) == 2


def test_a_metric_that_cannot_be_written_leaves_the_file_alone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1})
    with pytest.raises(TypeError):
        run.append_metrics({"step": 2, "bad": torch.zeros(3)})
    assert lines(run.metrics_path) == [{"step": 1}]


def test_samples_keep_any_text(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    texts = [
        "naïve → 你好",
        'quote " and \\ and \n',
        "\u2028\u2029",
        "\x00\x1b",
        "half \ud800 pair",
    ]
    run.append_samples([{"step": 1, "completion": text} for text in texts])
    run.append_samples([])
    records, unreadable = read_jsonl(run.samples_path)
    assert [r["completion"] for r in records] == texts
    assert unreadable == []
    assert "你好".encode() in run.samples_path.read_bytes()  # readable as it lies there


def test_append_drops_the_half_line_of_a_killed_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1})
    with open(run.metrics_path, "ab") as file:
        file.write(b'{"step": 2, "loss": 0.' + b"1" * 200_000)
    run.append_metrics({"step": 2})
    assert lines(run.metrics_path) == [{"step": 1}, {"step": 2}]


def test_truncate_after(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in range(1, 6):
        run.append_metrics({"step": step})
        run.append_samples([{"step": step, "phase": "train"}] * 2)
    run.append_metrics({"note": "no step"})
    with open(run.metrics_path, "ab") as file:
        file.write(b'{"step": 6, "lo')
    run.truncate_after(3)
    assert lines(run.metrics_path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"note": "no step"}]
    assert [s["step"] for s in lines(run.samples_path)] == [1, 1, 2, 2, 3, 3]
    run.truncate_after(0)
    assert lines(run.metrics_path) == [{"note": "no step"}]


def test_truncate_drops_the_last_evaluation_which_comes_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_samples([{"step": s, "phase": p} for s, p in ((0, "before"), (2, "train"))])
    run.append_samples([{"step": 2, "phase": "after"}])
    run.truncate_after(2)
    assert [s["phase"] for s in lines(run.samples_path)] == ["before", "train"]


def test_evaluations_are_kept_as_the_other_rows_are(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step, label in ((0, "before"), (2, "step 2"), (4, "step 4"), (5, "after")):
        run.append_evaluation({"step": step, "label": label, "details": {"mean": float("nan")}})
    assert run.read().evaluations[0] == {"step": 0, "label": "before", "details": {"mean": None}}
    run.truncate_after(3)
    assert [e["label"] for e in run.read().evaluations] == ["before", "step 2"]
    run.append_evaluation({"step": 3, "label": "after", "details": {}})
    run.truncate_after(3)
    assert [e["label"] for e in run.read().evaluations] == ["before", "step 2"]
    assert run.set_aside() == ["evaluations.1.jsonl"]
    run.evaluations_path.write_bytes(b"[]\n")
    assert run.read().unreadable == {"evaluations.jsonl": [1]}


def test_set_aside_never_overwrites(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.set_aside() == [] and run.last_step() is None
    for step in (1, 2):
        run.append_metrics({"step": step})
        run.append_samples([{"step": step}])
        assert run.last_step() == step
        assert run.set_aside() == [f"metrics.{step}.jsonl", f"samples.{step}.jsonl"]
    assert lines(tmp_path / "metrics.1.jsonl") == [{"step": 1}]
    assert lines(tmp_path / "metrics.2.jsonl") == [{"step": 2}]


class FullDisk:
    """os-level files of which only the first `room` bytes of every write fit, while it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.full, self.room, real = False, room, open
        monkeypatch.setattr(
            tracking, "open", lambda *a, **k: FullFile(self, real(*a, **k)), raising=False
        )


class FullFile:
    def __init__(self, disk: FullDisk, file: Any) -> None:
        self._disk, self._file = disk, file
        self._left = disk.room

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        if not self._disk.full:
            return int(self._file.write(data))
        if not self._left:
            raise OSError(28, "No space left on device")
        written = int(self._file.write(data[: self._left]))  # a short write, then none at all
        self._left -= written
        return written


@pytest.mark.parametrize("room", [0, 5, 45])  # nothing, less than a line, a line and a half
def test_rows_wait_for_room_and_none_is_lost_or_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    told: list[str] = []
    run, disk = RunFolder(tmp_path, told.append), FullDisk(monkeypatch, 0)
    run.append_metrics({"step": 1, "text": "0123456"})
    disk.full = True
    for step in (2, 3, 4):
        run.append_metrics({"step": step, "text": "0123456"})
        run.append_samples([{"step": step, "text": "0123456"}])
        disk.room = room
    assert [row["step"] for row in lines(run.metrics_path)] == [1]
    assert len(told) == 2 and "metrics.jsonl could not be written: No space left" in told[0]
    disk.full = False
    run.append_metrics({"step": 5, "text": "0123456"})
    run.flush()
    assert [row["step"] for row in lines(run.metrics_path)] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in lines(run.samples_path)] == [2, 3, 4]
    assert len(told) == 4 and "samples.jsonl is written again" in told[3]
    run.close()
    assert len(told) == 4


def test_what_never_found_room_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    run, disk = RunFolder(tmp_path, told.append), FullDisk(monkeypatch, 0)
    disk.full = True
    run.append_metrics({"step": 1})
    run.append_metrics({"step": 2})
    run.close()
    assert told[1:] == ["warning: 2 rows of metrics.jsonl could not be written and are lost"]


def test_nobody_to_tell_means_the_error_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, disk = RunFolder(tmp_path), FullDisk(monkeypatch, 0)
    disk.full = True
    with pytest.raises(OSError, match="No space left"):
        run.append_metrics({"step": 1})
    disk.full = False
    run.append_metrics({"step": 2})
    assert lines(run.metrics_path) == [{"step": 1}, {"step": 2}]


def test_truncate_keeps_a_whole_last_line_without_its_newline(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics_path.write_bytes(b'{"step": 1}\n{"step": 2}')
    run.truncate_after(2)
    assert run.metrics_path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_truncate_of_an_empty_folder_makes_no_files(tmp_path: Path) -> None:
    RunFolder(tmp_path).truncate_after(3)
    assert list(tmp_path.iterdir()) == []


def test_truncate_refuses_to_throw_away_a_damaged_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    before = b'{"step": 1}\nnot json\n{"step": 2}\n'
    run.metrics_path.write_bytes(before)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not a JSON object"):
        run.truncate_after(1)
    assert run.metrics_path.read_bytes() == before


def test_summary_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_summary({"steps": 1, "reward": torch.tensor(0.5)})
    with pytest.raises(TypeError):
        run.write_summary({"steps": object()})
    assert json.loads(run.summary_path.read_text()) == {"steps": 1, "reward": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_read_tolerates_whatever_is_there(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read().metrics == []
    run.metrics_path.write_bytes(
        b'{"step": 2, "v": 1}\n[1]\n{"step": 1}\n\xff\xfe\n\n{"step": 2, "v": 2}\n{"st'
    )
    run.summary_path.write_text("{")
    record = run.read()
    assert record.metrics == [{"step": 1}, {"step": 2, "v": 2}]
    assert record.unreadable == {"metrics.jsonl": [2, 4, 7], "summary.json": [0]}
    assert record.summary == {}


def test_provenance_names_the_commit_and_its_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    assert tracking.source_commit(tmp_path) is None  # not a checkout
    git("init", "-q")
    assert tracking.source_commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert tracking.source_commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert tracking.source_commit(tmp_path) == f"{head}+changes"

    versions = tracking.provenance()["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
