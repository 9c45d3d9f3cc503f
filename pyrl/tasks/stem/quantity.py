"""Numbers with units, compared within a relative tolerance."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from pyrl.tasks.mathematics.final import LONGEST
from pyrl.tasks.mathematics.notation import leading, squeeze

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
                if len(name) > 3:
                    spelled = long.get(prefix, "") + name
                    table[spelled] = table[spelled + "s"] = unit
                else:
                    table[prefix + name] = unit

    add("m meter metre", "1", "m", "kcdmun")
    add("g gram", "1/1000", "kg", "kmu")
    add("t tonne", "1000", "kg")
    add("s second sec", "1", "s", "mun")
    add("min minute", "60", "s")
    add("h hour hr", "3600", "s")
    add("day", "86400", "s")
    add("days", "86400", "s")
    add("year yr a", "31557600", "s")
    add("A ampere amp", "1", "A", "mu")
    add("amps", "1", "A")
    add("K kelvin", "1", "K")
    add("degC celsius Celsius", "1", "celsius")
    add("mol mole", "1", "mol", "m")
    add("N newton", "1", "kg m s-2", "kM")
    add("J joule", "1", "kg m2 s-2", "kM")
    add("W watt", "1", "kg m2 s-3", "kMG")
    add("V volt", "1", "kg m2 s-3 A-1", "km")
    add("ohm ohms Ohm Ω", "1", "kg m2 s-3 A-2", "kM")
    add("C coulomb", "1", "A s", "mu")
    add("Pa pascal", "1", "kg m-1 s-2", "kM")
    add("Hz hertz", "1", "s-1", "kMG")
    add("L l liter litre", "1/1000", "m3", "m")
    add("M", "1000", "mol m-3", "m")
    add("bit", "1", "bit", "kMG")
    add("bits", "1", "bit")
    add("B byte", "8", "bit")
    add("percent %", "1", "percent")
    return table


UNITS = _table()
_PART = re.compile(r" ?([/*]|\\cdot|per\b)? ?([A-Za-zΩμµ%]+)(?: ?\^ ?\{? ?(-?\d) ?\}?|(\d)(?!\d))?")
_CELSIUS = re.compile(
    r"(?:\^ ?\{? ?\\circ ?\}?|°|\bdegrees?) ?(?:\\(?:text|mathrm) ?\{ ?)?(?:C(?:elsius)?\b)\}?"
)


def parse_unit(text: str) -> Unit | None:
    """The unit at the beginning of a squeezed text, None where there is none that is known.

    m/s^2, m s^-2, m/s2, kg*m, "kilometers per hour", kJ/mol. What follows a unit is ignored.
    """
    factor, powers = Fraction(1), dict[str, int]()
    position, sign, found = 0, 1, False
    while match := _PART.match(text, position):
        unit = UNITS.get(match[2].replace("μ", "u").replace("µ", "u"))
        if unit is None:
            break
        if match[1] in ("/", "per"):
            sign = -1
        power = sign * int(match[3] or match[4] or 1)
        factor *= unit.factor**power
        for base, exponent in unit.dimensions:
            powers[base] = powers.get(base, 0) + exponent * power
        position, found = match.end(), True
    if not found:
        return None
    return Unit(factor, tuple(sorted((b, p) for b, p in powers.items() if p)))


def same_quantity(value: str, unit: str, answer: str, tolerance: float) -> bool:
    """|answer - value| <= tolerance * |value| (tolerance, where value = 0), in the unit of `value`.

    An answer without a known unit is taken to be in `unit`; one in another unit of the same
    dimension is converted, and one of another dimension is wrong.
    """
    if len(answer) > LONGEST:
        return False
    given = leading(_squeezed(answer))
    wanted = leading(squeeze(value))
    assert wanted is not None, value
    if given is None:
        return False
    number, rest, _ = given
    own, other = parse_unit(_squeezed(unit)), parse_unit(rest)
    if own and other:
        if own.dimensions != other.dimensions:
            return False
        number *= other.factor / own.factor
    limit = Fraction(tolerance) * (abs(wanted[0]) or 1)
    return abs(number - wanted[0]) <= limit


def _squeezed(text: str) -> str:
    """Squeezed, with degC for degrees Celsius, and without "x =" and "about" before a number."""
    squeezed = squeeze(_CELSIUS.sub(" degC", text))
    squeezed = re.sub(r"\\Omega\b", "Ω", re.sub(r"\\mu ?(?=[A-Za-z])", "u", squeezed))
    return re.sub(r"^[A-Za-z_]{1,12}(?: ?=|\b) ?(?=[-\d.])|^\\approx ?", "", squeezed)
