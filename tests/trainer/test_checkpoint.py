import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch

from pyrl.trainer import checkpoint
from pyrl.trainer.checkpoint import (
    DIGEST,
    FORMAT,
    STATE,
    CheckpointError,
    Checkpoints,
    write_aside,
    write_tensors,
)


def state(value):
    rest = {"identity": {}, "progress": {}, "optimizer": {}, "parts": {}}
    return {"format": FORMAT, **rest, "x": torch.full((1000,), float(value))}


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


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def written_again(value):
    """Another state with a digest of its own: what is left to find is inside."""

    def write(folder):
        digest = write_tensors(value, folder / STATE)
        (folder / DIGEST).write_text(f"{digest}  {STATE}\n")

    return write


DAMAGE = {
    "empty": (lambda f: (f / STATE).write_bytes(b""), "is damaged: its SHA-256"),
    "random": (lambda f: (f / STATE).write_bytes(os.urandom(5000)), "is damaged: its SHA-256"),
    "flipped": (
        lambda f: (f / STATE).write_bytes(flipped((f / STATE).read_bytes())),
        "is damaged: its SHA-256",
    ),
    "cut": (
        lambda f: (f / STATE).write_bytes((f / STATE).read_bytes()[:-1]),
        "is damaged: its SHA-256",
    ),
    "gone": (lambda f: (f / STATE).unlink(), "state.pt cannot be read: No such file"),
    "no digest": (lambda f: (f / DIGEST).unlink(), "state.pt.sha256 cannot be read: No such file"),
    "empty digest": (lambda f: (f / DIGEST).write_bytes(b""), "not recorded"),
    "no dict": (written_again([1, 2]), "holds a list, not a trainer's state"),
    "keys": (written_again({"format": FORMAT, "progress": {}}), "lacks identity, optimizer"),
    "format": (written_again({**state(1), "format": 99}), "has format 99; expected"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_what_is_left(tmp_path, kind):
    damage, message = DAMAGE[kind]
    kept = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        kept.save(step, state(step))
    newest = tmp_path / "step-00000003"
    damage(newest)
    with pytest.raises(CheckpointError) as error:
        kept.load()
    way_out = f"step-00000002 is intact: move {newest} away, and --resume goes on from it"
    for part in (str(newest), message, way_out):
        assert part in str(error.value)
    # The way out is one, and the checkpoint between is not lost to a second damage either.
    damage(tmp_path / "step-00000002")
    newest.rename(tmp_path / "elsewhere")
    told = []
    assert kept.load(told.append)["x"][0] == 1
    assert len(told) == 1 and "going on from step-00000001" in told[0] and message in told[0]
    damage(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=r"is intact: .*choose another folder with --run"):
        kept.load()


@pytest.mark.parametrize("pointer", [None, "", "step-00000009\n", "../elsewhere\n", "\xff\xfe"])
def test_without_a_good_pointer_the_newest_is_loaded_and_said(tmp_path, pointer):
    kept = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        kept.save(step, state(step))
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_bytes(pointer.encode("latin-1"))
    told = []
    assert kept.load(told.append)["x"][0] == 2
    assert len(told) == 1 and "latest names no checkpoint: going on from step-00000002" in told[0]
    kept.save(3, state(3))
    assert kept.load(told.append)["x"][0] == 3 and len(told) == 1


def test_there_never_was_a_checkpoint_only_without_any_trace_of_one(tmp_path):
    kept = Checkpoints(tmp_path, keep=2)
    assert kept.load() is None
    (tmp_path / "latest").write_text("step-00000004\n")
    with pytest.raises(CheckpointError, match="names one that is gone, and there is no other"):
        kept.load()
    (tmp_path / "latest").unlink()
    (tmp_path / "step-00000004").mkdir()
    with pytest.raises(CheckpointError, match=r"step-00000004: state\.pt\.sha256 cannot be read"):
        kept.load()


def test_going_on_from_an_older_one_drops_the_course_it_left(tmp_path):
    kept = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        kept.save(step, state(step))
    (tmp_path / "latest").write_text("step-00000002\n")
    kept.save(2, state(20))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002"]


def test_the_digest_is_the_one_of_sha256sum(tmp_path):
    folder = Checkpoints(tmp_path, keep=1).save(1, state(1))
    expected = hashlib.sha256((folder / STATE).read_bytes()).hexdigest()
    assert (folder / DIGEST).read_text() == f"{expected}  state.pt\n"


def test_write_aside_replaces_a_folder_as_a_whole(tmp_path):
    target = tmp_path / "model"
    write_aside(target, lambda folder: (folder / "a").write_text("1"))
    write_aside(target, lambda folder: (folder / "b").write_text("2"))
    assert [p.name for p in target.iterdir()] == ["b"]
    with pytest.raises(OSError):
        write_aside(target, full_disk)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (target / "b").read_text() == "2"
