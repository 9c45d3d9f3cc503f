"""The task: drawn problems checked by other means, data of the usual shapes, what it refuses."""

import itertools
import json
import math
import pickle
import random
import re
import subprocess
import sys
from fractions import Fraction

import pytest

from pyrl.tasks import get_task
from pyrl.tasks.mathematics import Mathematics, problems

TEMPLATES = [(kind, t) for kind, ts in problems.KINDS.items() for t in ts]


def numbers(text):
    """All integers in a text, a minus sign included where nothing stands before it."""
    return [int(n) for n in re.findall(r"(?<![\w)])-?\d+", text)]


def value(expression):
    """Python's own arithmetic, in fractions."""
    exact = re.sub(r"\d+(?:\.\d+)?", lambda m: f"Fraction('{m[0]}')", expression.replace("^", "**"))
    return eval(exact, {"Fraction": Fraction})


def side(text):
    """A polynomial as a function of x and y: 2x^2 - 3y."""
    text = re.sub(r"(?<=\d)(?=[xy])", "*", text).replace("^", "**")
    return lambda x, y=0: eval(text, {"x": x, "y": y})


def roots(text, candidates):
    left, right = map(side, text.split(" = "))
    return {x for x in candidates if left(x) == right(x)}


def prime(n):
    return n > 1 and all(n % d for d in range(2, n))


RATIONALS = sorted({Fraction(p, q) for q in range(1, 9) for p in range(-1100, 1101)})


