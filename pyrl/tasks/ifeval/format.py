"""Kinds of instruction about the form of a text."""

from __future__ import annotations

import json
import random
import re
from typing import Any

from pyrl.tasks.extract import last_code_block
from pyrl.tasks.ifeval import vocabulary as v
from pyrl.tasks.ifeval.kind import Kind, Parameters, listed, nothing, number, plural
from pyrl.tasks.ifeval.language import LANGUAGES, is_language
from pyrl.tasks.ifeval.text import count_words, items, lines, parts

PARAGRAPH_MARK, ANSWER_MARK = "***", "******"
#: Words that a part of an answer has at least: an empty part is none.
PART_WORDS = 3

# Each run of these stops at the next character that could begin another match: linear.
_PLACEHOLDER = re.compile(r"\[([^\[\]\n]*)\]")
_HIGHLIGHT = re.compile(r"(?<!\*)\*\*?(?=[^\s*])([^*\n]+)\*")  # "* " begins a bullet
_NUMBER = re.compile(r"[0-9]+(?:[.,:][0-9]+)*")
_NUMBERED = re.compile(r"([0-9]{1,3})[.)][ \t]+\S")
_QUOTES = {'"': '"', "“": "”", "«": "»"}


def _choice(name: str, choices: tuple[Any, ...]) -> Any:
    def draw(rng: random.Random, level: int, request: str) -> dict[str, Any]:
        return {name: rng.choice(choices)}

    return draw


