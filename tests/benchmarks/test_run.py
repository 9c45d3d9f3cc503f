"""The runner: a part that breaks ends alone, wrong input is said in a line, Ctrl-C keeps rows."""

import pytest
import run


class Fake:
    """Every module that the runner imports."""

    options = None
    raises = None

    @classmethod
    def run(cls, out, **options):
        cls.options = options
        if cls.raises is not None:
            raise cls.raises
        return []

    @staticmethod
    def show(rows):
        pass

    @staticmethod
    def write(out):
        return []


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(run.importlib, "import_module", lambda name: Fake)
    monkeypatch.setattr(Fake, "raises", None)
    monkeypatch.setattr(Fake, "options", None)
    return Fake


def test_run_shows_where_the_time_went(tmp_path, fake, capsys):
    assert run.main(["--only", "packing", "--all", "--rounds", "2", "--out", str(tmp_path)]) == 0
    assert fake.options["everything"] is True and fake.options["rounds"] == 2
    text = capsys.readouterr().out
    assert "packing" in text and "report" in text and "100%" in text
    for wrong in (["--rounds", "0"], ["--implementations", "naive"], ["--static", "--only",
                                                                      "packing"]):  # fmt: skip
        with pytest.raises(SystemExit):
            run.main(wrong)


def test_a_part_that_breaks_does_not_take_the_others_along(tmp_path, fake, capsys, monkeypatch):
    monkeypatch.setattr(fake, "raises", RuntimeError("no such kernel"))
    monkeypatch.setattr(run, "BENCHMARKS", ("packing", "memory"))
    assert run.main(["--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("RuntimeError: no such kernel") == 2
    assert "broke (see above): packing, memory" in captured.err and "report" in captured.out


@pytest.mark.parametrize(
    "part", ["linear_policy_loss", "small_ops", "packing", "shared_prefix", "memory"]
)
def test_an_unknown_row_is_named_before_anything_runs(tmp_path, capsys, part):
    given = ["--only", part, "--implementations", "ligar", "--out", str(tmp_path)]
    assert run.main(given) == 2
    assert f"{part} has no implementation 'ligar': expected one of" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_hold_results_is_said_first(tmp_path, capsys, fake):
    (tmp_path / "file").write_text("")
    assert run.main(["--out", str(tmp_path / "file" / "results")]) == 2
    assert "file/results" in capsys.readouterr().err and fake.options is None


def test_ctrl_c_says_where_the_finished_rows_are(tmp_path, fake, capsys, monkeypatch):
    monkeypatch.setattr(fake, "raises", KeyboardInterrupt())
    assert run.main(["--only", "packing", "--out", str(tmp_path)]) == 130
    assert f"what was finished is in {tmp_path}" in capsys.readouterr().err


def test_a_folder_without_results_is_said(tmp_path, capsys):
    assert run.main(["--only", "report", "--out", str(tmp_path)]) == 2
    assert "no *.jsonl to report on" in capsys.readouterr().err
