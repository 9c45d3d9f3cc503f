"""The only file that imports `reasoning_gym`: entries and scorers by name and level."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import importlib
import importlib.util
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pyrl.tasks.logic.findings import LEVELS
from pyrl.tasks.scoring import CHECK_ERRORS

#: An answer so much longer than the puzzle's own is none.
MOST_CHARACTERS = 20_000
#: Seeds for one entry: a few data sets give up on a few seeds.
TRIES = 20

#: They read large files when they are made, and an entry depends on nothing but `seed` and index.
_REUSED = ("arc_agi", "figlet_font", "group_anagrams")
#: Data sets whose kinds of entry are laid out over the whole size.
_SIZES = {"acre": 10}
#: Scorers that `eval` the answer. They are given a reader of literals in its place.
_EVAL = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
#: Scorers that give the answer to sympy's `parse_expr`, which evaluates it: what it may hold.
_PARSED = {
    "countdown": re.compile(r"[0-9\s+\-*/()]*"),
    "intermediate_integration": re.compile(r"[0-9A-Za-z\s+\-*/().,]*"),
    "simple_integration": re.compile(r"[0-9A-Za-z\s+\-*/().,]*"),
}
#: What an expression may name. Not `Integral`: the derivative of "Integral(f, x)" is f, so this
#: would solve every integral, and it is the package's own answer to some.
_NAME = re.compile(r"[A-Za-z]+")
_NAMES = frozenset(
    "sin cos tan sec csc cot asin acos atan sinh cosh tanh exp log ln sqrt pi abs Abs".split()  # noqa: SIM905
)
#: An attribute, or an exponent of more than two digits.
_REFUSED = re.compile(r"\.\s*[A-Za-z]|\*\*\s*\(?\s*-?\s*[0-9]{3}")


def check_installed() -> None:
    """Raises ValueError when the package is missing. Imports nothing."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(
            "task 'logic' needs the package reasoning_gym, which is not installed: "
            'pip install "pyrl[tasks]"'
        )


@functools.lru_cache(maxsize=1)
def load() -> Any:
    """`reasoning_gym.factory`. The import takes a second or two: sympy, matplotlib."""
    with _global_generators(0):
        factory = importlib.import_module("reasoning_gym").factory
    for name in _EVAL:
        module = importlib.import_module(factory.DATASETS[name][0].__module__)
        vars(module)["eval"] = ast.literal_eval
    return factory


def config(name: str, level: int | None, **options: Any) -> Any:
    """The configuration of the `level`-th usable level (the last where there are fewer); the
    package's default for None, and for a data set without levels."""
    factory = load()
    if name not in factory.DATASETS:
        raise ValueError(f"task 'logic': this version of reasoning_gym has no data set {name!r}")
    if level is None or not LEVELS[name]:
        return factory.DATASETS[name][1](**options)
    curriculum = factory.CURRICULA[name]()
    curriculum.set_global_level(LEVELS[name][min(level, len(LEVELS[name])) - 1] - 1)
    return curriculum.generate_configuration(options)


@functools.lru_cache(maxsize=256)
def scorer(name: str, level: int | None) -> Any:
    """A data set to score with: the same for all seeds."""
    with _global_generators(0):
        return _dataset(name, level, 0)


def entry(name: str, level: int | None, rng: random.Random) -> dict[str, Any]:
    """`question`, `answer` and `metadata`, as plain data: a function of the generator's state.
    The global generators of `random` and NumPy are as they were afterwards.

    Raises ValueError when none of TRIES seeds gives one.
    """
    for _ in range(TRIES):
        seed = rng.randrange(2**31)
        try:
            with _global_generators(seed):
                made = _dataset(name, level, seed)[rng.randrange(_SIZES.get(name, 1))]
        except CHECK_ERRORS as error:
            reason = error
            continue
        return {key: _plain(made[key]) for key in ("question", "answer", "metadata")}
    raise ValueError(f"task 'logic': no entry of {name!r} at level {level}: {reason}")


def score(name: str, level: int | None, made: Mapping[str, Any], answer: str) -> float:
    """The data set's own score of the answer to an entry, in [0, 1].

    0 for an empty answer, one MOST_CHARACTERS longer than its own, one that its scorer cannot read,
    and one that would be evaluated and is not a plain list or expression.
    """
    most = len(made["answer"] or "") + MOST_CHARACTERS
    if not answer or len(answer) > most or not _evaluable(name, made, answer):
        return 0.0
    try:
        found = float(scorer(name, level).score_answer(answer, made))
    except (*CHECK_ERRORS, SyntaxError):
        return 0.0
    return min(max(found, 0.0), 1.0)


def _dataset(name: str, level: int | None, seed: int) -> Any:
    if name in _REUSED and seed != 0:
        reused = copy.copy(scorer(name, level))
        reused.seed = seed
        return reused
    options = config(name, level, seed=seed, size=_SIZES.get(name, 1))
    return load().DATASETS[name][0](options)


def _evaluable(name: str, made: Mapping[str, Any], answer: str) -> bool:
    allowed = _PARSED.get(name)
    if allowed is None:
        return True
    names = {*_NAMES, "C", "E", str(made["metadata"].get("variable", ""))}
    return (
        allowed.fullmatch(answer) is not None
        and names.issuperset(_NAME.findall(answer))
        and _REFUSED.search(answer) is None
    )


@contextlib.contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """The global generators of `random` and NumPy, seeded; some data sets draw from them, and one
    seeds NumPy's."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _plain(value: Any) -> Any:
    """The value with NumPy's scalars and arrays as Python's own. Not JSON: scorers need the tuples,
    and keys that are numbers."""
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_plain(v) for v in value)
    return value.tolist() if type(value).__module__ == "numpy" else value
