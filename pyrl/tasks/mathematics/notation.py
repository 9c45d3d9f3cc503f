r"""One spelling for answers that are written differently, and the rational numbers among them.

Everything here is bounded: `squeeze` is only asked for texts of at most `final.LONGEST` characters.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

_DROPPED = {
    "left", "right", "displaystyle", "textstyle", "limits", "big", "Big", "bigg", "Bigg",
    "bigl", "bigr", "Bigl", "Bigr", "rm", "bf", "it", "degree",
}  # fmt: skip
_SPACES = {"quad", "qquad", "enspace", "thinspace", ",", ";", ":", " ", "~"}
_RENAMED = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "le": r"\leq ", "ge": r"\geq ",
    "ne": r"\neq ", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]",
    "%": "%", "!": "", "$": "", "(": "", ")": "", "[": "", "]": "", "#": "#", "_": "_",
    "lt": "<", "gt": ">", "dots": r"\ldots ",
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+)\s*|\\(.)", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_CHARACTERS = {
    ord(c): to
    for characters, to in (
        ("−–—﹣－", "-"), ("×", r"\times "), ("⋅·∙•", r"\cdot "), ("÷⁄∕", "/"), ("π", r"\pi "),
        ("∞", r"\infty "), ("≤", r"\leq "), ("≥", r"\geq "), ("≠", r"\neq "), ("√", r"\sqrt "),
        ("±", r"\pm "),
        ("∪", r"\cup "), ("°€£`", ""), ("％", "%"), ("，", ","), ("．", "."), ("＝", "="),
        ("（", "("), ("）", ")"), ("\u200b\u2060\ufeff", ""),
    )
    for c in characters
}  # fmt: skip
_SUPERSCRIPTS = re.compile("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_PLAIN_SUPERSCRIPT = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_SPACE_BETWEEN_DIGITS = re.compile(r"(?<=\d) (?=\d)")
_SMALL_INDEX = re.compile(r"([\^_])\{(\w)\}")

_DECIMAL = r"(?:\d{1,3}(?:[, ]\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_FRACTION = (
    r"(?:\\frac ?(?:\{ ?(?P<top>-?{D}) ?\}|(?P<t>\d)) ?(?:\{ ?(?P<bottom>-?{D}) ?\}|(?P<b>\d))"
    r"|(?P<over>{D}) ?/ ?(?P<under>-?{D}))"
).replace("{D}", _DECIMAL)
_VALUE = re.compile(
    r"(?P<sign>[-+]?) ?(?:(?:(?P<whole>\d+)(?: (?=[\d.])| ?(?=\\frac)))?{F}|(?P<decimal>{D})"
    r"(?:(?: ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{ ?(?P<power>-?\d{1,3}) ?\}|(?P<p>-?\d{1,3}))"
    r"|[eE](?P<e>[-+]?\d{1,3})))?)(?P<rest>.*)".replace("{F}", _FRACTION).replace("{D}", _DECIMAL),
    re.DOTALL,
)
#: Brackets around a fraction's numbers: (-1)/3, 1/(-3).
_ABOVE = re.compile(r"^\( ?(-? ?\d+(?:\.\d+)?) ?\) ?/")
_BELOW = re.compile(r"/ ?\( ?(-? ?\d+(?:\.\d+)?) ?\)$")
_PERCENT = re.compile(r" ?(?:%|percent\b|per cent\b)")
_UNIT = re.compile(
    r" ?(?:[A-Za-z]{2,}|(?<= )[A-Za-z])(?:[ /.]+[A-Za-z]+)*(?: ?\^ ?\{?[23]\}?)?[ .]*"
)
#: Words after a number that change it, so that "5 squared" is not 5.
NO_UNITS = {
    "over", "squared", "cubed", "factorial", "sqrt", "root", "times", "plus", "minus", "divided",
    "pi", "to", "mod", "or", "and", "not", "by", "of", "half", "third", "quarter", "dozen", "score",
    "i", "e", "x", "y", "z", "n", "k", "less", "point", "negative", "double", "twice",
    "nor", "versus", "power", "raised", "exponent", "multiplied", "halves",
    "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "hundredth", "thousandth",
    "millionth", "thirds", "quarters", "fourths", "fifths", "sixths", "sevenths", "eighths",
    "ninths", "tenths", "twelfths", "hundredths", "thousandths", "millionths", "dozens",
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
}  # fmt: skip
MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


class Number(NamedTuple):
    """A rational number and how it was written: with a percent sign (`value` is what stands before
    it), as a fraction."""

    value: Fraction
    percent: bool = False
    fraction: bool = False


def squeeze(text: str) -> str:
    r"""The text without what does not change its meaning: `$`, `\left`, `\text{…}` around words,
    spacing commands, Markdown's emphasis, a dot at the end. Of Unicode, any script's decimal digits
    are digits (`４２`, `४२`), superscripts are powers, and the usual signs are LaTeX's.
    """
    text = "".join(_ascii(c) if ord(c) > 127 else c for c in text)
    text = _SUPERSCRIPTS.sub(lambda m: "^{" + m[0].translate(_PLAIN_SUPERSCRIPT) + "}", text)
    text = text.translate(_CHARACTERS)
    for _ in range(3):  # \text{\textbf{…}}
        text = _TEXT.sub(r" \1 ", text)
    text = _COMMAND.sub(_command, text).replace("$", "")
    text = re.sub(r"\^ ?(?:\{ ?\\circ ?\}|\\circ ?)", "", text)
    text = text.replace("{,}", ",").replace("**", "^" if _is_power(text) else " ")
    text = " ".join(text.split()).strip(" .,;:'\"").lstrip("= ")
    if re.fullmatch(r"[-+]?(?:oo|inf|infinity|\\infty)", text, re.IGNORECASE):
        text = ("-" if text[0] == "-" else "") + r"\infty"
    return text


def spaceless(squeezed: str) -> str:
    """Without spaces, except between digits ("1 2" is not 12), and x^{2} as x^2."""
    kept = _SPACE_BETWEEN_DIGITS.sub("\0", squeezed)
    return _SMALL_INDEX.sub(r"\1\2", kept.replace(" ", "").replace("\0", " "))


def number(squeezed: str) -> Number | None:
    r"""The rational number that a squeezed text writes out, None where it is none.

    Integers and decimals with thousands separators (1,234 or 1 234), a/b, \frac{a}{b}, \frac12,
    mixed numbers (2 1/2, 2\frac{1}{2}), (-1)/3, -(1/3), scientific notation (1.5e3,
    1.5 \times 10^{3}), each with a sign, a percent sign or a unit, which is ignored
    ("5 cm", "5 million" is a million times 5).
    Sums, powers, roots and factorials are no numbers that are written out.
    """
    while len(squeezed) > 1 and (squeezed[0] + squeezed[-1]) in ("()", "{}"):
        squeezed = squeezed[1:-1].strip()
    bracketed = re.fullmatch(r"- ?\(([^()]*)\)", squeezed)
    if bracketed:
        inside = number(bracketed[1].strip())
        positive = inside is not None and inside.fraction and inside.value > 0
        return inside._replace(value=-inside.value) if inside and positive else None
    found = leading(_BELOW.sub(r"/\1", _ABOVE.sub(r"\1/", squeezed)))
    if found is None:
        return None
    value, rest, fraction = found
    percent = _PERCENT.match(rest)
    if percent:
        return None if rest[percent.end() :].strip() else Number(value, True, fraction)
    if rest:
        words = re.findall(r"[A-Za-z]+", rest.lower())
        if not _UNIT.fullmatch(rest) or NO_UNITS.intersection(words):
            return None
        for word in words:
            value *= 10 ** MULTIPLES.get(word, 0)
    return Number(value, False, fraction)


def leading(squeezed: str) -> tuple[Fraction, str, bool] | None:
    """The number that a text begins with, what follows it, and whether it is a fraction."""
    match = _VALUE.fullmatch(squeezed)
    if match is None:
        return None
    top = match["top"] or match["t"] or match["over"]
    if top is not None:
        bottom = _fraction(match["bottom"] or match["b"] or match["under"])
        if bottom == 0:
            return None
        value = _fraction(top) / bottom
        if match["whole"]:
            if value < 0:
                return None
            value += int(match["whole"])
    else:
        power = int(match["power"] or match["p"] or match["e"] or 0)
        value = _fraction(match["decimal"]) * Fraction(10) ** power
    return -value if match["sign"] == "-" else value, match["rest"], top is not None


def same_number(a: Number, b: Number, whole: bool = True) -> bool:
    """Equal values. Where one of them only has a percent sign, as the asked-for percentage (50 for
    50%) or as its value (1/2 for 50%; with `whole` also an integer, 7 for 700%)."""
    if a.percent == b.percent:
        return a.value == b.value
    if not whole and (b if a.percent else a).value.denominator == 1:
        return a.value == b.value
    percent, plain = (a, b) if a.percent else (b, a)
    return plain.value in (percent.value, percent.value / 100)


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))


def _ascii(character: str) -> str:
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    if unicodedata.category(character) == "Zs":
        return " "
    form = unicodedata.normalize("NFKC", character)
    if "⁄" in form and len(form) > 1:  # ½ is 1⁄2
        return " " + form.replace("⁄", "/")
    return character


def _command(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name in _DROPPED:
        return ""
    if name in _SPACES:
        return " "
    if name in _RENAMED:
        return _RENAMED[name]
    after = match.string[match.end() : match.end() + 1]
    return "\\" + name + (" " if match[1] and after.isalpha() else "")


def _is_power(text: str) -> bool:
    """Whether ** is Python's power and not Markdown's emphasis."""
    return re.search(r"[\w)}]\*\*[\w({-]", text) is not None
