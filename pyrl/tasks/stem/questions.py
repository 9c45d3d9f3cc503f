"""Drawn questions: physics, chemistry, biology, earth science and computing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction

from pyrl.tasks.stem.facts import (
    CELL,
    CHROMOSOMES,
    EARTH,
    ELEMENTS,
    MOLAR_MASSES,
    PAIRS,
    PLANETS,
    SPELLINGS,
)


@dataclass
class Question:
    """A question whose answer is a number in a unit, or a text, with answers that are wrong."""

    text: str
    answer: Fraction | int | str
    unit: str = ""
    wrong: list[Fraction | int | str] = field(default_factory=list)
    """Results of the usual mistakes; what equals the answer is dropped, more are made up."""
    spellings: list[str] = field(default_factory=list)
    """Other texts that are right."""
    exact: bool = False  # a number without a tolerance, though it has a unit


Template = Callable[[random.Random], Question]


def show(number: Fraction | int | str) -> str:
    """A number to four significant digits, without an exponent; a text as it is."""
    if isinstance(number, str):
        return number
    exact = Fraction(number)
    rounded = Decimal(f"{float(exact):.3e}")
    return str(exact) if exact.denominator == 1 else f"{rounded.normalize():f}"


def _tenth(rng: random.Random, low: int, high: int) -> Fraction:
    return Fraction(rng.randint(low * 10, high * 10), 10)


# Physics


def speed(rng: random.Random) -> Question:
    """d / t"""
    v, t = rng.randint(2, 40), rng.randint(2, 20)
    text = f"A car drives {v * t} m in {t} s at constant speed. What is its speed in m/s?"
    return Question(text, v, "m/s", [v * t * t, Fraction(1, v), v * t])


def acceleration(rng: random.Random) -> Question:
    """(v - u) / t"""
    u, a, t = rng.randint(0, 20), rng.randint(1, 8), rng.randint(2, 12)
    v = u + a * t
    text = (
        f"A train speeds up evenly from {u} m/s to {v} m/s in {t} s. "
        f"What is its acceleration in m/s^2?"
    )
    return Question(text, a, "m/s^2", [Fraction(v, t), a * t, Fraction(v + u, 2)])


def fall(rng: random.Random) -> Question:
    """g t^2 / 2"""
    t = rng.randint(1, 12)
    text = (
        f"A stone falls from rest for {t} s without air resistance. With g = 10 m/s^2, "
        f"how far does it fall, in m?"
    )
    return Question(text, 5 * t * t, "m", [10 * t, 10 * t * t, 5 * t])


def ohm(rng: random.Random) -> Question:
    """U / R"""
    current, r = _tenth(rng, 1, 9), rng.randint(2, 60)
    text = f"A resistor of {r} ohm is connected to {show(current * r)} V. What is the current in A?"
    return Question(text, current, "A", [current * r * r, 1 / current, current * r])


def electric_power(rng: random.Random) -> Question:
    """U I"""
    u, i = rng.randint(3, 240), rng.randint(2, 15)
    text = f"A device draws {i} A at {u} V. What is its power in W?"
    return Question(text, u * i, "W", [Fraction(u, i), u + i, u * i * i])


def kinetic_energy(rng: random.Random) -> Question:
    """m v^2 / 2"""
    m, v = 2 * rng.randint(1, 30), rng.randint(2, 20)
    text = f"What is the kinetic energy, in J, of a body of {m} kg that moves at {v} m/s?"
    return Question(text, m * v * v // 2, "J", [m * v, m * v * v, Fraction(m * v, 2)])


def momentum(rng: random.Random) -> Question:
    """m v"""
    m, v = rng.randint(2, 60), rng.randint(2, 30)
    text = f"What is the momentum, in kg m/s, of a body of {m} kg that moves at {v} m/s?"
    return Question(text, m * v, "kg m/s", [Fraction(m, v), m + v, m * v * v])


def density(rng: random.Random) -> Question:
    """m / V"""
    rho, volume = _tenth(rng, 1, 20), rng.randint(2, 50)
    text = (
        f"A sample of {show(rho * volume)} g has a volume of {volume} cm^3. "
        f"What is its density in g/cm^3?"
    )
    return Question(text, rho, "g/cm^3", [rho * volume**2, 1 / rho, rho * volume])


def wave(rng: random.Random) -> Question:
    """f lambda"""
    f, length = rng.randint(2, 90), _tenth(rng, 1, 9)
    text = (
        f"A wave has a frequency of {f} Hz and a wavelength of {show(length)} m. "
        f"What is its speed in m/s?"
    )
    return Question(text, f * length, "m/s", [f / length, length / f, f + length])


def resistors(rng: random.Random) -> Question:
    """R1 R2 / (R1 + R2)"""
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    text = (
        f"Resistors of {a} ohm and {b} ohm are connected in parallel. "
        f"What is their total resistance in ohm?"
    )
    return Question(text, Fraction(a * b, a + b), "ohm", [a + b, a * b, Fraction(a + b, 2)])


def pressure(rng: random.Random) -> Question:
    """F / A"""
    p, area = rng.randint(2, 90), rng.randint(2, 12)
    text = (
        f"A force of {p * area} N acts evenly on an area of {area} m^2. What is the pressure in Pa?"
    )
    return Question(text, p, "Pa", [p * area * area, p * area, Fraction(1, p)])


def heat(rng: random.Random) -> Question:
    """m c dT"""
    m, rise = rng.randint(1, 9), rng.randint(2, 40)
    text = (
        f"How much heat, in kJ, warms {m} kg of water by {rise} K? "
        f"Its specific heat capacity is 4.2 kJ/(kg K)."
    )
    return Question(text, Fraction(42, 10) * m * rise, "kJ", [m * rise, Fraction(42, 10) * rise])


def kmh(rng: random.Random) -> Question:
    """v / 3.6"""
    v = rng.randint(1, 60)
    text = f"Convert {show(Fraction(36, 10) * v)} km/h to m/s."
    return Question(text, v, "m/s", [Fraction(36, 10) * v * Fraction(36, 10), v * 3600, v * 60])


# Chemistry


def molar_mass(rng: random.Random) -> Question:
    """The sum of the atoms' masses"""
    formula = rng.choice(list(MOLAR_MASSES))
    name, mass = MOLAR_MASSES[formula]
    others = [Fraction(m) for _, m in MOLAR_MASSES.values() if m != mass]
    text = f"What is the molar mass of {name} ({formula}) in g/mol?"
    return Question(text, Fraction(mass), "g/mol", rng.sample(others, 3))


