"""Rows in the form of Google's IFEval data (arXiv 2311.07911): `prompt`, `instruction_id_list`,
and `kwargs`, one mapping an instruction, its unused keys None."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyrl.tasks.ifeval.language import LANGUAGES

Arguments = Mapping[str, Any]

_REPLIES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


class Unsupported(ValueError):
    """An instruction that there is no check for here."""


def _counted(kind: str, key: str, relation: str = "at least") -> Callable[[Arguments], Any]:
    return lambda a: {"kind": kind, "n": int(a[key]), "relation": relation}


def _plain(kind: str, **parameters: Any) -> Callable[[Arguments], Any]:
    return lambda a: {"kind": kind, **parameters}


def _compared(low: str, high: str, key: str, relation: str) -> Callable[[Arguments], Any]:
    """`high` with one less for "less than", else `low`."""

    def read(a: Arguments) -> dict[str, Any]:
        if a[relation] == "less than":
            return {"kind": high, "n": int(a[key]) - 1}
        return {"kind": low, "n": int(a[key])}

    return read


def _related(kind: str, key: str, relation: str, **names: str) -> Callable[[Arguments], Any]:
    """One kind with a relation; names: our parameter → theirs."""

    def read(a: Arguments) -> dict[str, Any]:
        fewer = a[relation] == "less than"
        named = {ours: a[theirs] for ours, theirs in names.items()}
        count = int(a[key]) - fewer
        return {"kind": kind, "n": count, "relation": "at most" if fewer else "at least", **named}

    return read


def _letters(a: Arguments) -> dict[str, Any]:
    fewer = a["let_relation"] == "less than"
    kind = "letter_max" if fewer else "letter_min"
    return {"kind": kind, "letter": a["letter"], "n": int(a["let_frequency"]) - fewer}


def _language(a: Arguments) -> dict[str, Any]:
    if a["language"] not in LANGUAGES:
        raise Unsupported(f"language {a['language']!r}")
    return {"kind": "language", "language": a["language"]}


_IDS: dict[str, Callable[[Arguments], dict[str, Any]]] = {
    "change_case:capital_word_frequency": _related(
        "capitals", "capital_frequency", "capital_relation"
    ),
    "change_case:english_capital": _plain("uppercase"),
    "change_case:english_lowercase": _plain("lowercase"),
    "combination:repeat_prompt": lambda a: {"kind": "repeat", "text": a["prompt_to_repeat"]},
    "combination:two_responses": _plain("two_answers"),
    "detectable_content:number_placeholders": _counted("placeholders", "num_placeholders"),
    "detectable_content:postscript": lambda a: {
        "kind": "postscript",
        "mark": a["postscript_marker"],
    },
    "detectable_format:constrained_response": _plain("replies", options=list(_REPLIES)),
    "detectable_format:json_format": _plain("json"),
    "detectable_format:multiple_sections": lambda a: {
        "kind": "sections",
        "n": int(a["num_sections"]),
        "name": a["section_spliter"],  # as the data spells it
        "relation": "at least",
    },
    "detectable_format:number_bullet_lists": _counted("bullets", "num_bullets", "exactly"),
    "detectable_format:number_highlighted_sections": _counted("highlights", "num_highlights"),
    "detectable_format:title": _plain("title"),
    "keywords:existence": lambda a: {"kind": "include", "words": list(a["keywords"])},
    "keywords:forbidden_words": lambda a: {"kind": "avoid", "words": list(a["forbidden_words"])},
    "keywords:frequency": _related("frequency", "frequency", "relation", word="keyword"),
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:nth_paragraph_first_word": lambda a: {
        "kind": "paragraph_opening",
        "n": int(a["num_paragraphs"]),
        "which": int(a["nth_paragraph"]),
        "word": a["first_word"],
    },
    "length_constraints:number_paragraphs": _counted("paragraphs", "num_paragraphs", "exactly"),
    "length_constraints:number_sentences": _compared(
        "sentences_min", "sentences_max", "num_sentences", "relation"
    ),
    "length_constraints:number_words": _compared("words_min", "words_max", "num_words", "relation"),
    "punctuation:no_comma": _plain("no_commas"),
    "startend:end_checker": lambda a: {"kind": "ending", "phrase": a["end_phrase"].strip()},
    "startend:quotation": _plain("quoted"),
}


def read_row(row: Mapping[str, Any], where: str) -> tuple[str, list[dict[str, Any]]]:
    """The prompt and the instructions of a row, as our kinds with their parameters.

    Raises ValueError naming `where` and what is missing, and `Unsupported` for an instruction or a
    language that there is no check for.
    """
    for key in ("prompt", "instruction_id_list", "kwargs"):
        if key not in row:
            raise ValueError(f"{where}: no field {key!r}; it has {', '.join(map(str, row))}")
    ids, arguments = row["instruction_id_list"], row["kwargs"]
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise ValueError(f"{where}: prompt={row['prompt']!r}: expected a text")
    if not len(ids) == len(arguments) > 0:
        raise ValueError(f"{where}: {len(ids)} instructions with {len(arguments)} kwargs")
    instructions = []
    for name, given in zip(ids, arguments, strict=True):
        if name not in _IDS:
            raise Unsupported(f"{where}: instruction {name!r}")
        try:
            instructions.append(_IDS[name](given))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: kwargs {given!r} of {name!r}: {error}") from None
    return row["prompt"], instructions
