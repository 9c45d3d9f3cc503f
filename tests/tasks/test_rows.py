"""Data files, their mistakes, their fields, and sides without overlap."""

import json

import pytest

from pyrl.tasks.generated import HELDOUT_SHARE
from pyrl.tasks.rows import field, load_rows, read_sides, split_rows

ROWS = [{"question": f"what is {i}?", "answer": str(i), "meta": {"level": i}} for i in range(200)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_every_kind_of_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    flat = "question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in ROWS)
    files = [
        write(tmp_path / "a.jsonl", lines(ROWS)),
        write(tmp_path / "a.json", json.dumps(ROWS)),
        str(tmp_path / "a.parquet"),
        write(tmp_path / "a.csv", flat),
    ]
    for file in files:
        rows = load_rows(file)
        assert len(rows) == 200 and rows[-1]["answer"] == "199"
        assert [r["question"] for r in rows[1:3]] == ["what is 1?", "what is 2?"]
        assert rows.where(-1).endswith("row 199")
        with pytest.raises(IndexError):
            rows[200]


def test_home_and_values_of_several_types(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.jsonl", '{"a": 1}\n{"a": "x", "b": null}\n')
    assert [dict(r)["a"] for r in load_rows("~/x.jsonl")] == [1, "x"]
    write(tmp_path / "x.csv", "a,b\n007,NA\n")
    assert load_rows("~/x.csv")[0] == {"a": "007", "b": "NA"}
    assert len(load_rows("~/x.csv", split="train[:1]")) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2\n{"a": 3}\n', r"a\.jsonl'.*line 3 is no JSON: Expecting"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"line 2 is a list, expected an object"),
        ("a.jsonl", '{"a": 1}\n\n{"a": "x"}\n', r"line 2 is blank"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', r"line 2: Expecting ':'"),
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", "\n\n", "line 1 is blank"),
        ("a.csv", "a,b\n", "corresponds to no data"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"[Ee]xpected 2 fields in line 3, saw 3"),
        ("a.parquet", "a,b\n1,2\n3,4\n", "Parquet magic bytes"),
        ("a.txt", "a", r"'.txt' is none of \.jsonl"),
    ],
)
def test_broken_files(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / name, text))


def test_what_is_not_there(tmp_path, monkeypatch):
    file = write(tmp_path / "train.jsonl", lines(ROWS[:2]))
    with pytest.raises(ValueError, match=r"no such file.*near: train\.jsonl"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(ValueError, match=r'Unknown split "test"'):
        load_rows(file, split="test")
    with pytest.raises(ValueError, match="a file has no subset 'main'"):
        load_rows(file, subset="main")
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\n(no network)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"'o/n': Couldn't reach the Hub \(no network\)$"):
        load_rows("o/n")


def test_field():
    row = {"prompt": None, "problem": "p", "a.b": 1, "meta": {"truth": {"x": 2}}}
    assert field(row, ("prompt", "problem"), "question", "here") == "p"
    assert field(row, "a.b", "answer", "here") == 1
    assert field(row, "meta.truth.x", "answer", "here") == 2
    message = r"here row 3: no answer: expected the field 'meta.x'; it has 'prompt', 'problem'"
    with pytest.raises(ValueError, match=message):
        field(row, "meta.x", "answer", "here row 3")
    with pytest.raises(ValueError, match=r"expected the field one of 'q', 'r'"):
        field(row, ("q", "r"), "question", "here")


def question(row, where):
    return field(row, "question", "question", where)


def test_sides_share_no_question(tmp_path):
    rows = load_rows(write(tmp_path / "a.jsonl", lines(ROWS + ROWS[:50])))
    sides = split_rows(rows, question)
    train, held = ({r["question"] for r in sides[s]} for s in ("train", "heldout"))
    assert not train & held and len(train) + len(held) == 200
    assert 0 < len(held) < 2.5 * HELDOUT_SHARE * 200
    assert sum(map(len, sides.values())) == 250
    index = sides["heldout"].number(0)
    assert sides["heldout"].where(0) == f"a.jsonl row {index}"
    assert rows[index] == sides["heldout"][0]


def test_held_out_rows_of_their_own(tmp_path):
    rows = load_rows(write(tmp_path / "a.jsonl", lines(ROWS)))
    held = load_rows(write(tmp_path / "b.jsonl", lines(ROWS[10:30])))
    sides = split_rows(rows, question, held)
    assert len(sides["train"]) == 180 and len(sides["heldout"]) == 20
    assert sides["train"].where(10) == "a.jsonl row 30"
    with pytest.raises(ValueError, match="none of its 20 rows is left for train; see"):
        split_rows(held, question, rows)
    one = load_rows(write(tmp_path / "c.jsonl", lines(ROWS[:1])))
    with pytest.raises(ValueError, match=r"none of its 1 rows is left for \w+; name held-out data"):
        split_rows(one, question)
    with pytest.raises(ValueError, match=r"a\.jsonl row 0: no q"):
        split_rows(rows, lambda row, where: field(row, "q", "q", where))


def test_limits_held_out_files_and_rows_without_a_key(tmp_path):
    train = write(tmp_path / "a.jsonl", lines(ROWS))
    other = write(tmp_path / "b.jsonl", lines(ROWS[:40]))

    def even(row, where):
        return row["question"] if int(row["answer"]) % 2 == 0 else None

    def read(**options):
        common = {"data": train, "split": "train", "subset": None, "seed": 0}
        names = {"heldout_data": None, "heldout_split": None}
        return read_sides(even, **common | names | {"limits": {"train": 7}} | options)

    sides = read()
    numbers = [sides["train"].number(i) for i in range(7)]
    assert len(sides["train"]) == 7 and numbers == sorted(numbers)
    assert numbers != [read(seed=1)["train"].number(i) for i in range(7)]
    assert sum(map(len, read(limits={}).values())) == 100
    sides = read(heldout_data=other, limits={})
    assert (len(sides["train"]), len(sides["heldout"])) == (80, 20)
    sides = read(heldout_split="train[:10]", limits={})
    assert (len(sides["train"]), len(sides["heldout"])) == (95, 5)
