"""The document from saved results, and the command."""

import json

import pytest

from pyrl.cli import main
from pyrl.repro import document, gvm
from pyrl.repro.claim import Arm, Chart, Claim, Line, Result, Table
from pyrl.repro.registry import MINIATURES, find
from pyrl.repro.run import reproduce
from pyrl.repro.statistics import Estimate, number


def example(name="filter"):
    return Result(
        name,
        "A title, with commas",
        "arXiv 0000.00000",
        "a > b",
        caveats=["small"],
        arms=[Arm("q", "a", [3.0, 3.1, 2.9]), Arm("q", "b", [1.0, 1.2, 1.1])],
        claims=[Claim("q", "a", "above", "b"), Claim("q", "a", "reported", "b", "by the way")],
        charts=[
            Chart("lines", "y", "x", [Line("a", [0.0, 1.0], [[0.0, 1.0], [0.2, 0.8]]),
                                      Line("limit", [0.0, 1.0], [[1.0, 1.0]], reference=True)]),
            Chart("points", "y", quantity="q", mark=1.0),
        ],
        conditions={"seeds": 3, "seconds": 12.3, "commit": "abc" * 10 + "+changes",
                    "versions": {"torch": "2.13.0"}},
    )  # fmt: skip


def other():
    """A comparison of another kind: no arms, no claims."""
    return Result(
        "zz-other", "Something else", "paper", "published", text="Some *text*.",
        tables=[Table("held-out", ["arm", "reward"], [["a|b", "1"]], "A note.")],
        images=["images/made-elsewhere.png"],
    )  # fmt: skip


def test_the_document_of_saved_results(tmp_path):
    for result in (other(), example()):
        document.save(result, tmp_path)
    assert [r.name for r in document.load(tmp_path)] == ["filter", "zz-other"]  # registry first
    assert document.load(tmp_path) == [example(), other()]
    path = document.write(tmp_path)
    text = path.read_text()
    assert "| [filter](#a-title-with-commas) | q | a > b | 1.90 [1.65, 2.15] | **agrees** |" in text
    assert "| q | a − b (by the way) | 1.90 [1.65, 2.15] | reported |" in text
    assert text.count("**agrees**") == 2  # the summary and the section, the report in neither
    assert "3 seeds · 12 s on one thread · commit abcabcabcabc and changes · torch 2.13.0" in text
    assert "![A title, with commas](images/repro-filter.png)" in text
    assert "![Something else](images/made-elsewhere.png)" in text
    assert "| a\\|b | 1 |" in text and "Some *text*." in text and "**held-out.** A note." in text
    image = tmp_path / "images" / "repro-filter.png"
    before = image.read_bytes()
    assert before.startswith(b"\x89PNG") and len(before) < 80_000
    assert not (tmp_path / "images" / "repro-zz-other.png").exists()
    document.write(tmp_path)
    assert path.read_text() == text and image.read_bytes() == before


def test_lists_of_numbers_take_one_line(tmp_path):
    text = document.save(example(), tmp_path).read_text()
    assert '"values": [3.0, 3.1, 2.9]' in text
    assert Result.from_dict(json.loads(text)) == example()


def test_a_broken_result_is_named(tmp_path):
    path = document.save(example(), tmp_path)
    path.write_text(path.read_text().replace('"published"', '"publishd"'))
    with pytest.raises(ValueError, match=r"filter\.json: result: unknown key 'publishd'"):
        document.write(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1.00"), (-0.01234, "−0.0123"), (123.4, "123"), (1963.0, "1963"),
     (float("-inf"), "−∞")],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_an_interval_of_one_seed():
    assert document.interval(Estimate(0, float("-inf"), float("inf"), 1)) == "[−∞, ∞]"


def test_names():
    assert find("all") == [name for name, each in MINIATURES.items() if each.in_all]
    assert find("gvm") == ["gvm"]
    with pytest.raises(ValueError, match=r"no miniature 'fliter' \(did you mean 'filter'\?\)"):
        find("fliter")


def test_bad_input_of_the_command(capsys, tmp_path):
    assert main(["repro", "kl-rest"]) == 2
    assert "did you mean 'kl-reset'?" in capsys.readouterr().err
    assert main(["repro", "filter", "--seeds", "0"]) == 2
    assert "seeds=0" in capsys.readouterr().err
    assert main(["repro", "--quick"]) == 2
    assert "no miniature named" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["repro", "filter", "--seeds", "many"])


def test_a_quick_run_writes_nothing_unless_told_where(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["repro", "dynamic-sampling", "--quick"]) == 0
    assert list(tmp_path.iterdir()) == []
    out = capsys.readouterr().out
    assert "dynamic sampling > every group" in out and "QUICK" in out
    assert main(["repro", "dynamic-sampling", "--quick", "--seeds", "1", "--out", "there"]) == 0
    assert "1 seed" in (tmp_path / "there" / "reproductions.md").read_text()


def test_without_names_only_the_document_is_written(tmp_path):
    document.save(example(), tmp_path)
    assert reproduce([], out=tmp_path, say=lambda text: None) == []
    assert (tmp_path / "reproductions.md").is_file()


def test_a_quick_run_is_not_judged():
    result = gvm.tabular(2, True)
    result.conditions |= {"quick": True, "seeds": 2}
    text = document.markdown([result]) + document.console_text(result)
    assert "not judged" in text and "NOT JUDGED" in text
    assert "agrees" not in text.split("## Summary")[1] and "AGREES" not in text
