"""Drawn questions checked by other means, rows of the usual shapes, choices and quantities."""

import json
import math
import random
import re
from fractions import Fraction

import pytest

from pyrl.tasks import get_task
from pyrl.tasks.protocol import user_prompt
from pyrl.tasks.stem.choice import chosen
from pyrl.tasks.stem.quantity import parse_unit, read, same_quantity
from pyrl.tasks.stem.questions import SUBJECTS, layer, organelle, show, strand
from pyrl.tasks.stem.task import options_of

TEMPLATES = {t.__name__: t for ts in SUBJECTS.values() for t in ts}
PERIODIC = "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca".split()  # noqa: SIM905
NAMES = {"hydrogen": "H", "helium": "He", "lithium": "Li", "beryllium": "Be", "boron": "B",
         "carbon": "C", "nitrogen": "N", "oxygen": "O", "fluorine": "F", "neon": "Ne",
         "sodium": "Na", "magnesium": "Mg", "aluminium": "Al", "silicon": "Si", "phosphorus": "P",
         "sulfur": "S", "chlorine": "Cl", "argon": "Ar", "potassium": "K",
         "calcium": "Ca"}  # fmt: skip
WEIGHTS = {"H": 1, "C": 12, "N": 14, "O": 16, "Na": 23, "S": 32, "Cl": 35.5, "Ca": 40}
FACTS = {"ATP": "mitochondrion", "photosynthesis": "chloroplast", "messenger": "ribosome",
         "DNA of an": "nucleus", "enters": "cell membrane", "ozone": "stratosphere",
         "weather": "troposphere", "magnetic": "outer core", "thickest": "mantle",
         "outermost": "crust"}  # fmt: skip


def mass(formula):
    return sum(WEIGHTS[e] * int(k or 1) for e, k in re.findall(r"([A-Z][a-z]?)(\d*)", formula))


def fact(text, _):
    return next(v for k, v in FACTS.items() if k in text)


def offspring(text, _):
    one, two = re.findall(r"\b[Aa]{2}\b", text)
    recessive = (one.count("a") / 2) * (two.count("a") / 2)
    return 100 * (recessive if "recessive" in text else 1 - recessive)


#: template → the answer from the question's text and its numbers, in floats.
SOLVED = {
    "speed": lambda t, n: n[0] / n[1],
    "acceleration": lambda t, n: (n[1] - n[0]) / n[2],
    "fall": lambda t, n: n[1] * n[0] ** 2 / 2,
    "ohm": lambda t, n: n[1] / n[0],
    "electric_power": lambda t, n: n[0] * n[1],
    "kinetic_energy": lambda t, n: n[0] * n[1] ** 2 / 2,
    "momentum": lambda t, n: n[0] * n[1],
    "density": lambda t, n: n[0] / n[1],
    "wave": lambda t, n: n[0] * n[1],
    "resistors": lambda t, n: 1 / (1 / n[0] + 1 / n[1]),
    "pressure": lambda t, n: n[0] / n[1],
    "heat": lambda t, n: n[0] * n[1] * n[2],
    "kmh": lambda t, n: n[0] * 1000 / 3600,
    "molar_mass": lambda t, n: mass(re.search(r"\((\w+)\)", t)[1]),
    "moles": lambda t, n: n[0] / mass(re.search(r"\((\w+),", t)[1]),
    "acidity": lambda t, n: -math.log10(10.0 ** -int(re.search(r"-(\d+)", t)[1])),
    "atomic_number": lambda t, n: 1 + PERIODIC.index(NAMES[re.search(r"of (\w+)\?", t)[1]]),
    "element": lambda t, n: {s: x for x, s in NAMES.items()}[re.search(r"symbol (\w+)", t)[1]],
    "neutrons": lambda t, n: (
        int(re.search(r"-(\d+)", t)[1]) - 1 - PERIODIC.index(NAMES[re.search(r"of (\w+)-", t)[1]])
    ),
    "dilution": lambda t, n: n[1] * n[0] / n[2],
    "kelvin": lambda t, n: 273 + n[0],
    "punnett": offspring,
    "strand": lambda t, n: (
        re.search(r"reads (\w+)", t)[1].translate(str.maketrans("ACGT", "TGCA"))
    ),
    "codons": lambda t, n: n[0] / 3,
    "doubling": lambda t, n: n[0] * 2 ** (n[2] / n[1]),
    "gametes": lambda t, n: n[0] / 2,
    "organelle": fact,
    "half_life": lambda t, n: n[1] * 0.5 ** (n[2] / n[0]),
    "planet": lambda t, n: (
        ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"][
            int(n[0]) - 1
        ]
    ),
    "layer": fact,
    "drift": lambda t, n: n[0] * 1e-5 * n[1] * 1e6,
    "map_scale": lambda t, n: n[1] * n[0] / 100 / 1000,
    "from_binary": lambda t, n: int(re.search(r"[01]+", t)[0], 2),
    "to_hex": lambda t, n: hex(int(n[0]))[2:].upper(),
    "bit_values": lambda t, n: 2 ** n[0],
    "halvings": lambda t, n: math.ceil(math.log2(n[0] + 1)),
    "logic": lambda t, n: (
        str(eval(re.search(r"is (.*),", t)[1].replace("NOT", "not").replace("AND", "and")
                 .replace("OR", "or")))
    ),
    "transfer": lambda t, n: n[0] / 8 * n[1],
}  # fmt: skip


