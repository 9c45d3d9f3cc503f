"""The form of a kind of instruction, and the ways of drawing that kinds share."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyrl.tasks.ifeval.text import FEWEST_WORDS, words

Parameters = Mapping[str, Any]

#: Levels of difficulty, 1 the easiest.
LEVELS = (1, 2, 3)


@dataclass(frozen=True)
class Kind:
    """One kind of instruction. Its parameters are plain data, so that a prompt can carry them."""

    draw: Callable[[random.Random, int, str], dict[str, Any]]
    """Its parameters, from a generator, the level, and the prompt's request."""
    wording: Callable[[Parameters], str]
    """A sentence or two."""
    check: Callable[[Parameters, str], bool]
    """Whether the text keeps it: linear in the text, whatever the text holds."""
    least: int = FEWEST_WORDS
    """Fewest words of an answer to a generated prompt with this instruction."""
    prose: bool = True
    """Whether the answer is English prose (`text.is_answer`). If not, it is only an answer when it
    keeps this instruction."""


def nothing(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    """No parameters."""
    return {}


def number(
    name: str, *ranges: tuple[int, int], step: int = 1
) -> Callable[[random.Random, int, str], dict[str, Any]]:
    """{name: a multiple of `step` from the level's inclusive range}"""

    def draw(rng: random.Random, level: int, request: str) -> dict[str, Any]:
        low, high = ranges[level - 1]
        return {name: rng.randrange(low, high + 1, step)}

    return draw


def unused(rng: random.Random, choices: Sequence[str], request: str, count: int = 1) -> list[str]:
    """`count` of the choices that the request does not have among its words."""
    taken = set(words(request))
    return rng.sample([c for c in choices if c not in taken], count)


def plural(count: int, noun: str) -> str:
    """ "1 word", "2 words" """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(texts: Sequence[str]) -> str:
    """'"a", "b" and "c"'"""
    quoted = [f'"{t}"' for t in texts]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def related(count: int, p: Parameters) -> bool:
    """`count` against p["n"] by p["relation"]: "at least" (where it is absent), "at most",
    "exactly"."""
    relation = p.get("relation", "at least")
    if relation == "at least":
        return count >= p["n"]
    return count <= p["n"] if relation == "at most" else count == p["n"]
