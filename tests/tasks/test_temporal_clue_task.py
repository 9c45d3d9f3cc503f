"""Files of puzzles, the task on them, the report and the command."""

import itertools
import json
import pickle
import re
from pathlib import Path

import pytest

from pyrl.cli import main
from pyrl.tasks import get_task
from pyrl.tasks.generated import side
from pyrl.tasks.temporal_clue import write as writing
from pyrl.tasks.temporal_clue.generate import generate
from pyrl.tasks.temporal_clue.prompt import answers, render
from pyrl.tasks.temporal_clue.report import figures, markdown, write_report
from pyrl.tasks.temporal_clue.sheet import perfect_sheet, read_sheet, score_sheet
from pyrl.tasks.temporal_clue.store import parse, read, record
from pyrl.tasks.temporal_clue.write import Progress, part_file, write

COUNT = 6


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """6 small puzzles, made by 2 processes."""
    path = tmp_path_factory.mktemp("puzzles") / "mini.jsonl"
    seen = []
    progress = write(path, COUNT, level="mini", workers=2, seen=lambda p: seen.append(p.puzzles))
    assert progress.puzzles == COUNT and seen == sorted(seen) and seen[-1] == COUNT
    assert progress.mean_seconds > 0 and not progress.late
    assert sorted(p.name for p in path.parent.iterdir()) == ["mini.jsonl"]
    return path


def test_a_prompt_says_what_the_solver_needs():
    for puzzle in (generate(seed, "mini") for seed in range(3)):
        text, world = render(puzzle), puzzle.world
        for name in (*world.suspects, *world.weapons, *world.rooms, *world.motives, *world.times):
            assert name in text
        for i, question in enumerate(puzzle.questions):
            assert f"\n{chr(65 + i)}. {question.text}" in text
        assert len(re.findall("^[A-Z]. answer$", text, re.MULTILINE)) == len(puzzle.questions)
        sheet = perfect_sheet(answers(puzzle))
        assert score_sheet(answers(puzzle), sheet) == 1
        digits = sum(any(c.isdigit() for c in q.answer) for q in puzzle.questions)
        assert score_sheet(answers(puzzle), sheet, legacy=True) == 1 - digits / len(
            puzzle.questions
        )
        assert score_sheet(answers(puzzle), text) == 0  # the form is no answer


def test_records_hold_the_whole_puzzle(file):
    records = read(file)
    assert len({r.key for r in records}) == COUNT
    for one in records:
        puzzle = generate(one.seed, "mini")
        assert one.puzzle() == puzzle and one == record(puzzle)
        assert parse(one.line()) == one
        assert json.loads(one.line())["characters"] == len(one.prompt)


def test_one_process_writes_the_same_file(file, tmp_path):
    write(tmp_path / "again.jsonl", COUNT, level="mini", workers=1)
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()


def test_an_interrupted_file_is_gone_on_with(file, tmp_path):
    path = tmp_path / "deeper" / "mini.jsonl"

    def interrupt(progress):
        if progress.puzzles == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, COUNT, level="mini", seen=interrupt)
    part = part_file(path, 0, "mini")
    lines = file.read_bytes().splitlines(keepends=True)
    assert not path.exists() and part.read_bytes() == b"".join(lines[:3])
    part.write_bytes(b"".join(lines[:2]) + lines[2][:50])  # killed in the middle of a line
    progress = write(path, COUNT, level="mini")
    assert (progress.puzzles, progress.resumed) == (COUNT, 2)
    assert path.read_bytes() == file.read_bytes() and not part.exists()


def test_a_part_of_something_else_is_refused(file, tmp_path):
    path = tmp_path / "x.jsonl"
    part_file(path, 50, "mini").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"\.part:1: seed 0 of level 'mini' does not belong here"):
        write(path, 2, seed=50, level="mini")


@pytest.fixture
def workers(monkeypatch):
    """Stands one of `clue_workers` in for the call that a worker process gets."""
    monkeypatch.syspath_prepend(Path(__file__).parent)  # processes are started with this path
    import clue_workers

    return lambda name: monkeypatch.setattr(writing, "_make", getattr(clue_workers, name))


def test_seeds_without_a_new_puzzle_are_counted_and_replaced(tmp_path, workers):
    workers("mixed")
    progress = write(tmp_path / "x", 4, level="mini", workers=2, deadline=2)
    assert (tmp_path / "x").read_text() == "0\n3\n6\n7\n"
    counted = (progress.failed, progress.repeated, progress.late, progress.mean_seconds)
    assert counted == (2, 1, 1, 0.5)