def numbers(text):
    found = re.findall(r"(?<![\w^.-])-?\d+(?:\.\d+)?(?!\d*:)(?![\w^])|(?<=1:)\d+", text)
    return [float(x) for x in found]


def test_there_are_enough_templates():
    assert SOLVED.keys() == TEMPLATES.keys() and len(TEMPLATES) >= 25


@pytest.mark.parametrize("name", SOLVED)
def test_drawn_answers_are_right(name):
    for seed in range(20):
        rng = random.Random(seed)
        made = TEMPLATES[name](rng)
        other = SOLVED[name](made.text, numbers(made.text))
        if isinstance(made.answer, str):
            assert other == made.answer, made
        else:  # printed quantities have four significant digits
            assert math.isclose(other, float(made.answer), rel_tol=1e-3, abs_tol=1e-9), made
        options = options_of(made, rng)
        assert len(set(options)) == len(options) >= 2
        assert len(options) == 4 or name in ("logic", "to_hex", "strand"), options


def test_own_answers_score_one_and_others_zero():
    task = get_task("stem", train=300, heldout=60)
    kinds = []
    for prompt in [*task.prompts("train"), *task.prompts("heldout")]:
        data = prompt.data
        kinds.append("right" in data)
        if "right" in data:
            letters = "ABCDEFGHIJ"[: len(data["options"])]
            for i, letter in enumerate(letters):
                right = float(i == data["right"])
                for text in (rf"\boxed{{{letter}}}", f"The answer is {letter}.", f"({letter})"):
                    assert task.score(prompt, text) == right, (prompt, text)
                assert task.score(prompt, rf"\boxed{{{data['options'][i]}}}") == right
                assert task.answer(prompt, f"Answer: {letter}") == letter
        elif "value" in data:
            value = Fraction(data["value"])
            for text in (show(value), f"{show(value)} {data['unit']}", f"{float(value)!r}"):
                assert task.score(prompt, rf"\boxed{{{text}}}") == 1, (prompt, text)
                assert task.score(prompt, f"Answer: {text}") == 1, (prompt, text)
            assert task.score(prompt, rf"\boxed{{{show(value * 2 + 1)}}}") == 0
        else:
            for text in data["texts"]:
                assert task.score(prompt, f"The answer is {text}.") == 1
            assert task.score(prompt, r"\boxed{something else}") == 0
        assert task.score(prompt, "") == task.score(prompt, "\\boxed{}") == 0
    assert sum(kinds) == 180 and task.trusted
    sides = [{p.data["question"] for p in task.prompts(s)} for s in ("train", "heldout")]
    assert not sides[0] & sides[1]


OPTIONS = ["a dog", "water", "7", "H_2O"]
CHOSEN = {
    r"\boxed{C}": 2, r"\boxed{(C)}": 2, r"\boxed{C.}": 2, r"\boxed{c}": 2, r"\boxed{\text{C}}": 2,
    r"\boxed{C) 7}": 2, r"\boxed{7}": 2, r"\boxed{ WATER. }": 1, r"\boxed{Ｃ}": 2,
    r"\boxed{A} no, \boxed{B}": 1, r"The answer is A. \boxed{B}": 1, r"<think>(A)</think> (B)": 1,
    r"\boxed{A and C}": None, r"\boxed{A, B}": None, r"\boxed{A B}": None, r"\boxed{A/B}": None,
    r"\boxed{C) water}": None, r"\boxed{E}": None, r"\boxed{}": None, r"\boxed{cat}": None,
    "The answer is C.": 2, "Answer: (B) water": 1, "answer: A dog": 0, "The answer is: **D**": 3,
    "The answer is A or B": None, "I think it is (D).": 3, "B": 1, "D) H2O": 3, "C.": 2,
    "A good guess": None, "b": None, "no idea": None, "": None,
    r"\boxed{{C}}": 2, r"\boxed{option c}": 2, r"\boxed{the option (c)}": 2, "#### B": 1,
    r"\boxed{14/2}": None,
}  # fmt: skip


