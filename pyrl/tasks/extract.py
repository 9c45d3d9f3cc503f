"""What of a completion is judged: the part after the thoughts, a tag's, a box's, a code block's.

Every function is linear in the text's length, whatever the text holds, and takes the last match: a
model may change its mind.
"""

from __future__ import annotations

import re

_THOUGHTS_END = "</think>"
#: A box's beginning, another escaped character, a brace.
_BRACES = re.compile(r"(\\boxed\{|\\fbox\{)|\\.|[{}]", re.DOTALL)
#: A fence of its own line, at most three spaces in, as in CommonMark.
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; all of it where there is none."""
    return text.rpartition(_THOUGHTS_END)[2]


def last_tag(text: str, tag: str) -> str | None:
    """The inside of the last `<tag>…</tag>`, None where there is none."""
    end = text.rfind(f"</{tag}>")
    begin = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if end < 0 or begin < 0 else text[begin + len(tag) + 2 : end].strip()


def last_boxed(text: str) -> str | None:
    r"""The inside of the last `\boxed{…}` or `\fbox{…}` whose braces are balanced (escaped ones,
    `\{` and `\}`, do not count), None where there is none. A box inside that box is kept as it is.
    """
    found: str | None = None
    opened: list[int | None] = []  # per open brace: where its box's inside begins, None = no box
    boxes = 0
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{":
            opened.append(None)
        elif token != "}":
            if match[1]:
                opened.append(match.end())
                boxes += 1
        elif opened:
            begin = opened.pop()
            if begin is not None:
                boxes -= 1
                if boxes == 0 or found is None:
                    found = text[begin : match.start()]
    return None if found is None else found.strip()


def last_code_block(text: str, languages: tuple[str, ...] = ()) -> str | None:
    """The last fenced block that is closed, None where there is none.

    languages: with any, the last of a block so labelled (in any case), else the last unlabelled.
    """
    labelled = unlabelled = None
    fence = label = ""
    begin = 0
    for match in _FENCE.finditer(text):
        if not fence:
            fence, label, begin = match[1], match[2].lower(), match.end() + 1
        elif match[1].startswith(fence) and not match[2]:
            block = text[begin : max(match.start(), begin)]
            if not label:
                unlabelled = block
            elif not languages or label in languages:
                labelled = block
                if not languages:
                    unlabelled = block
            fence = ""
    if not languages:
        return unlabelled
    return labelled if labelled is not None else unlabelled
