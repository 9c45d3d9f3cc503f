"""The constraints a prompt can set: how each is drawn, worded and checked.

A constraint is a dict of its parameters with a `kind`, so that prompts stay plain data. A new kind
is one entry of KINDS.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyrl.tasks.instructions.text import words
from pyrl.tasks.instructions.vocabulary import Vocabulary

Parameters = Mapping[str, Any]

ENDINGS = {"!": "an exclamation mark", ".": "a full stop"}
OPEN_QUOTES, CLOSE_QUOTES = '"“', '"”'


@dataclass(frozen=True)
class Kind:
    """One kind of constraint."""

    draw: Callable[[random.Random, Vocabulary, str], dict[str, Any]]
    """Its parameters, from a generator, the words of the split, and the prompt's keyword."""
    clause: Callable[[Parameters], str]
    """Continues "It must …"."""
    check: Callable[[Parameters, str], bool]


def _nothing(rng: random.Random, vocabulary: Vocabulary, keyword: str) -> dict[str, Any]:
    return {}


def _letters(text: str) -> str:
    return "".join(filter(str.isalpha, text))


def _another(rng: random.Random, vocabulary: Vocabulary, keyword: str) -> str:
    return rng.choice([k for k in vocabulary.keywords if k != keyword])


KINDS: dict[str, Kind] = {
    "keyword": Kind(
        lambda rng, v, keyword: {"word": keyword},
        lambda p: f'use the word "{p["word"]}"',
        lambda p, text: p["word"] in words(text),
    ),
    "keywords": Kind(
        lambda rng, v, keyword: {"words": [keyword, _another(rng, v, keyword)]},
        lambda p: 'use the words "{}" and "{}"'.format(*p["words"]),
        lambda p, text: set(p["words"]) <= set(words(text)),
    ),
    "opener": Kind(
        lambda rng, v, keyword: {"word": rng.choice(v.openers)},
        lambda p: f'start with "{p["word"]}"',
        lambda p, text: words(text)[:1] == [p["word"].lower()],
    ),
    "last_word": Kind(
        lambda rng, v, keyword: {"word": keyword},
        lambda p: f'end with the word "{p["word"]}"',
        lambda p, text: words(text)[-1:] == [p["word"]],
    ),
    "ending": Kind(
        lambda rng, v, keyword: {"mark": rng.choice(sorted(ENDINGS))},
        lambda p: f'end with {ENDINGS[p["mark"]]} ("{p["mark"]}")',
        lambda p, text: text.strip().rstrip("\"'”’)")[-1:] == p["mark"],
    ),
    "no_commas": Kind(
        _nothing,
        lambda p: "have no commas",
        lambda p, text: bool(text.strip()) and "," not in text,
    ),
    "lowercase": Kind(
        _nothing,
        lambda p: "be all in lowercase letters",
        lambda p, text: _letters(text).islower(),
    ),
    "uppercase": Kind(
        _nothing,
        lambda p: "be all in CAPITAL letters",
        lambda p, text: _letters(text).isupper(),
    ),
    "quotes": Kind(
        _nothing,
        lambda p: "be in double quotes",
        lambda p, text: text.strip()[:1] in tuple(OPEN_QUOTES)
        and len(text.strip()) > 1
        and text.strip()[-1] in CLOSE_QUOTES,
    ),
}  # fmt: skip

#: Pairs that make no sense together, or would say the same thing twice.
CLASHES = frozenset(
    frozenset(pair)
    for pair in (
        ("keyword", "keywords"),
        ("keyword", "last_word"),
        ("keywords", "last_word"),
        ("lowercase", "uppercase"),
    )
)


def clause(constraint: Parameters) -> str:
    """The constraint in words."""
    return KINDS[constraint["kind"]].clause(constraint)


def satisfied(constraint: Parameters, text: str) -> bool:
    """Whether `text` keeps the constraint."""
    return KINDS[constraint["kind"]].check(constraint, text)