@pytest.mark.parametrize("text", CHOSEN)
def test_choices(text):
    assert chosen(text, OPTIONS) == CHOSEN[text]
    if "boxed" not in text:
        assert chosen(text, OPTIONS, strict=True) is None


def test_an_option_without_its_unit():
    options = ["4.571 ohm", "4 ohm", "5 m", "5 km", "3.35 A"]
    wanted = {"4.571": 0, "4.571 Ω": 0, "4 ohms": 1, "5": None, "5 km": 3, "5000 m": 3,
              "4.57": None, "67/20": None, "4 kg": None, "3.35": 4, "4 or 5": None}  # fmt: skip
    for text, index in wanted.items():
        assert chosen(rf"\boxed{{{text}}}", options) == index, text


def test_every_drawn_unit_is_known():
    made = [t(random.Random(0)) for t in TEMPLATES.values()]
    units = {q.unit for q in made if q.unit}
    assert len(units) > 10
    for unit in units:
        found = read(f"5 {unit}")
        assert found and found.unit and parse_unit(found.rest)[1] == "", unit


def test_repeating_the_question_as_a_fraction():
    text = "A car drives 680 m in 17 s at constant speed. What is its speed in m/s?"
    for answer in ("680/17", r"\frac{680}{17}", r"\frac{680}{17} m/s", "1360/34"):
        assert not same_quantity("40", "m/s", answer, 0.01, text)
    assert not same_quantity("67/20", "A", "67/20", 0.01, "67 V and 20 ohm")
    assert same_quantity("67/20", "A", "134/40", 0.01, "67 V and 20 ohm")
    assert same_quantity("40", "m/s", "680/17 = 40 m/s", 0.01, text)


def test_usual_spellings_are_right():
    spelled = {
        "mitochondrion": "mitochondria", "cell membrane": "plasma membrane",
        "nucleus": "the cell nucleus", "ribosome": "ribosomes", "crust": "Earth's crust",
    }  # fmt: skip
    for seed in range(60):
        for template in (organelle, layer, strand):
            made = template(random.Random(seed))
            prompt = user_prompt("x", made.text, texts=[made.answer, *made.spellings])
            task = get_task("stem", train=1, heldout=1)
            answers = [spelled.get(made.answer, made.answer)]
            if template is strand:
                answers += [" ".join(made.answer), f"5'-{made.answer}-3'", f"3′-{made.answer}-5′"]
                assert task.score(prompt, rf"\boxed{{{made.answer[::-1]}A}}") == 0
            for answer in answers:
                assert task.score(prompt, rf"\boxed{{{answer}}}") == 1, answer


def test_kelvin_is_exact():
    for prompt in get_task("stem", subjects=["chemistry"], train=200).prompts("train"):
        if prompt.data["template"] == "kelvin" and "value" in prompt.data:
            assert prompt.data["tolerance"] == 0


@pytest.mark.parametrize(
    ("value", "unit", "answer", "right"),
    [
        ("5", "m/s", "5 m/s", True), ("5", "m/s", "18 km/h", True), ("5", "m/s", "5", True),
        ("5", "m/s", "5 m", False), ("5", "m/s", "5 km/s", False), ("5", "m/s", "5.06", False),
        ("5", "m/s", "5.05", True), ("5", "m/s", "x = 5 meters per second", True),
        ("9.8", "m/s^2", r"9.81\ \text{m/s}^2", True), ("9.8", "m/s^2", "9.8 m s^{-2}", True),
        ("25", "degC", r"25^\circ C", True), ("25", "degC", "25 °C", True),
        ("25", "degC", "25 K", False), ("5", "ohm", r"5\,\Omega", True),
        ("5", "ohm", "5 kΩ", False),
        ("1500", "J", "1.5 kJ", True), ("1500", "J", r"1.5 \times 10^3 J", True),
        ("3", "N", "3 kg*m/s^2", True), ("0.5", "A", "500 mA", True),
        ("12", "", "12 neutrons", True),
        ("75", "percent", r"75\%", True), ("75", "percent", "0.75", False),
        ("0", "m", "0.001", True),
        ("-273", "degC", "−273", True), ("5", "m", "five", False), ("5", "m", "", False),
        ("5", "m", "5" * 500, False), ("1/3", "m", "0.333", True), ("5", "m", "1e999 m", False),
        ("266", "MB", "266 Mbit", False), ("266", "MB", "266 kg", False),
        ("266", "MB", "2128 Mbit", True), ("266", "MB", "0.266 GB", True),
        ("266", "MB", "266 megabytes", True), ("266", "MB", "266000 KB", True),
        ("6", "m/s^2", "6 meters per second squared", True), ("6", "m/s^2", "6 m/s²", True),
        ("6", "m/s^2", "6 meters per second cubed", False), ("2", "m^3", "2 cubic meters", True),
        ("4.2", "kJ", "4.2 kJ/(kg K)", False), ("12", "", "12!", False),
        ("12", "", "12 - 5", False),
        ("12", "", "12, 13", False), ("13", "", "13^2", False), ("2", "mol", "2 mol of CO2", True),
    ],
)  # fmt: skip
def test_quantities(value, unit, answer, right):
    assert same_quantity(value, unit, answer, 0.01) is right


