"""Kinds of instruction about how long a text is, which words it has, and in which case."""

from __future__ import annotations

import random
import re
from typing import Any

from pyrl.tasks.ifeval import vocabulary as v
from pyrl.tasks.ifeval.kind import (
    Kind,
    Parameters,
    listed,
    nothing,
    number,
    plural,
    related,
    unused,
)
from pyrl.tasks.ifeval.text import count_words, lines, occurrences, paragraphs, sentences, words

_TWO_OR_MORE = re.compile(r"[^\W_]{2,}")


def _range(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    low = rng.randrange(40, 161, 10)
    return {"low": low, "high": low + (60, 40, 20)[level - 1]}


def _opened(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    count = rng.randint(2, 2 + level)
    return {"n": count, "which": rng.randint(1, count), "word": rng.choice(v.OPENERS)}


def _included(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    return {"words": unused(rng, v.KEYWORDS, request, level)}


def _frequency(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    return {"word": unused(rng, v.KEYWORDS, request)[0], "n": level + rng.randint(1, 2)}


def _avoided(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    return {"words": unused(rng, v.AVOIDED, request, 1 + level)}


def _frequent(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    return {"letter": rng.choice(v.FREQUENT), "n": 5 * level + rng.randint(0, 5)}


def _seldom(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    return {"letter": rng.choice(v.SELDOM), "n": 9 - 2 * level + rng.randint(0, 1)}


def _capitals(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"n": rng.randint(level, 2 * level), "relation": "at least"}
    n = 2 * level
    return {"n": n, "relation": rng.choice(("at most", "exactly"))}


def _in_capitals(text: str) -> int:
    """Words of two or more letters, all of them capitals."""
    return sum(map(str.isupper, _TWO_OR_MORE.findall(text)))


def _opens(p: Parameters, text: str) -> bool:
    found = paragraphs(text)
    opening = words(found[p["which"] - 1][:200])[:1] if len(found) == p["n"] else []
    return opening == words(p["word"])


CONTENTS: dict[str, Kind] = {
    "words_min": Kind(
        number("n", (30, 80), (80, 160), (160, 300), step=10),
        lambda p: f"Use at least {p['n']} words.",
        lambda p, text: count_words(text) >= p["n"],
    ),
    "words_max": Kind(
        number("n", (100, 150), (60, 100), (30, 60), step=10),
        lambda p: f"Use at most {p['n']} words.",
        lambda p, text: count_words(text) <= p["n"],
    ),
    "words_range": Kind(
        _range,
        lambda p: f"Use between {p['low']} and {p['high']} words.",
        lambda p, text: p["low"] <= count_words(text) <= p["high"],
    ),
    "sentences_min": Kind(
        number("n", (3, 5), (6, 9), (10, 15)),
        lambda p: f"Write at least {plural(p['n'], 'sentence')}.",
        lambda p, text: sentences(text) >= p["n"],
    ),
    "sentences_max": Kind(
        number("n", (6, 8), (4, 6), (2, 4)),
        lambda p: f"Write at most {plural(p['n'], 'sentence')}.",
        lambda p, text: sentences(text) <= p["n"],
    ),
    "lines": Kind(
        number("n", (3, 5), (5, 9), (9, 14)),
        lambda p: f"Write exactly {plural(p['n'], 'line')}; blank lines do not count.",
        lambda p, text: len(lines(text)) == p["n"],
    ),
    "questions": Kind(
        number("n", (1, 2), (2, 3), (3, 5)),
        lambda p: f"Use the question mark exactly {plural(p['n'], 'time')}.",
        lambda p, text: text.count("?") == p["n"],
    ),
    "paragraph_opening": Kind(
        _opened,
        lambda p: (
            f"Write exactly {plural(p['n'], 'paragraph')}, with a blank line between them. "
            f'Begin paragraph {p["which"]} with the word "{p["word"]}".'
        ),
        _opens,
    ),
    "include": Kind(
        _included,
        lambda p: f"Use the word{'s' * (len(p['words']) > 1)} {listed(p['words'])}.",
        lambda p, text: all(occurrences(text, w) for w in p["words"]),
    ),
    "frequency": Kind(
        _frequency,
        lambda p: f'Use the word "{p["word"]}" at least {plural(p["n"], "time")}.',
        lambda p, text: related(occurrences(text, p["word"]), p),
    ),
    "avoid": Kind(
        _avoided,
        lambda p: f"Do not use the words {listed(p['words'])}.",
        lambda p, text: not any(occurrences(text, w) for w in p["words"]),
    ),
    "letter_min": Kind(
        _frequent,
        lambda p: f'Use the letter "{p["letter"]}" at least {plural(p["n"], "time")}.',
        lambda p, text: text.lower().count(p["letter"].lower()) >= p["n"],
    ),
    "letter_max": Kind(
        _seldom,
        lambda p: f'Use the letter "{p["letter"]}" at most {plural(p["n"], "time")}.',
        lambda p, text: text.lower().count(p["letter"].lower()) <= p["n"],
    ),
    "lowercase": Kind(
        nothing,
        lambda p: "Use lowercase letters only.",
        lambda p, text: text.islower(),
    ),
    "uppercase": Kind(
        nothing,
        lambda p: "Use CAPITAL LETTERS only.",
        lambda p, text: text.isupper(),
    ),
    "capitals": Kind(
        _capitals,
        lambda p: (
            f"Write {p['relation']} {plural(p['n'], 'word')} in CAPITALS "
            "(words of a single letter do not count)."
        ),
        lambda p, text: related(_in_capitals(text), p),
    ),
    "no_commas": Kind(
        nothing,
        lambda p: "Do not use commas.",
        lambda p, text: not any(comma in text for comma in ",，、،"),
    ),
}
