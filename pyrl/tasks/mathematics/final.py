"""The final answer of a completion, by rules that a prompt can state. All of them linear."""

from __future__ import annotations

import re

from pyrl.tasks.extract import after_thinking, last_boxed

#: Longest answer that is looked into; a longer one is only ever compared as it is.
LONGEST = 400
_MARKS = re.compile(
    r"####|\b(?:final[ \t]+)?answer[ \t]*(?:\*\*[ \t]*)?(?:is\b|:|=)[ \t]*(?:\*\*)?[ \t]*:?",
    re.IGNORECASE,
)
#: Where a sentence ends: a dot is no end inside 3.14.
_END = re.compile(r"[.!?;][*_`\"')]*(?=\s)|[\r\n]")
_MATH = re.compile(r"\$([^$\n]+)\$|\\\(([^\n]*?)\\\)")
_NUMBER = re.compile(r"[-+−]?(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?(?:[ \t]*/[ \t]*\d+)?%?|[-+−]?\.\d+%?")
#: Words, as opposed to LaTeX commands and single letters.
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def final_answer(text: str, strict: bool = False, units: bool = False) -> str | None:
    r"""What the completion gives as its answer, None where it gives none.

    After the last `</think>` (all of the text without one): the last `\boxed{…}`; a box inside
    that box counts as its content. Without any box, and unless `strict`:
    1. what follows the last "answer is", "answer:", "answer =" or "####", to the end of its
       sentence or line (of its last `$…$` there, where there are some);
    2. else of the last line that is not blank: the whole line if it has no words but "and"
       and "or", else its last `$…$` or `\(…\)`, else its last number (with `units`: and what
       follows it), else the line.
    """
    text = after_thinking(text)
    boxed = last_boxed(text)
    if boxed is not None:
        for _ in range(8):
            inner = last_boxed(boxed) if len(boxed) <= LONGEST else None
            if inner is None:
                break
            boxed = inner
        return boxed or None
    if strict:
        return None
    mark = None
    for mark in _MARKS.finditer(text):  # noqa: B007  the last one is wanted
        pass
    if mark is not None:
        rest = text[mark.end() :].lstrip()
        end = _END.search(rest)
        stated = _plain(rest[: end.start()] if end else rest)
        if stated:
            return _last_math(stated) or stated
    line = _plain(text.rstrip().rpartition("\n")[2])
    if not line or len(line) > LONGEST or {*_WORDS.findall(line)} <= {"and", "or"}:
        return line or None
    number = None
    for number in _NUMBER.finditer(line):  # noqa: B007
        pass
    if number is None:
        return _last_math(line) or line
    return _last_math(line) or (line[number.start() :] if units else number[0].lstrip("+"))


def _plain(text: str) -> str:
    """Without Markdown's emphasis and a dot at the end."""
    return text.strip(" \t\r*`_").rstrip(".").strip(" \t\r*`_")


def _last_math(text: str) -> str | None:
    if len(text) > LONGEST:
        return None
    found = _MATH.findall(text)
    return (found[-1][0] or found[-1][1]).strip() if found else None