def solved(name, text):
    """The answer by another way than the template's: search, brute force, Python's eval."""
    n = numbers(text)
    if name in ("total", "difference", "product", "quotient", "order", "fractions", "decimals"):
        return str(value(re.search(r"(?:is|Compute) ([^?]*?)[.?](?:$| )", text)[1]))
    if name == "percent":
        left = Fraction(n[0], 100) * n[1] if "What is" in text[:7] else None
        return str(left if left is not None else n[0] - Fraction(n[1], 100) * n[0])
    if name == "linear":
        (x,) = roots(re.search(r"Solve (.*?)\.", text)[1], RATIONALS)
        return str(x)
    if name == "evaluate":
        x, y = n[0], n[1] if "y =" in text else 0
        return str(side(re.search(r"what is (.*)\?", text)[1])(x, y))
    if name == "quadratic":
        if "x > 0" in text:
            return str(math.isqrt(n[1]))
        found = roots(re.search(r"x of (.*?),", text)[1], [r for r in RATIONALS if abs(r) < 10])
        return ", ".join(map(str, sorted(found)))
    if name == "system":
        equations = re.search(r"Solve (.*) and (.*)\. Give", text).groups()
        sides = [tuple(map(side, e.split(" = "))) for e in equations]
        grid = itertools.product(range(-9, 10), repeat=2)
        (found,) = [xy for xy in grid if all(left(*xy) == right(*xy) for left, right in sides)]
        return str(found)
    if name == "factors":
        f = side(re.search(r"Write (.*?) as", text)[1])
        pairs = itertools.combinations_with_replacement(range(-13, 14), 2)
        (found,) = [p for p in pairs if all(f(x) == (x + p[0]) * (x + p[1]) for x in range(3))]
        return str(found)
    if name == "gcd":
        return str(max(d for d in range(1, min(n) + 1) if n[0] % d == n[1] % d == 0))
    if name == "lcm":
        return str(next(m for m in itertools.count(1) if m % n[0] == m % n[1] == 0))
    if name == "remainder":
        return str(n[0] - n[0] // n[1] * n[1])
    if name == "next_prime":
        return str(next(p for p in itertools.count(n[0] + 1) if prime(p)))
    if name == "largest_prime_factor":
        return str(max(p for p in range(2, n[0] + 1) if n[0] % p == 0 and prime(p)))
    if name == "divisors":
        return str(len([d for d in range(1, n[0] + 1) if n[0] % d == 0]))
    if name == "modular_power":
        base, exponent = map(int, re.search(r"(\d+)\^(\d+)", text).groups())
        return str(base**exponent % (10 if "last digit" in text else n[-1]))
    assert name == "digit_sum"
    return str(sum(int(d) for d in re.findall(r"\d", text)))


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("template", [t for _, t in TEMPLATES], ids=lambda t: t.__name__)
def test_drawn_answers_are_right(template, level):
    task = get_task("mathematics")
    for seed in range(6):
        question, answer = template(random.Random(seed), level)
        other = solved(template.__name__, question)
        prompt = task.prompts("train")[0].__class__("x", "x", {"answer": answer})
        assert task.score(prompt, rf"\boxed{{{other}}}") == 1, (question, answer, other)


def off(answer):
    """One more, in each place."""
    return re.sub(r"-?\d+(?:\.\d+)?(?:/\d+)?", lambda m: str(Fraction(m[0]) + 1), answer)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_own_answers_score_one_and_others_zero(level):
    task = get_task("mathematics", level=level, train=120, heldout=30)
    for prompt in [*task.prompts("train"), *task.prompts("heldout")]:
        answer = prompt.data["answer"]
        for text in (rf"So \boxed{{{answer}}}", f"... The answer is {answer}.", f"#### {answer}"):
            assert task.score(prompt, text) == 1, (prompt, text)
            assert task.score(prompt, text.replace(answer, off(answer))) == 0, (prompt, text)
        assert task.score(prompt, prompt.text) == task.score(prompt, "") == 0
        expression = re.search(r"(?:is|Compute) ([^?]*?)[.?]", prompt.text)
        if expression:
            assert task.score(prompt, rf"\boxed{{{expression[1]}}}") == 0  # repeats the question
    assert {p.domain for p in task.prompts("train")} == set(problems.KINDS)
    questions = [{p.text for p in task.prompts(s)} for s in ("train", "heldout")]
    assert not questions[0] & questions[1] and len(questions[0]) > 60


@pytest.mark.parametrize("level", [1, 2, 3])
def test_what_asks_for_a_fraction_has_one(level):
    for seed in range(200):
        assert "/" in problems.fractions(random.Random(seed), level)[1]


def test_options():
    task = get_task("mathematics", kinds=["algebra"], suffix="", system="Be short.", train=3)
    prompt = task.prompts("train")[0]
    assert prompt.messages[0] == {"role": "system", "content": "Be short."}
    assert "boxed" not in prompt.text and prompt.domain == "" and task.trusted
    assert len(task.prompts("train")) == 3 and len(task.prompts("heldout")) == 200
    strict = get_task("mathematics", strict=True)
    prompt = strict.prompts("train")[0]
    assert strict.score(prompt, "The answer is " + prompt.data["answer"]) == 0
    assert strict.answer(prompt, "The answer is 3") is None
    assert task.answer(prompt, "The answer is 0.50.") == "1/2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["geometry"]}, r"kinds: unknown 'geometry'; expected some of \['arithmetic'"),
        ({"kinds": []}, "expected some of"),
        ({"level": 4}, "level=4: expected 1, 2 or 3"),
        ({"verifier": "sympy"}, "verifier='sympy': expected 'symbolic' or 'string'"),
        ({"train": 0}, "train=0: expected at least 1"),
        ({"heldout_split": "test"}, "heldout_split='test': there is no data"),
    ],
)
def test_option_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        get_task("mathematics", **options)


#: Rows as known data sets have them → the right answer.
SHAPES = {
    "gsm8k": ({"question": "q{}", "answer": "He has 40 + 2 = <<40+2=42>>42.\n#### 1,0{}"}, "10{}"),
    "math": (
        {"problem": "q{}", "level": "Level 5", "type": "Algebra",
         "solution": r"We get \boxed{{1}}, no: $\boxed{{\frac{{{}}}{{7}}}}$."},
        "{}/7",
    ),
    "numina": ({"problem": "q{}", "solution": r"\boxed{{0}}", "answer": "{}.5"}, "{}\\frac12"),
    "verl": (
        {"prompt": [{"role": "user", "content": "q{}"}],
         "reward_model": {"style": "rule", "ground_truth": "{}"}},
        "{}",
    ),
    "list": ({"question": "q{}", "answer": ["x = {}", "none"]}, "{}.0"),
    "number": ({"question": "q{}", "answer": 3.0, "id": "{}"}, "3"),
}  # fmt: skip


