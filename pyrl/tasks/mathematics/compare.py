"""Whether an answer is the reference: numbers exactly, lists part by part, the rest as asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from pyrl.tasks.mathematics.final import LONGEST
from pyrl.tasks.mathematics.notation import Number, number, same_number, spaceless, squeeze

#: "x =", "f(x) =", "\theta =", "x \in" before a value.
#: "(x, y) =" before a list.
_NAMES = re.compile(r"\( ?([A-Za-z](?: ?, ?[A-Za-z])+) ?\) ?=(?!=)")
_BOTH_SIGNS = re.compile(r"(?:\\pm|\+/?-) ?(.+)")
_NAME = re.compile(r"(\\?[A-Za-z]+(?:_ ?\{?\w+\}?)?(?: ?\( ?[a-z] ?\))?) ?(?:=|\\in )(?!=)")
_EQUALS = re.compile(r"(?<![<>!=\\])=(?!=)")
_LETTER = re.compile(r"[A-Za-z]")
_WORD = re.compile(r"[A-Za-z][A-Za-z' -]+")
_OPEN, _CLOSE = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
_TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|\band\b|\bor\b|.", re.DOTALL)

#: Lists in lists in lists.
DEPTH = 3
#: Decides the pairs that are neither numbers, nor lists, nor words: (reference, answer), squeezed.
Decide = Callable[[str, str], bool]


class Rules(NamedTuple):
    """How `same` was asked to compare."""

    decide: Decide | None
    evaluated: bool
    percent: bool


class Parts(NamedTuple):
    """The parts of a list with its brackets, "" where it has none; `by` is what separates them."""

    opening: str
    closing: str
    by: str
    items: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        """Whether the order of the parts matters: not in sets, unions and bare enumerations."""
        return self.by == ":" or self.opening in ("(", "[")


def same(
    reference: str,
    answer: str,
    decide: Decide | None = None,
    evaluated: bool = True,
    percent: bool = True,
) -> bool:
    r"""Whether both say the same.

    Equal spelling (`notation.squeeze`), or equal rational numbers, exactly; "x = 5" is 5, but not
    "y = 5" where the reference names x. Lists are compared part by part: (1, 2), [1, 2) and 2:3 in
    order and with their brackets, \{1, 2\}, "1, 2", "1 and 2" and unions in any order; a bare list
    may stand for an (ordered) tuple. So may names: "y = 6, x = 2" and "(x, y) = (2, 6)" are (2, 6),
    in the names' alphabetical order. \pm 4 is the list "-4, 4". Words are compared without case.

    What remains, such as roots, variables and matrices, is left to `decide`, without which it is
    different. evaluated: a reference that is a number takes only numbers that are written out:
    none of "2+3", "10/2" and "\sqrt{25}" says 5, or else repeating the question would be an answer.
    percent: an integer may be said as a percentage of that value, 7 as 700%.
    """
    if max(len(reference), len(answer)) > LONGEST:
        return bool(answer) and reference.strip() == answer.strip()
    return _same(squeeze(reference), squeeze(answer), Rules(decide, evaluated, percent), DEPTH)


def canonical(answer: str, expand: Callable[[str], str | None] | None = None) -> str:
    """One string for answers that `same` holds equal: numbers as "-5/2", sets sorted, no names;
    a percent sign is dropped. Of other expressions what `expand` makes of them, else their
    spelling without spaces; words in lower case.
    """
    return answer.strip() if len(answer) > LONGEST else _canonical(squeeze(answer), DEPTH, expand)


def _same(reference: str, answer: str, rules: Rules, depth: int) -> bool:
    if not answer:
        return False
    if _bare(reference) == _bare(answer):
        return True
    reference, answer = _spread(reference), _spread(answer)
    if _bare(reference) == _bare(answer):
        return True
    name, value = _named(reference)
    own, given_value = _named(answer)
    if name and own and name != own:
        return False
    wanted = number(value)
    if wanted is not None:
        given = number(given_value) or _last_value(answer)
        if given is not None:
            left = rules.evaluated and given.fraction and not wanted.fraction
            equal = same_number(wanted, given, rules.percent)
            return equal and not (left and wanted.value.denominator == 1)
        if rules.evaluated:
            return False
    if _WORD.fullmatch(reference) and not _is_product(reference):
        return reference.casefold() == answer.casefold()
    listed = parts(value) if depth else None
    if listed is not None:
        others = parts(given_value)
        if others is not None:
            return _same_parts(listed, others, rules, depth - 1)
        if not listed.opening:
            return False
    decide = rules.decide
    if decide is None:
        return False
    if bool(name) != bool(own) and not _EQUALS.search(value + given_value):
        return decide(value, given_value)  # only one of them names it
    return decide(reference, answer)


def _same_parts(reference: Parts, answer: Parts, rules: Rules, depth: int) -> bool:
    if reference.opening == "(" and not answer.opening:
        answer = _by_name(answer)
    brackets = [(p.opening, p.closing) for p in (reference, answer)]
    bare = ("", "")
    if brackets[0] != brackets[1] and not (
        bare in brackets and set(brackets) <= {bare, ("(", ")"), (r"\{", r"\}")}
    ):
        return False
    if reference.by != answer.by or len(reference.items) != len(answer.items):
        return False

    def agree(a: str, b: str) -> bool:
        return _same(a, b, rules, depth)

    if reference.ordered or answer.ordered:
        return all(map(agree, reference.items, answer.items))
    left = list(answer.items)
    for item in reference.items:
        match = next((i for i, other in enumerate(left) if agree(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def parts(squeezed: str) -> Parts | None:
    r"""The list that a squeezed text is, None where it is none: separated by `\cup`, else by
    commas, semicolons, "and" or "or", else by colons, outside of all brackets but its own.
    """
    for by in (r"\cup", ",", ":"):
        bare = _split(squeezed, by)
        if len(bare) > 1:
            return Parts("", "", by, tuple(bare)) if all(bare) else None
    inside = _bracketed(squeezed, ",")
    if inside is not None and all(inside.items):
        return inside
    return None


def _bracketed(squeezed: str, by: str) -> Parts | None:
    opening = next((o for o in reversed(_OPEN) if squeezed.startswith(o)), None)
    closing = next((c for c in reversed(_CLOSE) if squeezed.endswith(c)), None)
    if opening is None or closing is None or (opening == "{") != (closing == "}"):
        return None
    items = _split(squeezed[len(opening) : -len(closing)], by)
    least = 1 if opening == r"\{" else 2
    return Parts(opening, closing, by, tuple(items)) if len(items) >= least else None


def _split(text: str, by: str) -> list[str]:
    """Pieces between separators that are in no brackets; all of it if the brackets do not match."""
    separators = (",", ";", "and", "or") if by == "," else (by,)
    pieces, piece, depth = [], "", 0
    for token in _TOKEN.findall(text):
        if token in _OPEN:
            depth += 1
        elif token in _CLOSE:
            depth -= 1
            if depth < 0:
                return [text]
        if token in separators and depth == 0:
            pieces.append(piece.strip())
            piece = ""
        else:
            piece += token
    if depth:
        return [text]
    last = piece.strip()
    joined = by == "," and len(pieces) > 1  # "1, 2, and 3" has an empty piece before "and"
    return [p for p in pieces if p or not joined] + [last]


def _named(squeezed: str) -> tuple[str, str]:
    match = _NAME.match(squeezed)
    if match is None or _EQUALS.search(squeezed, match.end()):
        return "", squeezed
    value = squeezed[match.end() :].strip()
    return (spaceless(match[1]), value) if value and "," not in value[:1] else ("", squeezed)


def _last_value(squeezed: str) -> Number | None:
    """5 of "2 + 3 = 5"; a list has none, and neither has "8 = 5"."""
    ends = _EQUALS.split(squeezed)
    if len(ends) < 2 or parts(squeezed) is not None:
        return None
    values = [found for end in ends if (found := number(end.strip())) is not None]
    last = number(ends[-1].strip())
    return last if last and all(same_number(last, value) for value in values) else None


def _spread(squeezed: str) -> str:
    r"""(x, y) = (2, 6) as x=2, y=6, and \pm 4 as -4, 4; any other text as it is."""
    names = _NAMES.match(squeezed)
    listed = parts(squeezed[names.end() :].strip()) if names else None
    if names and listed and listed.opening == "(":
        letters = [letter.strip() for letter in names[1].split(",")]
        if len(letters) == len(listed.items) == len(set(letters)):
            return ", ".join(f"{n}={v}" for n, v in zip(letters, listed.items, strict=True))
    name, value = _named(squeezed)
    signs = _BOTH_SIGNS.fullmatch(value)
    if signs and (found := number(signs[1])) is not None and found.value > 0:
        return f"-{signs[1]}, {signs[1]}" if not name else f"{name}=-{signs[1]}, {name}={signs[1]}"
    return squeezed


def _by_name(listed: Parts) -> Parts:
    """y=6, x=2 as the bare list 2, 6; a list that does not name each part by a letter of its own
    as it is."""
    named = [_named(item) for item in listed.items]
    names = [name for name, _ in named]
    if listed.by != "," or not all(map(_LETTER.fullmatch, names)) or len({*names}) < len(names):
        return listed
    return listed._replace(items=tuple(value for _, value in sorted(named)))


def _bare(squeezed: str) -> str:
    """Without spaces and without brackets around a single thing: (C) is C."""
    text = spaceless(squeezed)
    return text[1:-1] if re.fullmatch(r"\([^()\[\],;]+\)", text) else text


def _is_product(word: str) -> bool:
    """Whether letters are more likely variables side by side than a word: ab, xyz."""
    return len(word) <= 3 and word.casefold() not in ("yes", "no", "odd", "one", "two", "six")


def _canonical(squeezed: str, depth: int, expand: Callable[[str], str | None] | None) -> str:
    squeezed = _spread(squeezed)
    name, value = _named(squeezed)
    if name and depth < DEPTH:  # in a list the names say which is which
        return f"{name}={_canonical(value, 0, expand)}"
    found = number(value) or _last_value(value)
    if found is not None:
        return str(found.value)
    if _WORD.fullmatch(value) and not _is_product(value):
        return value.casefold()
    inside = parts(value) if depth else None
    if inside is None:
        return (expand(value) if expand else None) or _bare(value)
    named = inside if inside.opening or depth < DEPTH else _by_name(inside)
    if named is not inside:
        inside = named._replace(opening="(", closing=")")
    items = [_canonical(item, depth - 1, expand) for item in inside.items]
    if not inside.ordered:
        items.sort()
    by = inside.by if inside.by != r"\cup" else r" \cup "
    braces = (r"\{", r"\}") if inside.by == "," and not inside.ordered else inside[:2]
    return braces[0] + by.join(items) + braces[1]
