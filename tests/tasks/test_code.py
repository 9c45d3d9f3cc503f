"""The task `code`: prompts, tests and rewards."""

import json
import math
import pickle
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrl.tasks import Prompt, Scorer, get_task
from pyrl.tasks.code import Call, Outcome, SandboxError, judge
from pyrl.tasks.code.families import FAMILIES
from pyrl.tasks.code.problems import draw
from pyrl.tasks.code.rows import problem_of_row

SUMS = [{"input": f"{a}\n{a}\n", "output": str(2 * a)} for a in range(4)]
PROMPT = Prompt("p", "p", {"function": "", "tests": SUMS})
RIGHT = "print(int(input()) + int(input()))"


def block(program, label="python"):
    return f"```{label}\n{program}\n```\n"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (block(RIGHT), 1),
        (block("print(2)"), 0.25),
        (block("print(int(input()) * 2 % 4)"), 0.5),
        (block("a = int(input())\nassert a % 2\nprint(a * 2)"), 0.5),
        (block("print(0)") + "\nNo, better:\n" + block(RIGHT), 1),
        (block(RIGHT) + "\nNo, better:\n" + block("print(0)"), 0.25),
        (block("x") + "</think>" + block(RIGHT), 1),
        (block(RIGHT) + "</think>I do not know.", 0),
        (block(RIGHT, "py") + block("output: 4", "text"), 1),
        (block(RIGHT, ""), 1),
        (block(RIGHT) + block("4", ""), 1),
        (block(RIGHT, "cpp"), 0),
        (RIGHT, 0),
        ("```python\n" + RIGHT, 0),
        (block(""), 0),
        ("", 0),
        ("`" * 10**6, 0),
        (block("print(int(input()) * 2)\nif input() == '3': 1 / 0"), 0.75),
        (block("a = input()\nwhile a == '3': pass\nprint(int(a) * 2)"), 0),  # out of time: all lost
    ],
)
def test_rewards(completion, reward):
    task = get_task("code", timeout=0.4 if "while" in completion else 30.0)
    assert task.score(PROMPT, completion) == reward
    whole = get_task("code", timeout=0.4 if "while" in completion else 30.0, reward="all")
    assert whole.score(PROMPT, completion) == (reward == 1)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_generated_problems_are_solved_by_their_references(level):
    task = get_task("code", level=level, train=400, timeout=60.0, tests=4)
    seen = set()
    for prompt in task.prompts("train"):
        family = prompt.data["key"].partition(" {")[0]
        style = bool(prompt.data["function"])
        if (family, style) in seen:
            continue
        seen.add((family, style))
        assert task.score(prompt, block(prompt.data["reference"])) == 1, prompt
        assert "<" not in prompt.text and "```python" in prompt.text
    assert len(seen) == 2 * sum(f.level == level for f in FAMILIES)


def test_families():
    assert len({f.name for f in FAMILIES}) == len(FAMILIES) >= 24
    for family in FAMILIES:
        sizes = [most - least + 1 for least, most in family.parameters.values()]
        assert math.prod(sizes) >= 50, family.name  # enough for two splits
        assert "Return" in family.statement and family.level in (1, 2, 3)
        for name in family.parameters:
            assert f"<{name}>" in family.statement and f"<{name}>" in family.body, family.name


def test_tests_differ_and_no_constant_passes_them_all():
    task = get_task("code", level=[1, 3], train=150)
    for prompt in task.prompts("train"):
        tests = prompt.data["tests"]
        assert len({json.dumps(t["input"]) for t in tests}) == len(tests) == 8
        most = max(Counter(json.dumps(t["output"]) for t in tests).values())
        family = prompt.data["key"].partition(" {")[0]
        assert most <= (4 if family == "brackets" else 2), prompt.data["key"]
        json.dumps(dict(prompt.data))


def test_splits_share_no_problem_whatever_the_seed():
    keys = {}
    for seed in (0, 1):
        task = get_task("code", seed=seed, level=(1, 3), train=300, heldout=300)
        for split in ("train", "heldout"):
            keys.setdefault(split, set()).update(p.data["key"] for p in task.prompts(split))
            again = get_task("code", seed=seed, level=(1, 3), train=300, heldout=300)
            assert again.prompts(split)[:3] == task.prompts(split)[:3]
    assert not keys["train"] & keys["heldout"]
    first = [get_task("code", seed=s).prompts("train")[0] for s in range(5)]
    assert all(a != b for a, b in pairwise(first))


