"""Small programming problems with parameters: statement, reference solution, tests drawn from it.

A problem asks for a function, or for a program that reads its arguments from lines and prints the
result. What makes two problems the same, for splits, is the family with its parameters, not the
style or the function's name.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyrl.tasks.code.families import FAMILIES, Family

NAMES = ("solve", "compute", "answer", "evaluate", "process")
_ARGUMENTS = {
    "int": "an integer",
    "list": "integers separated by spaces (the line may be empty)",
    "str": "a text (it may be empty)",
}
_RESULTS = {
    "int": "it as a number",
    "list": "its elements separated by spaces",
    "str": "it as it is",
    "bool": "True or False",
}
_READ = {"int": "int(input())", "list": "[int(w) for w in input().split()]", "str": "input()"}
_PRINT = {"int": "print({})", "list": "print(*{})", "str": "print({})", "bool": "print({})"}


@dataclass(frozen=True)
class Problem:
    """One problem. `key` is equal for problems that are the same but for their wording."""

    key: str
    statement: str
    function: str
    """The function to write; "" asks for a program."""
    reference: str
    """A right program."""
    tests: tuple[dict[str, Any], ...]
    """{"input": text or arguments, "output": text or value}"""


def draw(rng: random.Random, level: int, tests: int) -> Problem:
    """A problem of the level (1 to 3) with `tests` tests, of whose answers few are the same, so
    that a constant program earns little (see `_inputs`)."""
    family = rng.choice([f for f in FAMILIES if f.level == level])
    values = {name: rng.randint(*span) for name, span in family.parameters.items()}
    name, style = rng.choice(NAMES), rng.choice(("function", "program"))
    arguments = ", ".join(argument for argument, _ in family.arguments)
    body = "\n".join("    " + line for line in _filled(family.body, values).splitlines())
    source = f"def {name}({arguments}):\n{body}\n"
    inputs = _inputs(rng, family, values, _compiled(source, name), tests)
    task = _filled(family.statement, values)
    if style == "function":
        statement = f"Write a Python function `{name}({arguments})`. {task}"
        found = [{"input": given, "output": value} for given, value in inputs]
        return Problem(_key(family, values), statement, name, source, tuple(found))
    reading = "; ".join(f"`{a}`, {_ARGUMENTS[kind]}" for a, kind in family.arguments)
    task = task.replace("Return", "Find")
    statement = (
        "Write a Python program that reads from standard input, each on a line of its own: "
        f"{reading}. {task} Print {_RESULTS[family.result]}."
    )
    reads = "".join(f"{a} = {_READ[kind]}\n" for a, kind in family.arguments)
    printed = _PRINT[family.result].format(f"{name}({arguments})")
    found = [
        {"input": "".join(_line(v) + "\n" for v in given), "output": _line(value)}
        for given, value in inputs
    ]
    return Problem(_key(family, values), statement, "", f"{source}{reads}{printed}\n", tuple(found))


def _inputs(
    rng: random.Random,
    family: Family,
    values: dict[str, int],
    solve: Callable[..., Any],
    count: int,
) -> list[tuple[list[Any], Any]]:
    """`count` different inputs with their answers, of which no answer is that of more than
    ⌈count/2⌉ inputs where it is a bool, ⌈count/4⌉ otherwise: of an even count, half are True.

    Inputs are drawn again until it holds. Only where 200 draws a test do not do it (parameters may
    leave few answers) the bound rises to ⌈count/2⌉, then to count - 1.
    """
    found: dict[str, tuple[list[Any], Any]] = {}
    times: Counter[str] = Counter()
    bounds = (-(-count // 4), -(-count // 2), count - 1)
    for most in bounds[family.result == "bool" :]:
        for _ in range(200 * count):
            given = family.draw(rng, values)
            known, answer = json.dumps(given), solve(*given)
            kind = json.dumps(answer)
            if known in found or times[kind] >= max(most, 1):
                continue
            found[known] = (given, answer)
            times[kind] += 1
            if len(found) == count:
                return list(found.values())
    raise ValueError(f"{_key(family, values)}: fewer than {count} different inputs can be drawn")


def _compiled(source: str, name: str) -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(compile(source, f"<{name}>", "exec"), names)
    function: Callable[..., Any] = names[name]
    return function


def _filled(text: str, values: dict[str, int]) -> str:
    for name, value in values.items():
        text = text.replace(f"<{name}>", str(value))
    return text


def _key(family: Family, values: dict[str, int]) -> str:
    return f"{family.name} {values}"


def _line(value: Any) -> str:
    """A value as a line of standard input or output."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return str(value)
