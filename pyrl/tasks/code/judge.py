"""Compares what a program gave with what was expected, outside its sandbox, on plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyrl.tasks.code.sandbox import Call, Outcome

#: From an expected float a number may differ by this, relatively or, below 1, absolutely.
TOLERANCE = 1e-6
#: Longer words are no numbers that need a tolerance.
_LONGEST = 64


@dataclass(frozen=True)
class Case:
    """A call and what it should give: printed text, or a function's value as JSON data."""

    call: Call
    expected: Any
    single: bool = False
    """Of a function: the only element of `expected` is right as well."""

    def passed(self, outcome: Outcome) -> bool:
        """Whether the call ended well and gave the expected."""
        if outcome.status != "done":
            return False
        if not self.call.function:
            return same_text(outcome.stdout, self.expected)
        try:
            value = json.loads(outcome.result or "")
        except (ValueError, RecursionError):  # the program wrote it: anything may be in it
            return False
        return same_value(value, self.expected) or (
            self.single and same_value(value, self.expected[0])
        )


def same_text(given: str, expected: str) -> bool:
    """Equal words, where white space separates words; an expected word that is a number with a
    point or an exponent is met by any number within TOLERANCE."""
    words, wanted = given.split(), expected.split()
    return len(words) == len(wanted) and all(
        a == b or _close_words(a, b) for a, b in zip(words, wanted, strict=True)
    )


def same_value(given: Any, expected: Any) -> bool:
    """Equal JSON values: a bool is no number, an expected int is met by exactly its value (1 by 1
    and 1.0), an expected float within TOLERANCE. Deeper than the interpreter's stack = unequal."""
    try:
        return _same(given, expected)
    except (RecursionError, OverflowError):
        return False


def _same(given: Any, expected: Any) -> bool:
    if isinstance(expected, bool) or isinstance(given, bool):
        return given is expected
    if isinstance(expected, (int, float)) and isinstance(given, (int, float)):
        if isinstance(expected, int):
            return given == expected
        return _close(float(given), float(expected))
    if isinstance(expected, str) or isinstance(given, str) or expected is None or given is None:
        return type(given) is type(expected) and given == expected
    if isinstance(expected, Mapping):
        return (
            isinstance(given, Mapping)
            and given.keys() == expected.keys()
            and all(_same(given[key], value) for key, value in expected.items())
        )
    if isinstance(expected, Sequence):
        return (
            isinstance(given, Sequence)
            and len(given) == len(expected)
            and all(map(_same, given, expected))
        )
    return False


def _close_words(given: str, expected: str) -> bool:
    if max(len(given), len(expected)) > _LONGEST or not (given.isascii() and expected.isascii()):
        return False
    if not any(mark in expected for mark in ".eE"):
        return False
    try:
        return _close(float(given), float(expected))
    except ValueError:
        return False


def _close(given: float, expected: float) -> bool:
    if math.isnan(expected):
        return math.isnan(given)
    if math.isinf(expected):
        return given == expected
    return abs(given - expected) <= TOLERANCE * max(1.0, abs(expected))