def test_a_system_message_goes_first():
    messages = get_task("code", system="Be short.").prompts("train")[0].messages
    assert [m["role"] for m in messages] == ["system", "user"]
    assert [m["role"] for m in get_task("code").prompts("train")[0].messages] == ["user"]


ROWS = [
    {"prompt": "a", "tests": [{"input": "1\n", "output": "2"}]},
    {"prompt": "b", "tests": json.dumps([{"input": "1\n", "output": "2"}])},
    {"question": "c", "input_output": json.dumps({"inputs": [["1"]], "outputs": [["2"]]})},
    {"prompt": "d", "fn_name": "f", "inputs": [[1]], "outputs": [2]},
    {"prompt": "e", "tests": {"fn_name": "f", "inputs": [[1]], "outputs": [[2]]}},
    {
        "problem": "g",
        "verification_info": json.dumps(
            {"test_cases": [{"input": [1], "output": 2, "fn_name": "f", "type": "function_call"}]}
        ),
    },
]


def test_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    # Different shapes of tests do not fit one file's columns, so each has a file of its own.
    for i, row in enumerate(ROWS):
        copies = [{k: f"{v} {n}" if k in ("prompt", "question", "problem") else v
                   for k, v in row.items()} for n in range(99)]  # fmt: skip
        file.write_text("".join(json.dumps(copy) + "\n" for copy in copies))
        task = get_task("code", data=str(file), heldout=2, train=3, timeout=30.0)
        train, heldout = task.prompts("train"), task.prompts("heldout")
        assert len(train) == 3 and len(heldout) == 2
        assert not {p.text for p in train} & {p.text for p in heldout}
        assert pickle.loads(pickle.dumps(task))._sides is None
        prompt = train[0]
        assert ("`f`" in prompt.text) == bool(prompt.data["function"]) == (i >= 3)
        program = "def f(x): return x + 1" if i >= 3 else "print(int(input()) + 1)"
        assert task.score(prompt, block(program)) == 1, prompt
    file.write_text(json.dumps({"prompt": "h", "tests": [{"input": "1"}]}) + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl row 0: test 0 has no input and output"):
        get_task("code", data=str(file))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no text under any of prompt"),
        ({"prompt": 3}, "no text"),
        ({"prompt": "a"}, "no tests under any of tests"),
        ({"prompt": "a", "tests": "{"}, "its tests are not JSON"),
        ({"prompt": "a", "tests": 3}, "its tests are a int"),
        ({"prompt": "a", "inputs": [], "outputs": []}, "it has no tests"),
        ({"prompt": "a", "inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"prompt": "a", "inputs": [1], "outputs": ["1"]}, "test 0: expected text or lines"),
        ({"prompt": "a", "fn_name": "f", "inputs": [1], "outputs": [1]}, "no list of arguments"),
        ({"prompt": "a", "fn_name": "f", "inputs": [[{1}]], "outputs": [1]}, "not JSON values"),
    ],
)
def test_rows_of_another_shape(row, message):
    with pytest.raises(ValueError, match=message):
        problem_of_row(row, 0)


def test_the_first_tests_of_a_row_are_kept():
    row = {"prompt": "a", "inputs": ["1", "2", "3"], "outputs": ["1", "2", "3"]}
    assert [len(problem_of_row(row, most)[2]) for most in (0, 2, 9)] == [3, 2, 3]


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("1 2\n3", "1 2 3\n", True), ("", "\n", True), ("1", "1 1", False), ("1.0", "1", False),
        ("0.3333333", "0.333333333", True), ("0.34", "0.333333333", False), ("1", "1.0", True),
        ("nan", "1.0", False), ("inf", "1.0", False), ("1_0.0", "10.0", True),
        ("１.0", "1.0", False), ("1e400", "1.0", False), ("x", "1.5", False),
        ("9" * 10**6, "1.5", False), ("Yes", "yes", False), ("\ufffd", "1", False),
    ],
)  # fmt: skip
def test_texts(given, expected, same):
    assert judge.same_text(given, expected) == same


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        ("1", 1, True), ("1.0", 1, True), ("true", 1, False), ("1", True, False),
        ("[1, 2]", (1, 2), True), ("[2, 1]", [1, 2], False), ("[1]", 1, False), ('"a"', "a", True),
        ('"1"', 1, False), ("null", None, True), ("0", None, False), ("0", False, False),
        ("NaN", 1.0, False), ("NaN", math.nan, True), ("Infinity", 1e308, False),
        ("0.1", 0.1 + 1e-9, True), ('{"a": 1}', {"a": 1}, True), ('{"a": 1}', {"b": 1}, False),
        ("[[]]", [[]], True), ("[]", "", False), ("1e999", 10**400, False),
        ("1" * 5000, 1, False), ("[" * 10**5, [], False), ("", "", False), ("{", {}, False),
        ("10000000000000001", 10**16, False),
    ],
)  # fmt: skip
def test_values(given, expected, same):
    case = judge.Case(Call(function="f"), expected)
    assert case.passed(Outcome("done", result=given)) == same
    assert not case.passed(Outcome("crashed", result=given))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(JSON, JSON)