def filled(value, i):
    if isinstance(value, dict):
        return {k: filled(v, i) for k, v in value.items()}
    if isinstance(value, list):
        return [filled(v, i) for v in value]
    return value.format(i) if isinstance(value, str) else value


@pytest.fixture
def data(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(rows):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize("shape", SHAPES)
def test_data_of_known_shapes(data, shape):
    row, right = SHAPES[shape]
    task = get_task("mathematics", data=data([filled(row, i) for i in range(10, 60)]))
    for split in ("train", "heldout"):
        for prompt in task.prompts(split):
            i = re.search(r"q(\d+)", prompt.text)[1]
            assert ("boxed" in prompt.text) == (shape != "verl")
            assert task.score(prompt, rf"\boxed{{{right.format(i)}}}") == 1
            assert task.score(prompt, r"\boxed{-1}") == 0
    assert sum(len(task.prompts(s)) for s in ("train", "heldout")) == 50
    assert not task.trusted and len(pickle.dumps(task)) < 2000
    assert pickle.loads(pickle.dumps(task)).score(prompt, r"\boxed{-1}") == 0


def test_rows_without_an_answer(data):
    rows = [{"q": f"q{i}", "a": "#### " if i == 7 else str(i)} for i in range(40)]
    file = data(rows)
    with pytest.raises(ValueError, match=r"data\.jsonl row 7: the answer '#### ' is empty"):
        get_task("mathematics", data=file, prompt_field="q", answer_field="a")
    task = get_task("mathematics", data=file, prompt_field="q", answer_field="a", skip=True)
    assert sum(len(task.prompts(s)) for s in ("train", "heldout")) == 39
    with pytest.raises(ValueError, match=r"row 0: no answer: expected the field 'b'; it has 'q'"):
        get_task("mathematics", data=file, prompt_field="q", answer_field="b")


def test_a_piece_of_the_question_is_no_answer(data):
    rows = [{"problem": f"Expand $(x+{i})^2$.", "answer": f"x^2+{2 * i}x+{i * i}"} for i in
            range(30)]  # fmt: skip
    task = get_task("mathematics", data=data(rows))
    prompt = task.prompts("train")[1]
    i = int(re.search(r"x\+(\d+)", prompt.text)[1])
    assert task.score(prompt, rf"\boxed{{(x+{i})^2}}") == 0
    assert task.score(prompt, rf"\boxed{{{i * i} + {2 * i}x + x^2}}") == 1
    spellings = (rf"\boxed{{x(x+{i})}}", rf"\boxed{{{i}x + x^2}}", rf"\boxed{{y = x^2+{i}x}}")
    assert len({task.answer(prompt, text) for text in spellings}) == 1


def test_heavy_packages_are_imported_when_needed(monkeypatch):
    code = (
        "import sys; from pyrl.tasks import get_task; "
        "[get_task(n).prompts('train')[0] for n in ('mathematics', 'stem')]; "
        "print(*{'torch', 'sympy', 'datasets', 'pandas', 'math_verify'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'math-verify: pip install "pyrl\[tasks\]"'):
        get_task("mathematics", verifier="symbolic")
    with pytest.raises(ModuleNotFoundError, match=r'datasets: pip install "pyrl\[tasks\]"'):
        get_task("stem", data="owner/name")


def test_a_proof_has_no_answer(tmp_path):
    rows = [{"problem": f"{i}?", "solution": rf"so \boxed{{{i}}}"} for i in range(20)]
    rows.append({"problem": "Prove it.", "solution": "Clear. QED"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"the solution 'Clear. QED' has no .boxed answer"):
        Mathematics(data=str(file))
    task = Mathematics(data=str(file), skip=True)
    assert len(task.prompts("train")) + len(task.prompts("heldout")) == 20