def moles(rng: random.Random) -> Question:
    """m / M"""
    formula = rng.choice(list(MOLAR_MASSES))
    name, mass = MOLAR_MASSES[formula]
    n = Fraction(rng.randint(2, 40), 4)
    text = f"How many moles are {show(n * Fraction(mass))} g of {name} ({formula}, {mass} g/mol)?"
    return Question(text, n, "mol", [n * Fraction(mass) ** 2, 1 / n, n * 2])


def acidity(rng: random.Random) -> Question:
    """-log10 of the concentration"""
    n = rng.randint(1, 13)
    text = f"The concentration of hydrogen ions in a solution is 10^-{n} mol/L. What is its pH?"
    return Question(text, n, "", [-n, 14 - n, 10 * n])


def atomic_number(rng: random.Random) -> Question:
    """The place in the periodic table"""
    n = rng.randrange(len(ELEMENTS))
    text = f"What is the atomic number of {ELEMENTS[n][1]}?"
    return Question(text, n + 1, "", [ELEMENTS[n][2], n, n + 2, n + 9])


def element(rng: random.Random) -> Question:
    """The name of a symbol"""
    symbol, name, _ = rng.choice(ELEMENTS)
    wrong = [other for _, other, _ in rng.sample(ELEMENTS, 5) if other != name]
    text = f"Which element has the symbol {symbol}?"
    return Question(text, name, "", [*wrong], SPELLINGS.get(name, []))


def neutrons(rng: random.Random) -> Question:
    """A - Z"""
    z = rng.randint(1, len(ELEMENTS) - 1)
    a = ELEMENTS[z][2] + rng.randint(0, 3)
    text = f"How many neutrons are in the nucleus of {ELEMENTS[z][1]}-{a}?"
    return Question(text, a - z - 1, "", [z + 1, a, a + z + 1])