def test_an_exhausted_level_is_said(tmp_path, workers, monkeypatch):
    workers("repeated")
    monkeypatch.setattr(writing, "BARREN", 3)
    with pytest.raises(ValueError, match=r"'mini': no new puzzle in 3 seeds after 1 puzzles"):
        write(tmp_path / "x", 4, level="mini")


def test_processes_that_end_at_once_are_not_started_for_ever(tmp_path, workers):
    workers("ends")
    with pytest.raises(writing.Crashed, match=r"3 processes ended one after the other .*code 3"):
        write(tmp_path / "x", 4, level="mini")


def test_bad_lines_are_named(file, tmp_path):
    good = file.read_text().splitlines()[0]

    def changed(**fields):
        return json.dumps(json.loads(good) | fields)

    for line, message in [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("{}", "'key' is missing; expected a string"),
        (changed(seed="one"), "'seed' is 'one'; expected a whole number"),
        (changed(seed=True), "'seed' is True; expected a whole number"),
        (changed(prompt=""), "'prompt' is empty"),
        (changed(answers={}), "answers={}: expected at least one"),
        (changed(answers={"A": 3}), r"answers\['A'\]=3"),
        (changed(questions=[{"text": "Who?"}]), "'questions' has .*expected text, answer and fact"),
        (changed(world={}), "'world' has no list 'suspects'"),
        (changed(clues={}), "'clues' is {}; expected a list"),
    ]:
        path = tmp_path / "bad.jsonl"
        path.write_text(f"{good}\n\n{line}\n")
        with pytest.raises(ValueError, match=rf"bad\.jsonl:3: {message}"):
            read(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: no JSON"):
        read(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl: there is no puzzle"):
        read(path)
    with pytest.raises(ValueError, match=r"no-such\.jsonl: no such file"):
        read(tmp_path / "no-such.jsonl")


def test_drawn_splits_are_disjoint_and_the_same_every_time():
    task = get_task("temporal_clue", train=8, heldout=3, seed=5)
    train, held = task.prompts("train"), task.prompts("heldout")
    assert (len(train), len(held)) == (8, 3)
    assert all(side(p.data["key"]) == "train" for p in train)
    assert all(side(p.data["key"]) == "heldout" for p in held)
    again = get_task("temporal_clue", train=8, heldout=3, seed=5)
    assert list(again.prompts("heldout")) == list(held) and again.prompts("train")[7] == train[7]
    assert train[2] is train[2]  # drawn once
    few = get_task("temporal_clue", train=8, heldout=3, seed=5, limit=2)
    assert list(few.prompts("train")) == list(train[:2])
    assert list(few.prompts("heldout")) == list(held)
    other = get_task("temporal_clue", train=8, heldout=3, seed=6).prompts("train")
    assert other[0] != train[0]


def test_a_file_is_split_by_key(file):
    task = get_task("temporal_clue", data=str(file), system="Think.")
    records = {r.key: r for r in read(file)}
    found = {s: [p.data["key"] for p in task.prompts(s)] for s in ("train", "heldout")}
    assert sorted(itertools.chain(*found.values())) == sorted(records)
    assert all(side(key) == split for split, keys in found.items() for key in keys)
    prompt = task.prompts("train")[0]
    one = records[prompt.data["key"]]
    assert [m["content"] for m in prompt.messages] == ["Think.", one.prompt]
    assert prompt.id == f"mini-{one.seed}"
    sheet = perfect_sheet(one.answers)
    assert task.score(prompt, sheet) == 1 and task.score(prompt, "") == 0
    assert task.answer(prompt, sheet) == task.answer(prompt, sheet.upper())
    assert task.answer(prompt, sheet) == ";".join(f"{k}={v}" for k, v in read_sheet(sheet).items())
    assert task.answer(prompt, "A. x") is None or len(one.answers) == 1
    limited = get_task("temporal_clue", data=str(file), limit=2, legacy=True)
    assert (
        limited.prompts("train")[:]
        == get_task("temporal_clue", data=str(file)).prompts("train")[:2]
    )
    assert limited.score(prompt, sheet) == score_sheet(one.answers, sheet, legacy=True)
    clone = pickle.loads(pickle.dumps(task))
    assert clone.score(prompt, sheet) == 1 and len(pickle.dumps(task)) < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train=0: expected at least 1"),
        ({"heldout": -1}, "heldout=-1"),
        ({"limit": 0}, "limit=0"),
        ({"limit": 9, "train": 3}, "limit=9: there are only 3 training puzzles"),
        ({"level": "huge"}, "level='huge': expected one of .*mini"),
        ({"data": "no-such.jsonl"}, "no-such.jsonl: no such file"),
        ({"colour": 1}, "no option 'colour'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        get_task("temporal_clue", **options)


def test_more_than_the_file_has_is_refused(file):
    with pytest.raises(ValueError, match=r"train=99: .*mini\.jsonl has \d such puzzles"):
        get_task("temporal_clue", data=str(file), train=99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"workers": 0}, "workers=0"),
        ({"seed": -1}, "seed=-1"),
        ({"deadline": 0.0}, r"deadline=0\.0"),
        ({"level": "x"}, "level='x': expected one of"),
    ],
)
def test_bad_arguments_of_write_are_named(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "x", **{"count": 1, "level": "mini"} | arguments)


