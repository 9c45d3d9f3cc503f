"""Numbers with units, compared within a relative tolerance."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from pyrl.tasks.mathematics.final import LONGEST
from pyrl.tasks.mathematics.notation import MULTIPLES, NO_UNITS, leading, squeeze

#: Base units are m, kg, s, A, K, mol, and what cannot be converted: celsius, bit, a percentage.
Dimensions = tuple[tuple[str, int], ...]


class Unit(NamedTuple):
    """`factor` base units of these dimensions (base unit, exponent), sorted."""

    factor: Fraction
    dimensions: Dimensions


def _table() -> dict[str, Unit]:
    table: dict[str, Unit] = {}

    def add(names: str, factor: str, dimensions: str, prefixes: str = "") -> None:
        sizes = {
            "": 0,
            "k": 3,
            "M": 6,
            "G": 9,
            "T": 12,
            "c": -2,
            "d": -1,
            "m": -3,
            "u": -6,
            "n": -9,
        }
        long = {"k": "kilo", "M": "mega", "G": "giga", "T": "tera", "c": "centi", "d": "deci",
                "m": "milli", "u": "micro", "n": "nano"}  # fmt: skip
        of = tuple(sorted((d.rstrip("-0123456789"), int(re.sub(r"^[A-Za-z]+", "", d) or 1))
                          for d in dimensions.split()))  # fmt: skip
        for name in names.split():
            for prefix in ["", *prefixes]:
                unit = Unit(Fraction(factor) * Fraction(10) ** sizes[prefix], of)
                spelled = long.get(prefix, "") + name
                if len(name) >= 3:
                    table[spelled] = table[spelled + "s"] = unit
                if len(name) <= 3:
                    table[prefix + name] = unit
                if len(name) == 3:
                    table[prefix + name + "s"] = unit

    add("m meter metre", "1", "m", "kcdmun")
    add("g gram", "1/1000", "kg", "kmu")
    add("t tonne", "1000", "kg")
    add("s second sec", "1", "s", "mun")
    add("min minute", "60", "s")
    add("h hour hr hrs", "3600", "s")
    add("day", "86400", "s")
    add("year yr yrs a", "31557600", "s")
    add("A ampere amp", "1", "A", "mu")
    add("K kelvin", "1", "K")
    add("degC celsius", "1", "celsius")
    add("degF F fahrenheit", "1", "fahrenheit")
    add("mol mole", "1", "mol", "m")
    add("N newton", "1", "kg m s-2", "kM")
    add("J joule", "1", "kg m2 s-2", "kM")
    add("W watt", "1", "kg m2 s-3", "kMG")
    add("V volt", "1", "kg m2 s-3 A-1", "km")
    add("ohm Ohm Ω", "1", "kg m2 s-3 A-2", "kM")
    add("C coulomb", "1", "A s", "mu")
    add("Pa pascal", "1", "kg m-1 s-2", "kM")
    add("Hz hertz", "1", "s-1", "kMG")
    add("L l liter litre", "1/1000", "m3", "m")
    add("M", "1000", "mol m-3", "m")
    add("b bit", "1", "bit", "kMGT")
    add("B byte", "8", "bit", "kMGT")
    add("KB", "8000", "bit")
    add("Wh", "3600", "kg m2 s-2", "kM")
    add("kmh kph", "5/18", "m s-1")
    add("mile mi", "1609.344", "m")
    add("foot feet ft", "0.3048", "m")
    add("inch inches", "0.0254", "m")
    add("pound lb lbs", "0.45359237", "kg")
    add("percent %", "1", "percent")
    return table


UNITS = _table()
_PART = re.compile(
    r" ?(?P<by>[/*]|\\cdot|per\b)? ?(?:(?P<before>square|cubic) )?(?P<name>[A-Za-zΩμµ%]+)"
    r"(?: ?\^ ?(?P<power>-?\d)(?!\d)|(?P<digit>-?\d)(?!\d)| (?P<after>squared|cubed)\b)?"
)
_CELSIUS = re.compile(
    r"(?:\^ ?\{? ?\\circ ?\}?|°|\bdegrees?) ?(?:\\(?:text|mathrm) ?\{ ?)?(?:C(?:elsius)?\b)\}?"
)
_POWER = re.compile(r"\^ ?\{ ?(-?\d+) ?\}")
_RATIO = re.compile(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
_BEFORE = re.compile(r"(?!not\b|minus\b|negative\b)[A-Za-z_]{1,12}(?: ?=|\b) ?(?=[-\d.])")
_EQUAL = re.compile(r"=|\\approx|\\simeq|≈")
_BRACKETS = str.maketrans("()[]{}", " " * 6)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
#: Harmless after a unit: "2 mol of water", "5 m/s to the east".
_AFTER_UNITS = {"of", "to", "by"}
#: Of a question, as much is searched for the two numbers of a fraction.
SEARCHED = 20_000


class Quantity(NamedTuple):
    """A number, what follows it, the known unit with which that begins, and where the number is
    written as a fraction, the numbers in it."""

    number: Fraction
    rest: str
    unit: Unit | None
    fraction: tuple[str, ...]


def read(text: str) -> Quantity | None:
    """The quantity that a text is, None for any other text, such as "6 or 7", "6^2" and "12!".

    After the number nothing may follow but a multiple (million), a known unit and plain words that
    change no number.
    """
    if len(text) > LONGEST:
        return None
    squeezed = _squeezed(text)
    found = leading(squeezed)
    if found is None:
        return None
    number, rest, fraction = found
    written = tuple(_NUMBER.findall(squeezed[: len(squeezed) - len(rest)])) if fraction else ()
    rest = _RATIO.sub(r" \1/\2", _POWER.sub(r"^\1", rest)).translate(_BRACKETS)
    rest = " ".join(rest.split())
    while (multiple := rest.partition(" ")[0]) in MULTIPLES:
        number *= 10 ** MULTIPLES[multiple]
        rest = rest[len(multiple) :].lstrip()
    unit, left = parse_unit(rest)
    return Quantity(number, rest, unit, written) if _harmless(left, unit is not None) else None


def parse_unit(text: str) -> tuple[Unit | None, str]:
    """The known unit at the beginning of a squeezed text, None where there is none, and the text
    after it: "" where all of it is the unit.

    m/s^2, m s^-2, m/s2, kg*m, "kilometers per hour", "meters per second squared", kJ/mol. Words of
    four letters and more are units in any case.
    """
    factor, powers = Fraction(1), dict[str, int]()
    position, sign, found = 0, 1, False
    text = _POWER.sub(r"^\1", text)
    while match := _PART.match(text, position):
        name = match["name"].replace("μ", "u").replace("µ", "u")
        unit = UNITS.get(name) or (UNITS.get(name.lower()) if len(name) > 3 else None)
        if unit is None:
            break
        if match["by"] in ("/", "per"):
            sign = -1
        word = match["before"] or match["after"]
        power = sign * int(match["power"] or match["digit"] or 1)
        power *= 1 if word is None else 2 if word.startswith("square") else 3
        factor *= unit.factor**power
        for base, exponent in unit.dimensions:
            powers[base] = powers.get(base, 0) + exponent * power
        position, found = match.end(), True
    if not found:
        return None, text
    return Unit(factor, tuple(sorted((b, p) for b, p in powers.items() if p))), text[position:]


def same_quantity(value: str, unit: str, answer: str, tolerance: float, question: str = "") -> bool:
    """|answer - value| <= tolerance * |value| (tolerance, where value = 0), in the unit of `value`.

    An answer without a known unit is taken to be in `unit`; one in another unit of the same
    dimension is converted, and one of another dimension is wrong. Of "a = b = c" the last counts,
    and quantities before it must agree with it, but for fractions. A fraction does not say an
    integer, and says nothing if both of its numbers stand in the question (680/17).
    """
    wanted = leading(squeeze(value))
    assert wanted is not None, value
    if len(answer) > LONGEST:
        return False
    own = parse_unit(_squeezed(unit))[0]
    limit = Fraction(tolerance) * (abs(wanted[0]) or 1)
    *before, last = _EQUAL.split(answer)
    given = read(last)
    if given is None:
        return False
    stated = _NUMBER.findall(squeeze(question[:SEARCHED])) if given.fraction else []
    if given.fraction and (wanted[0].denominator == 1 or set(given.fraction) <= set(stated)):
        return False
    earlier = [q for q in map(read, before) if q is not None and not q.fraction]
    for quantity in (given, *earlier):
        number, other = quantity.number, quantity.unit
        if own and other:
            if own.dimensions != other.dimensions:
                return False
            number *= other.factor / own.factor
        if abs(number - wanted[0]) > limit:
            return False
    return True


def _harmless(text: str, after_unit: bool) -> bool:
    """Whether a text is nothing but words, none of which is a number or changes one; after a unit
    also letters and formulas, "mol CO2"."""
    for token in text.lstrip(" ,;:").split():
        word = token.strip(",.;:'\"")
        plain = re.fullmatch(r"[A-Za-z][A-Za-z'-]+", word)
        if not plain and not (after_unit and re.fullmatch(r"[a-z]|[A-Z]\w*", word)):
            return False
        banned = NO_UNITS - _AFTER_UNITS if after_unit else NO_UNITS
        if banned.intersection(word.lower().split("-")) or word.lower() in MULTIPLES:
            return False
    return True


def _squeezed(text: str) -> str:
    """Squeezed, with degC for degrees Celsius, and without "x =" and "about" before a number."""
    text = _POWER.sub(r"^\1", _CELSIUS.sub(" degC", text)).replace("~", " ")
    text = re.sub(r"\\(?:operatorname|unit|si)\b", r"\\mathrm", text).replace("per cent", "percent")
    squeezed = squeeze(text)
    squeezed = re.sub(r"\\Omega\b", "Ω", re.sub(r"\\mu ?(?=[A-Za-z])", "u", squeezed))
    return _BEFORE.sub("", squeezed, count=1) if _BEFORE.match(squeezed) else squeezed