def test_values_are_equal_to_themselves_and_equality_is_pythons(a, b):
    assert judge.same_value(json.loads(json.dumps(a)), a)
    if judge.same_value(a, b) and "." not in json.dumps([a, b]):
        assert a == b


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        (2000001.0, 2000000, False),
        (2000000.0, 2000000, True),
        (1000000.9, 1000000, False),
        ([1.0000005], [1], False),
        ([1.0], [1], True),
        ({"a": 1.0000005}, {"a": 1}, False),
        (0.3333333, 1 / 3, True),
        (0.33333, 1 / 3, False),
        (10**400, 10**400, True),
        (1e308, 10**400, False),
        (1, True, False),
    ],
)
def test_only_an_expected_float_has_a_tolerance(given, expected, same):
    assert judge.same_value(given, expected) == same


def test_an_only_element_counts_where_the_data_says_so():
    call, outcome = Call(function="f"), Outcome("done", result="3")
    assert judge.Case(call, [3], single=True).passed(outcome)
    assert not judge.Case(call, [3]).passed(outcome)


def test_in_a_scoring_process_and_a_sandbox_that_fails_costs_the_sample(monkeypatch):
    task = get_task("code", timeout=30.0)
    with Scorer(task, deadline=60.0) as scorer:
        texts = [block(RIGHT), "", block("print(2)")]
        scores = scorer.score([(PROMPT, text) for text in texts])
        assert [s.reward for s in scores] == [1, 0, 0.25]
    gone = get_task("code", sandbox="sandboxfusion", endpoint="http://127.0.0.1:9")
    with Scorer(gone, deadline=60.0) as scorer:
        lost, none = scorer.score([(PROMPT, block(RIGHT)), (PROMPT, "")])
        assert math.isnan(lost.reward) and "SandboxError" in lost.error and none.reward == 0
    with pytest.raises(SandboxError, match="Refused"):
        gone.score(PROMPT, block(RIGHT))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 4}, "level=4: expected 1 to 3"),
        ({"level": (2, 1)}, r"level=\(2, 1\)"),
        ({"train": 0}, "train=0: expected at least 1"),
        ({"heldout": 0}, "heldout=0: expected at least 1"),
        ({"tests": 0}, "tests=0: expected at least 1"),
        ({"timeout": 0.0}, "timeout=0.0: expected seconds > 0"),
        ({"memory_mb": 8}, "memory_mb=8: expected a number >= 64"),
        ({"reward": "some"}, "reward='some'"),
        ({"sandbox": "docker"}, "sandbox='docker': expected one of auto"),
        ({"sandbox": "sandboxfusion"}, "endpoint=None"),
        ({"endpoint": "http://x"}, "sandbox='auto', endpoint='http://x'"),
        ({"sandbox": "sandboxfusion", "endpoint": "x:80"}, "expected an address such as http"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        get_task("code", **options)


def test_too_few_inputs_is_an_error_that_names_the_problem():
    import random

    with pytest.raises(ValueError, match="fewer than 80 different inputs"):
        for i in range(50):
            draw(random.Random(i), 3, 80)