def _sections(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    return {"n": rng.randint(2, 2 + level), "name": rng.choice(("SECTION", "PART", "CHAPTER"))}


def _keys(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    return {"keys": rng.sample(v.KEYS, 1 + level)}


def _replies(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    return {"options": list(rng.choice(v.REPLIES)), "first": True}


def _table(rng: random.Random, level: int, request: str) -> dict[str, Any]:
    return {"columns": rng.randint(2, 2 + level), "rows": rng.randint(2, 2 + level)}


def _whole(texts: list[str], count: int) -> bool:
    return len(texts) == count and all(count_words(t) >= PART_WORDS for t in texts)


def _numbered(p: Parameters, text: str) -> bool:
    found = [m[1] for line in lines(text) if (m := _NUMBERED.match(line))]
    return found == [str(i) for i in range(1, p["n"] + 1)]


def _sectioned(p: Parameters, text: str) -> bool:
    """Sections 1, 2, … in order, each begun by a line that starts with its name and has text."""
    head = re.compile(rf"[#*_\s]*{re.escape(p['name'])}\s+([0-9]{{1,3}})(?![0-9])", re.IGNORECASE)
    bodies: list[list[str]] = []
    for line in lines(text):
        match = head.match(line[:200])
        if match and match[1] == str(len(bodies) + 1):
            bodies.append([line[match.end() :]])
        elif match:
            return False
        elif bodies:
            bodies[-1].append(line)
    if not all(count_words("\n".join(body)) for body in bodies):
        return False
    return len(bodies) == p["n"] or (p.get("relation") == "at least" and len(bodies) > p["n"])


def _titled(p: Parameters, text: str) -> bool:
    return any(
        count_words(line[begin + 2 : end])
        for line in lines(text)
        if (begin := line.find("<<")) >= 0 and (end := line.find(">>", begin)) >= 0
    )


def _placeholders(p: Parameters, text: str) -> bool:
    return len({m for m in _PLACEHOLDER.findall(text) if m.strip()}) >= p["n"]


def _highlights(p: Parameters, text: str) -> bool:
    found = {m for m in _HIGHLIGHT.findall(text) if m == m.strip()}
    return len(found) >= p["n"]


def _quoted(p: Parameters, text: str) -> bool:
    inside = text[1:-1]
    return _QUOTES.get(text[:1]) == text[-1:] and not inside.count('"') % 2 and inside.strip() != ""


def _postscript(p: Parameters, text: str) -> bool:
    """Two words after the mark, and a line before it."""
    found = lines(text)
    return any(
        line.startswith(p["mark"]) and count_words(line[len(p["mark"]) :]) >= 2
        for line in found[1:]
    )


def _json(p: Parameters, text: str) -> bool:
    """The text, or the one fenced block that it is, parses; with keys: to an object with them all,
    none of their values empty."""
    if text.startswith("```") and text.endswith("```"):
        block = last_code_block(text)
        text = text if block is None or text.count("```") != 2 else block
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    keys = p.get("keys", ())
    if not keys:
        return isinstance(value, (dict, list)) and bool(value)
    return isinstance(value, dict) and all(value.get(k) not in (None, "", [], {}) for k in keys)


def _two(p: Parameters, text: str) -> bool:
    found = parts(text, ANSWER_MARK)
    return _whole(found, 2) and found[0] != found[1]


def _one_of(p: Parameters, text: str) -> bool:
    held = [o for o in p["options"] if o in text]
    return len(held) == 1 and (not p.get("first") or text.startswith(held[0]))


def _tabular(p: Parameters, text: str) -> bool:
    rows = [
        [cell.strip() for cell in line[1:-1].split("|")]
        for line in lines(text)
        if len(line) > 1 and line[0] == line[-1] == "|"
    ]
    rule = rows[1] if len(rows) > 1 else []
    return (
        len(rows) == p["rows"] + 2
        and all(len(row) == p["columns"] for row in rows)
        and all(len(cell) > 2 and not cell.strip("-:") for cell in rule)
        and all(any(map(str.isalnum, cell)) for row in (rows[0], *rows[2:]) for cell in row)
    )


def _begins(key: str) -> Any:
    return lambda p, text: text.startswith(p[key]) and count_words(text[len(p[key]) :]) > 0


FORMAT: dict[str, Kind] = {
    "paragraphs": Kind(
        number("n", (2, 3), (3, 4), (4, 6)),
        lambda p: (
            f"Write exactly {plural(p['n'], 'paragraph')}, "
            f"with a line of three asterisks ({PARAGRAPH_MARK}) between them."
        ),
        lambda p, text: _whole(parts(text, PARAGRAPH_MARK), p["n"]),
    ),
    "bullets": Kind(
        number("n", (2, 3), (3, 5), (5, 8)),
        lambda p: f'Include exactly {plural(p["n"], "bullet point")}, lines that begin with "* ".',
        lambda p, text: len(items(text)) == p["n"] and all(map(count_words, items(text))),
    ),
    "numbered": Kind(
        number("n", (2, 3), (4, 6), (7, 10)),
        lambda p: f'Include a numbered list of exactly {plural(p["n"], "item")} ("1. ", "2. ", …).',
        _numbered,
    ),
    "sections": Kind(
        _sections,
        lambda p: (
            f"Divide the text into exactly {plural(p['n'], 'section')}. "
            f'Begin them with lines "{p["name"]} 1", "{p["name"]} 2", and so on.'
        ),
        _sectioned,
    ),
    "title": Kind(
        nothing,
        lambda p: "Give it a title in double angular brackets, such as <<a title>>.",
        _titled,
    ),
    "placeholders": Kind(
        number("n", (1, 2), (2, 4), (4, 6)),
        lambda p: (
            f"Include at least {p['n']} different placeholder{'s' * (p['n'] > 1)} "
            "in square brackets, such as [name]."
        ),
        _placeholders,
    ),
    "highlights": Kind(
        number("n", (1, 2), (2, 4), (4, 6)),
        lambda p: (
            f"Highlight at least {p['n']} different part{'s' * (p['n'] > 1)} of the text "
            "with asterisks, *like this*."
        ),
        _highlights,
    ),
    "quoted": Kind(
        nothing,
        lambda p: "Put your whole answer in double quotation marks.",
        _quoted,
    ),
    "postscript": Kind(
        _choice("mark", v.POSTSCRIPTS),
        lambda p: f'At the end add a postscript that begins with "{p["mark"]}".',
        _postscript,
    ),
    "opening": Kind(
        _choice("phrase", v.BEGINNINGS),
        lambda p: f"Begin with exactly this sentence: {p['phrase']}",
        _begins("phrase"),
    ),
    "ending": Kind(
        _choice("phrase", v.ENDINGS),
        lambda p: f"End with exactly this sentence, and nothing after it: {p['phrase']}",
        lambda p, text: text.endswith(p["phrase"]) and len(text) > len(p["phrase"]),
    ),
    "json": Kind(
        _keys,
        lambda p: f"Answer with nothing but one JSON object that has the keys {listed(p['keys'])}.",
        _json,
        least=6,
        prose=False,
    ),
    "repeat": Kind(
        lambda rng, level, request: {"text": request},
        lambda p: f'First repeat this sentence word for word, then answer: "{p["text"]}"',
        _begins("text"),
    ),
    "two_answers": Kind(
        nothing,
        lambda p: (
            "Give two different answers, with a line of six asterisks "
            f"({ANSWER_MARK}) between them and nowhere else."
        ),
        _two,
    ),
    "numbers": Kind(
        number("n", (1, 2), (2, 4), (4, 7)),
        lambda p: f"Use exactly {plural(p['n'], 'number')} written in digits.",
        lambda p, text: len(_NUMBER.findall(text)) == p["n"],
    ),
    "replies": Kind(
        _replies,
        lambda p: (
            f"Begin with exactly one of {listed(p['options'])}; do not use the others. "
            "Then give your reasons."
        ),
        _one_of,
    ),
    "table": Kind(
        _table,
        lambda p: (
            f"Include a Markdown table of {plural(p['columns'], 'column')} and "
            f"{plural(p['rows'], 'row')} below its header; every line begins and ends with |."
        ),
        _tabular,
    ),
    "language": Kind(
        _choice("language", ("ar", "de", "el", "es", "fr", "hi", "ja", "ko", "ru", "zh")),
        lambda p: f"Write in {LANGUAGES[p['language']]} only.",
        lambda p, text: is_language(text, p["language"]),
        prose=False,
    ),
}