def test_the_report(file, tmp_path):
    records = read(file)
    found = figures(records)
    assert found["puzzles"] == COUNT and found["perfect"] == 1 and 0 < found["legacy"] <= 1
    assert found["clues"]["mean"] == sum(len(r.clues) for r in records) / COUNT
    assert found["characters"]["greatest"] == max(len(r.prompt) for r in records)
    assert "| clues |" in markdown(found) and "| 29 |" in markdown(found)
    paths = write_report(records, tmp_path / "report")
    assert json.loads(paths[0].read_text())["puzzles"] == COUNT
    assert paths[2].read_bytes()[:4] == b"\x89PNG"
    write_report(records[:1], tmp_path / "report")
    with pytest.raises(ValueError, match="expected at least one"):
        figures([])


def test_the_command(file, tmp_path, capsys):
    out = tmp_path / "made" / "mini.jsonl"
    argv = ["puzzles", "--count", str(COUNT), "--level", "mini", "--out", str(out)]
    assert main([*argv, "--workers", "2", "--verify", "3", "--report", str(tmp_path / "r")]) == 0
    assert out.read_bytes() == file.read_bytes()
    text = capsys.readouterr().out
    for part in ("6 puzzles, level mini", "29", "6.7", "4,100", "0.926", "1.000",
                 "verified 3: unique 3, irredundant 3", str(out), str(tmp_path / "r")):  # fmt: skip
        assert part in text.replace("\n", " ")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "difficulty.json", "difficulty.md", "difficulty.png",
    ]  # fmt: skip


def test_the_command_fails_with_a_puzzle_that_is_no_good(file, tmp_path, capsys, monkeypatch):
    from pyrl.tasks.temporal_clue import command

    def spoiled(path, count, **_):
        lines = file.read_text().splitlines()
        first = json.loads(lines[0])
        first["clues"] = first["clues"][1:]
        path.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
        return Progress(puzzles=count, seconds=1.0)

    monkeypatch.setattr(command, "write", spoiled)
    argv = ["puzzles", "--count", "6", "--level", "mini", "--out", str(tmp_path / "x")]
    assert main([*argv, "--verify", "6"]) == 1
    captured = capsys.readouterr()
    assert "verified 6: unique 5, irredundant 6" in captured.out
    assert "seed 0: true True, unique False" in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--count", "many"], "--count many: expected a whole number, at least 1"),
        (["--count", "0"], "--count 0"),
        (["--seed", "-3"], "--seed -3: expected a whole number, at least 0"),
        (["--workers", "0"], "--workers 0"),
        (["--verify", "3"], "--verify 3: there are only 2 puzzles"),
        (["--deadline", "nan"], "--deadline nan: expected seconds > 0"),
        (["--level", "huge"], "--level huge: expected one of mini"),
        (["--out", "."], "--out .: is a folder"),
        (["--colour", "3"], "unknown flag '--colour'"),
    ],
)
def test_bad_flags_are_named(argv, message, tmp_path, capsys):
    defaults = {"--count": "2", "--out": str(tmp_path / "x"), "--level": "mini"}
    given = defaults | dict([argv])
    assert main(["puzzles", *itertools.chain(*given.items())]) == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1


def test_help_says_what_it_makes(capsys):
    with pytest.raises(SystemExit) as done:
        main(["puzzles", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--count", "--verify", "--report", "--workers"))