def dilution(rng: random.Random) -> Question:
    """c V / V'"""
    c, v, times = rng.randint(1, 9), 10 * rng.randint(1, 9), rng.choice((2, 4, 5, 10))
    text = (
        f"{v} mL of a {c} mol/L solution are diluted to {v * times} mL. "
        f"What is the new concentration in mol/L?"
    )
    return Question(text, Fraction(c, times), "mol/L", [c * times, c, Fraction(c, times + 1)])


def kelvin(rng: random.Random) -> Question:
    """t + 273"""
    t = rng.randint(-100, 300)
    text = f"Convert {t} degrees Celsius to kelvin (0 degrees Celsius = 273 K)."
    return Question(text, t + 273, "K", [t - 273, 273 - t, t * 2 + 32], exact=True)


# Biology


def punnett(rng: random.Random) -> Question:
    """Shares of a cross of two genotypes"""
    parents = rng.choice((("Aa", "Aa"), ("Aa", "aa"), ("AA", "Aa"), ("aa", "aa"), ("AA", "aa")))
    dominant = rng.random() < 0.5
    children = [a + b for a in parents[0] for b in parents[1]]
    share = sum(("A" in child) == dominant for child in children) * 25
    kind = "dominant" if dominant else "recessive"
    text = (
        f"A is dominant over a. Of the offspring of {parents[0]} and {parents[1]}, what percentage "
        f"is expected to show the {kind} trait?"
    )
    return Question(text, share, "percent", [100 - share, 50, 25, 75, 0, 100])


def strand(rng: random.Random) -> Question:
    """The complement of a DNA strand"""
    bases = "".join(rng.choice("ACGT") for _ in range(rng.randint(4, 8)))
    other = "".join(PAIRS[b] for b in bases)
    text = (
        f"A DNA strand reads {bases}. What does the other strand read, base by base in this order?"
    )
    ends = [f"{a}'{dash}{other}{dash}{8 - a}'" for a in (3, 5) for dash in ("-", " ")]
    wrong = [bases, other[::-1], other.replace("T", "U")]
    return Question(text, other, "", [*wrong], [" ".join(other), "-".join(other), *ends])


def codons(rng: random.Random) -> Question:
    """Three bases for an amino acid"""
    n = rng.randint(2, 300)
    text = f"How many amino acids do {3 * n} bases of messenger RNA code for, without a stop codon?"
    return Question(text, n, "", [3 * n, 9 * n, n + 1])


def doubling(rng: random.Random) -> Question:
    """start 2^k"""
    start, minutes, k = rng.randint(1, 20), rng.choice((15, 20, 30)), rng.randint(1, 7)
    text = (
        f"A culture of {start} bacteria doubles every {minutes} minutes. "
        f"How many bacteria are there after {k * minutes} minutes?"
    )
    return Question(text, start * 2**k, "", [start * 2 * k, start * 2 ** (k - 1), start * k])


