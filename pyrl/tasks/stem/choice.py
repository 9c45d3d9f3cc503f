"""Which option of a multiple-choice question a completion chooses."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from pyrl.tasks.extract import after_thinking, last_boxed
from pyrl.tasks.mathematics.final import LONGEST, final_answer
from pyrl.tasks.mathematics.notation import spaceless, squeeze
from pyrl.tasks.stem.quantity import read, same_quantity

LETTERS = "ABCDEFGHIJ"
_END = r"(?=[)\].:,;!?]|$| (?:and|or|because|since|as)\b| [(\[]?[A-J][)\]]?$|[ ]?[/&+])"
#: C, (C), C. and C) …, [C], "option C"; not the first word of a sentence.
_FIRST = re.compile(rf"(?:[Tt]he )?(?:(?:[Oo]ption|[Cc]hoice|[Ll]etter) )?[(\[]?([A-J]){_END}")
#: Right after it: another one.
_SECOND = re.compile(rf"[)\].:;]*\s*(?:,|/|&|\+|and\b|or\b)*\s*[(\[]?([A-J]){_END}")
#: In a box also in small letters.
_NAMED = re.compile(r"(?:the )?(?:(?:option|choice|letter) )?[(\[]?([A-J])[)\].]*", re.IGNORECASE)
_BRACKETED = re.compile(r"\(([A-J])\)")


def chosen(completion: str, options: Sequence[str], strict: bool = False) -> int | None:
    r"""The index of the option that the completion chooses, None where it chooses none or several.

    The last `\boxed{…}` after the thoughts decides; without one, unless `strict`, what follows the
    last "answer is", "answer:" or "####", else the last line, else the last "(C)". There it is a
    letter (C, (C), C., "C) water", in a box also c and "option c") or an option's text, in full, or
    its number without the unit or in another one ("5" for "5 m/s"), where only one option has it.
    Several different letters choose none.
    """
    text = after_thinking(completion)
    boxed = last_boxed(text)
    if boxed is not None:
        found = _choice(boxed, options, True)
        return None if found == -1 else found
    if strict:
        return None
    stated = final_answer(text, units=True)
    candidates = [stated or "", text.rstrip().rpartition("\n")[2]]
    for candidate in candidates:
        found = _choice(candidate, options, False)
        if found is not None:
            return found if found >= 0 else None
    letters = _BRACKETED.findall(text)
    return _index(letters[-1], options) if letters else None


def _choice(text: str, options: Sequence[str], boxed: bool) -> int | None:
    """The option that a text names, None for none of them, -1 for several."""
    if not text or len(text) > LONGEST:
        return None
    clean = _clean(text)
    plain = [_plain(option) for option in options]
    if _plain(clean) in plain:
        return plain.index(_plain(clean))
    named = _NAMED.fullmatch(clean) if boxed else None
    if named:
        clean = named[1].upper()
    quantity = _quantity(clean, options)
    if quantity is not None:
        return quantity
    first = _FIRST.match(clean)
    index = None if first is None else _index(first[1], options)
    if first is None or index is None:
        return None
    second = _SECOND.match(clean, first.end(1))
    if second and second[1] != first[1] and _index(second[1], options) is not None:
        return -1
    text_of = _plain(clean[first.end(1) :].lstrip(" )].:,;"))
    return -1 if text_of in plain and text_of != plain[index] else index


def _quantity(text: str, options: Sequence[str]) -> int | None:
    """The only option that is the same quantity as a text that is a number, with or without a known
    unit; fractions are left out, for they may repeat the question."""
    given = read(text)
    if given is None or given.fraction or (given.rest and not given.unit):
        return None
    found = []
    for i, option in enumerate(options):
        own = read(option)
        if own is None or own.fraction or (given.rest and not own.unit):
            continue
        if same_quantity(str(own.number), own.rest, text, 0.0):
            found.append(i)
    return found[0] if len(found) == 1 else None


def _index(letter: str, options: Sequence[str]) -> int | None:
    index = LETTERS.find(letter)
    return index if 0 <= index < len(options) else None


def _clean(text: str) -> str:
    """Full-width letters as usual ones, without LaTeX's text commands and Markdown's emphasis."""
    clean = squeeze(unicodedata.normalize("NFKC", text)).strip("*_ ")
    while len(clean) > 2 and clean[0] + clean[-1] == "{}":
        clean = clean[1:-1].strip()
    return clean


def _plain(option: str) -> str:
    """An option's text for comparing: without case, spaces and a final dot."""
    text = unicodedata.normalize("NFKC", option[:LONGEST])
    return spaceless(squeeze(text)).casefold()
