"""All kinds of instruction, and which of them cannot be kept together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from pyrl.tasks.ifeval.contents import CONTENTS
from pyrl.tasks.ifeval.format import FORMAT
from pyrl.tasks.ifeval.kind import Kind

#: A new kind is one entry of CONTENTS or FORMAT, and its clashes here.
KINDS: dict[str, Kind] = {**CONTENTS, **FORMAT}

_LENGTH = ("words_min", "words_max", "words_range", "sentences_min", "sentences_max", "lines")
_SHAPE = (
    "paragraphs",
    "paragraph_opening",
    "bullets",
    "numbered",
    "sections",
    "lines",
    "table",
    "two_answers",
    "json",
)
_CASE = ("lowercase", "uppercase", "capitals")
_BEGINNING = ("opening", "repeat", "replies", "quoted", "language")
_END = ("ending", "postscript", "quoted", "json", "table", "two_answers", "language")

#: No two of one group are ever in one prompt: they contradict each other, or leave it unclear what
#: is counted.
_GROUPS = (_LENGTH, _SHAPE, _CASE, _BEGINNING, _END, ("numbers", "numbered", "sections"))

#: kind → kinds that are never with it.
_PAIRS: dict[str, Iterable[str]] = {
    # One object and nothing else: only what its values may hold goes with it.
    "json": set(KINDS) - {"include", "frequency", "avoid"},
    # What counts in another language's words, letters, cases and marks is not clear.
    "language": set(KINDS) - {"paragraphs", "bullets", "numbered", "title", "highlights"},
    # Is the repeated sentence counted?
    "repeat": {*_LENGTH, *_SHAPE, *_CASE, "letter_max", "no_commas", "title", "questions"},
    # Sentences in a given case.
    "lowercase": {"opening", "ending", "postscript", "replies", "sections"},
    "uppercase": {"opening", "ending", "replies"},
    "capitals": {"sections"},
    # A long text or a given word may need the letter.
    "letter_max": {
        *("words_min", "words_range", "sentences_min", "include", "frequency", "letter_min"),
        *("opening", "ending", "replies", "postscript", *_SHAPE),
    },
    "sentences_min": _SHAPE,
    "sentences_max": {
        *_SHAPE,
        *("questions", "replies", "postscript", "title", "opening", "ending", "letter_min"),
    },
    "words_max": {"table", "letter_min"},
    "words_range": {"table", "letter_min"},
    "title": {"opening", "replies"},
    "lines": {"postscript", "opening", "ending", "title", "replies"},
    "paragraph_opening": {"opening", "replies", "title", "postscript"},
    "two_answers": {"opening", "replies"},
    "table": {"quoted"},
    "questions": {"ending"},
}


def _clashes() -> frozenset[frozenset[str]]:
    pairs = [p for group in _GROUPS for p in itertools.combinations(group, 2)]
    pairs += [(kind, other) for kind, others in _PAIRS.items() for other in others]
    return frozenset(frozenset(pair) for pair in pairs if pair[0] != pair[1])


#: Pairs of kinds that never share a prompt.
CLASHES = _clashes()


def compatible(kinds: Iterable[str]) -> bool:
    """Whether no two of the kinds clash."""
    return not any(frozenset(pair) in CLASHES for pair in itertools.combinations(kinds, 2))