def gametes(rng: random.Random) -> Question:
    """Half of a body cell's chromosomes"""
    species = rng.choice(list(CHROMOSOMES))
    n = CHROMOSOMES[species]
    text = f"A body cell of a {species} has {n} chromosomes. How many has one of its gametes?"
    return Question(text, n // 2, "", [n, 2 * n, n // 2 + 1])


def organelle(rng: random.Random) -> Question:
    """What does what in a cell"""
    task = rng.choice(list(CELL))
    name, wrong = CELL[task], [c for c in CELL.values() if c != CELL[task]]
    return Question(f"Which part of a cell {task}?", name, "", [*wrong], SPELLINGS.get(name, []))


# Earth and space


def half_life(rng: random.Random) -> Question:
    """1 / 2^k remains"""
    start, years, k = 2 ** rng.randint(4, 9), 10 * rng.randint(1, 90), rng.randint(1, 4)
    text = (
        f"An isotope has a half-life of {years} years. How many grams of {start} g are left after "
        f"{k * years} years?"
    )
    return Question(text, start // 2**k, "g", [Fraction(start, 2 * k + 1), start, start * k])


def planet(rng: random.Random) -> Question:
    """Order from the Sun"""
    i = rng.randrange(len(PLANETS))
    text = f"Which planet is number {i + 1} counted from the Sun?"
    return Question(text, PLANETS[i], "", [p for p in PLANETS if p != PLANETS[i]])


def layer(rng: random.Random) -> Question:
    """Layers of Earth and air"""
    what = rng.choice(list(EARTH))
    name, wrong = EARTH[what], [e for e in EARTH.values() if e != EARTH[what]]
    text = f"Which layer of the Earth or its atmosphere {what}?"
    return Question(text, name, "", [*wrong], SPELLINGS.get(name, []))


def drift(rng: random.Random) -> Question:
    """Rate times time"""
    rate, millions = rng.randint(2, 12), rng.randint(1, 20)
    text = f"A plate moves {rate} cm a year. How many km does it move in {millions} million years?"
    return Question(text, 10 * rate * millions, "km", [rate * millions, 1000 * rate * millions])


def map_scale(rng: random.Random) -> Question:
    """Length on the map times scale"""
    cm, scale = rng.randint(2, 20), rng.choice((10_000, 25_000, 50_000, 100_000))
    text = f"On a map of scale 1:{scale}, two villages are {cm} cm apart. How many km is that?"
    answer = Fraction(cm * scale, 100_000)
    return Question(text, answer, "km", [10 * answer, answer / 10, answer * 100])


# Computing


def from_binary(rng: random.Random) -> Question:
    """Base 2 to base 10"""
    n = rng.randint(4, 255)
    return Question(f"What is the binary number {n:b} in decimal?", n, "", [2 * n, n + 1, n // 2])


def to_hex(rng: random.Random) -> Question:
    """Base 10 to base 16"""
    n = rng.randint(16, 4095)
    wrong: list[Fraction | int | str] = [f"{n + d:X}" for d in (1, 16, -1)]
    text = f"Write the decimal number {n} in hexadecimal, without a prefix."
    return Question(text, f"{n:X}", "", wrong, [f"0x{n:X}"])


def bit_values(rng: random.Random) -> Question:
    """2^n"""
    n = rng.randint(2, 16)
    text = f"How many different values can {n} bits represent?"
    return Question(text, 2**n, "", [2 * n, 2**n - 1, n * n])


def halvings(rng: random.Random) -> Question:
    """Binary search"""
    k = rng.randint(3, 20)
    text = (
        f"How many comparisons does binary search need at most in a sorted list of {2**k - 1} "
        f"items?"
    )
    return Question(text, k, "", [2**k - 1, 2 ** (k - 1), k + 3])


def logic(rng: random.Random) -> Question:
    """AND, OR, NOT"""
    a, b, c = (rng.random() < 0.5 for _ in range(3))
    first, second = rng.choice(("AND", "OR")), rng.choice(("AND", "OR"))
    left = (a and b) if first == "AND" else (a or b)
    value = (left and not c) if second == "AND" else (left or not c)
    text = f"What is ({a} {first} {b}) {second} (NOT {c}), True or False?"
    return Question(text, str(value), "", [str(not value)])


def transfer(rng: random.Random) -> Question:
    """Bits and bytes"""
    rate, seconds = 8 * rng.randint(1, 40), rng.randint(2, 60)
    text = f"A connection carries {rate} Mbit/s. How many MB does it carry in {seconds} s?"
    answer = rate * seconds // 8
    return Question(text, answer, "MB", [rate * seconds, answer * 64, Fraction(rate, 8)])


#: Subject → its templates.
SUBJECTS: dict[str, list[Template]] = {
    "physics": [speed, acceleration, fall, ohm, electric_power, kinetic_energy, momentum, density,
                wave, resistors, pressure, heat, kmh],
    "chemistry": [molar_mass, moles, acidity, atomic_number, element, neutrons, dilution, kelvin],
    "biology": [punnett, strand, codons, doubling, gametes, organelle],
    "earth": [half_life, planet, layer, drift, map_scale],
    "computing": [from_binary, to_hex, bit_values, halvings, logic, transfer],
}  # fmt: skip
