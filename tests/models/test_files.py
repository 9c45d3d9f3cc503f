import pytest

from pyrl.models.files import whole_folder


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_appears_whole(tmp_path):
    with whole_folder(tmp_path / "deep" / "out") as aside:
        (aside / "a").touch()
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"] and names(tmp_path / "deep" / "out") == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interruption_leaves_nothing(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "out") as aside:
        (aside / "a").touch()
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize(("keep", "content"), [(False, ["new"]), (True, ["old"])])
def test_an_existing_folder(tmp_path, keep, content):
    with whole_folder(tmp_path / "out", keep_existing=keep) as aside:
        (aside / "new").touch()
        (tmp_path / "out").mkdir()  # another process was faster
        (tmp_path / "out" / "old").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == content