#: Rows as known data sets have them → the right option's text, or the answer.
SHAPES = {
    "mmlu": ({"question": "q{}", "choices": ["w", "x", "y{}", "z"], "answer": 2}, "y{}"),
    "mmlu_pro": ({"question": "q{}", "options": ["w", "x", "y{}"], "answer": "C",
                  "answer_index": 2}, "y{}"),
    "arc": ({"question": "q{}", "choices": {"text": ["w", "y{}"], "label": ["1", "2"]},
             "answerKey": "2"}, "y{}"),
    "letters": ({"question": "q{}", "options": {"A": "w", "B": "y{}", "C": "z"}, "answer": "(B)"},
                "y{}"),
    "text": ({"question": "q{}", "options": ["1", "2", "3", "{}"], "answer": "2"}, "2"),
    "gpqa": ({"Question": "q{}", "Correct Answer": "y{}", "Incorrect Answer 1": "w",
              "Incorrect Answer 2": "x", "Incorrect Answer 3": "z"}, "y{}"),
    "sciq": ({"question": "q{}", "correct_answer": "y{}", "distractor1": "w", "distractor2": "x",
              "distractor3": "z"}, "y{}"),
    "number": ({"question": "q{}", "answer": "{} m/s", "tolerance": 0.001}, "{}.001 m/s"),
    "aliases": ({"question": "q{}", "answers": ["the Moon {}", "Luna {}"]}, "luna {}"),
}  # fmt: skip


def filled(value, i):
    if isinstance(value, dict):
        return {k.format(i): filled(v, i) for k, v in value.items()}
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
def test_rows_of_known_shapes(data, shape):
    row, right = SHAPES[shape]
    task = get_task("stem", data=data([filled(row, i) for i in range(10, 60)]))
    places = set()
    for split in ("train", "heldout"):
        for prompt in task.prompts(split):
            i = re.match(r"q(\d+)", prompt.text)[1]
            assert task.score(prompt, rf"\boxed{{{right.format(i)}}}") == 1
            assert task.score(prompt, r"\boxed{-1}") == 0
            if "right" in prompt.data:
                places.add(prompt.data["right"])
                letter = "ABCDEFGHIJ"[prompt.data["right"]]
                assert f"\n{letter}) {right.format(i)}\n" in prompt.text
                assert task.score(prompt, f"({letter})") == 1
    assert len(places) != 1  # shuffled, or not a choice


def test_options_about_others_keep_their_places(data):
    options = ["a", "b", "All of the above"]
    rows = [{"question": f"q{i}", "options": options, "answer": 2} for i in range(40)]
    file = data(rows)
    for task in (get_task("stem", data=file), get_task("stem", data=file, shuffle=False)):
        assert all(p.data["right"] == 2 for p in task.prompts("train"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q", "options": ["a"], "answer": 0},
            "the options are .*expected two or more",
        ),
        (
            {"question": "q", "options": ["a", "b"], "answer": "C"},
            "the answer 'C' is none of the 2",
        ),
        ({"question": "q", "options": ["a", "b"], "answer": 2}, "the answer 2 is none of the 2"),
        ({"question": " ", "answer": "a"}, "the question is ' '"),
        ({"question": "q", "answer": ""}, "the answer '' is empty"),
        ({"question": "q", "options": [*"abcdefghijk"], "answer": 2}, "11 options; at most 10"),
    ],
)
def test_broken_rows(data, row, message):
    with pytest.raises(ValueError, match=r"data\.jsonl row 0: " + message):
        get_task("stem", data=data([row] * 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subjects": ["magic"]}, "subjects: unknown 'magic'; expected some of .*'physics'"),
        ({"subjects": []}, "expected some of"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"heldout": 0}, "heldout=0"),
    ],
)
def test_option_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        get_task("stem", **options)
