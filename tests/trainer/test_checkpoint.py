import errno
import os
from pathlib import Path

import pytest
import torch

from pyrl.trainer import checkpoint
from pyrl.trainer.checkpoint import FORMAT, CheckpointError, Checkpoints, write_aside, write_tensors


def state(value):
    return {"format": FORMAT, "x": torch.full((1000,), float(value))}


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_newest_is_loaded_and_old_ones_go(tmp_path):
    kept = Checkpoints(tmp_path / "c", keep=2)
    assert kept.load() is None
    for step in range(1, 5):
        kept.save(step, state(step))
    assert kept.load()["x"][0] == 4
    names = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert names == ["latest", "step-00000003", "step-00000004"]


def test_the_same_step_can_be_written_again(tmp_path):
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(3, state(1))
    kept.save(3, state(2))
    assert kept.load()["x"][0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003"]


@pytest.mark.parametrize("where", ["write_tensors", "_flush"])
def test_full_disk_keeps_the_previous_one(tmp_path, monkeypatch, where):
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(1, state(1))

    def half(tensors, path):
        path.write_bytes(b"half")
        full_disk()

    monkeypatch.setattr(checkpoint, where, half if where == "write_tensors" else full_disk)
    with pytest.raises(CheckpointError) as error:
        kept.save(2, state(2))
    for part in ("step 2", "No space left on device", str(tmp_path), "step-00000001 is intact"):
        assert part in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert kept.load()["x"][0] == 1


def test_full_disk_without_a_previous_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
    with pytest.raises(CheckpointError, match="there is no earlier one"):
        Checkpoints(tmp_path, keep=1).save(1, state(1))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("size", [10, 10_000_000])
def test_a_real_full_device_is_an_oserror(size):
    # torch's zip writer reports it as a RuntimeError about positions, depending on the size.
    with pytest.raises(OSError, match="No space left"):
        write_tensors({"x": torch.zeros(size)}, Path("/dev/full"))


def test_a_kill_between_the_renames_leaves_one_to_load(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, keep=2)
    kept.save(1, state(1))

    class Killed(BaseException):
        pass

    def killed(self, name):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "_point_at", killed)
        kept.save(2, state(2))
    assert kept.load()["x"][0] == 1
    kept.save(2, state(3))
    assert kept.load()["x"][0] == 3


def test_what_a_kill_left_behind_is_cleaned_up(tmp_path):
    left = tmp_path / ".partial-step-00000005"
    left.mkdir()
    (left / "state.pt").write_bytes(b"half")
    kept = Checkpoints(tmp_path, keep=1)
    assert kept.load() is None
    kept.save(6, state(6))
    assert not left.exists() and kept.load()["x"][0] == 6


def test_unreadable_and_foreign_files_are_named(tmp_path):
    kept = Checkpoints(tmp_path, keep=1)
    path = kept.save(1, state(1)) / "state.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read"):
        kept.load()
    kept.save(1, {**state(1), "format": 99})
    with pytest.raises(CheckpointError, match="has format 99; expected"):
        kept.load()


def test_write_aside_replaces_a_folder_as_a_whole(tmp_path):
    target = tmp_path / "model"
    write_aside(target, lambda folder: (folder / "a").write_text("1"))
    write_aside(target, lambda folder: (folder / "b").write_text("2"))
    assert [p.name for p in target.iterdir()] == ["b"]
    with pytest.raises(OSError):
        write_aside(target, full_disk)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (target / "b").read_text() == "2"
