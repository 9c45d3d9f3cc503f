"""Drawn problems: `draw(kind, rng, level)`. Level 1 has one-digit numbers and one step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

#: A question and its answer.
Problem = tuple[str, str]
Template = Callable[[random.Random, int], Problem]


def draw(kind: str, rng: random.Random, level: int) -> tuple[str, str, str]:
    """(template's name, question, answer) of one of the kind's templates."""
    template = rng.choice(KINDS[kind])
    return template.__name__, *template(rng, level)


def _size(rng: random.Random, level: int, low: int = 1) -> int:
    """A number of about `level` digits."""
    return rng.randint(low, (9, 99, 999)[level - 1])


def _signed(number: int) -> str:
    return f"+ {number}" if number >= 0 else f"- {-number}"


def _term(factor: int, name: str) -> str:
    return name if factor == 1 else f"-{name}" if factor == -1 else f"{factor}{name}"


def _plus(factor: int, name: str) -> str:
    sign = "+" if factor > 0 else "-"
    return f" {sign} {_term(abs(factor), name)}" if factor else ""


# Arithmetic


def total(rng: random.Random, level: int) -> Problem:
    """3 + 4"""
    a, b = _size(rng, level), _size(rng, level)
    return f"What is {a} + {b}?", str(a + b)


def difference(rng: random.Random, level: int) -> Problem:
    """7 - 4; from level 2 it may be negative"""
    a, b = _size(rng, level), _size(rng, level)
    if level == 1:
        a, b = max(a, b), min(a, b)
    return f"What is {a} - {b}?", str(a - b)


def product(rng: random.Random, level: int) -> Problem:
    """3 * 4"""
    a, b = _size(rng, level), _size(rng, max(level - 1, 1))
    return f"What is {a} * {b}?", str(a * b)


def quotient(rng: random.Random, level: int) -> Problem:
    """12 / 4, exact"""
    b, result = _size(rng, min(level, 2), 2), _size(rng, level)
    return f"What is {b * result} / {b}?", str(result)


def order(rng: random.Random, level: int) -> Problem:
    """2 + 3 * 4, with brackets from level 2 and a square at level 3"""
    a, b, c, d = (rng.randint(1, 5 if level == 1 else 12) for _ in range(4))
    if level == 1:
        text, value = f"{a} + {b} * {c}", a + b * c
    elif level == 2:
        text, value = f"({a} + {b}) * {c} - {d}", (a + b) * c - d
    else:
        text, value = f"{a} * ({b} - {c} * {d}) + {c}^2", a * (b - c * d) + c * c
    return f"Compute {text}.", str(value)


def fractions(rng: random.Random, level: int) -> Problem:
    """1/5 + 2/5, with two denominators from level 2, a product at level 3"""
    while True:
        first, second = rng.randint(2, 9), rng.randint(2, 9)
        if level == 1:
            second = first
        a, b = (Fraction(rng.randint(1, d - 1), d) for d in (first, second))
        sign = rng.choice("+-" if level < 3 else "+-*")
        value = a + b if sign == "+" else a - b if sign == "-" else a * b
        if value.denominator > 1:  # it asks for a fraction
            return f"Compute {a} {sign} {b}. Give a fraction.", str(value)


def decimals(rng: random.Random, level: int) -> Problem:
    """0.3 + 0.4, with `level` digits after the point"""
    scale = 10**level
    a, b = rng.randint(1, 5 * scale), rng.randint(1, 5 * scale)
    return (
        f"What is {a / scale:.{level}f} + {b / scale:.{level}f}?",
        f"{(a + b) / scale:.{level}f}",
    )


def percent(rng: random.Random, level: int) -> Problem:
    """50% of 8; at level 3 a price after a discount"""
    share = rng.choice([10, 50, 100] if level == 1 else [5, 15, 20, 25, 30, 40, 60, 75])
    whole = rng.randint(1, 9) * (10 if level == 1 else 20) + (
        4 * rng.randint(0, 4) if level > 1 else 0
    )
    if level < 3:
        return f"What is {share}% of {whole}?", str(Fraction(share * whole, 100))
    return (
        f"A price of {whole} dollars is reduced by {share}%. What is the new price in dollars?",
        str(Fraction((100 - share) * whole, 100)),
    )


# Algebra


def linear(rng: random.Random, level: int) -> Problem:
    """x + 3 = 7; 2x + 3 = 11; 5x + 3 = 2x - 4"""
    x, a, b = _size(rng, 1), rng.randint(2, 9), _size(rng, level)
    if level == 1:
        return f"Solve x + {b} = {x + b}. What is x?", str(x)
    if level == 2:
        x *= rng.choice((1, -1))
        return f"Solve {a}x + {b} = {a * x + b}. What is x?", str(x)
    c, d = rng.randint(1, a - 1), rng.randint(-50, 50)
    text = f"{a}x + {b} = {_term(c, 'x')} {_signed(d)}"
    return f"Solve {text}. What is x?", str(Fraction(d - b, a - c))


def evaluate(rng: random.Random, level: int) -> Problem:
    """x + 4 at x = 3; 2x - 5; 2x^2 - 3y"""
    x, y, a, b = (rng.randint(1, 9) for _ in range(4))
    if level == 1:
        return f"If x = {x}, what is x + {b}?", str(x + b)
    if level == 2:
        return f"If x = {x}, what is {a + 1}x - {b}?", str((a + 1) * x - b)
    text = f"{a + 1}x^2 - {b + 1}y"
    return f"If x = {x} and y = -{y}, what is {text}?", str((a + 1) * x * x + (b + 1) * y)


def quadratic(rng: random.Random, level: int) -> Problem:
    """x^2 = 9 with x > 0; x^2 - 5x + 6 = 0; 2x^2 + 3x - 2 = 0"""
    p, q = rng.randint(1, 9), rng.randint(1, 9)
    if level == 1:
        return f"If x^2 = {p * p} and x > 0, what is x?", str(p)
    if level == 2:
        roots = [Fraction(p), Fraction(-q)]
    else:
        roots = [Fraction(p, rng.randint(2, 4)), Fraction(rng.choice((q, -q)), rng.randint(1, 3))]
    a = roots[0].denominator * roots[1].denominator
    b, c = int(-a * sum(roots)), int(a * roots[0] * roots[1])
    common = math.gcd(a, b, c)
    text = f"{_term(a // common, 'x^2')}{_plus(b // common, 'x')} {_signed(c // common)}"
    both = ", ".join(str(r) for r in sorted(set(roots)))
    return f"Give all solutions x of {text} = 0, separated by commas.", both


def system(rng: random.Random, level: int) -> Problem:
    """x + y = 7 and x - y = 1"""
    x, y = rng.randint(1, 9), rng.randint(1, 9)
    a, b, c, d = 1, 1, 1, -1
    if level > 1:
        x, y = x * rng.choice((1, -1)), y * rng.choice((1, -1))
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        c, d = rng.randint(1, 9), -rng.randint(1, 9)  # a*d - b*c < 0: one solution
    if level == 3:
        d = -d if a * -d != b * c else d
    one = f"{_term(a, 'x')} + {_term(b, 'y')} = {a * x + b * y}"
    two = f"{_term(c, 'x')} {'+' if d > 0 else '-'} {_term(abs(d), 'y')} = {c * x + d * y}"
    return f"Solve {one} and {two}. Give (x, y).", f"({x}, {y})"


def factors(rng: random.Random, level: int) -> Problem:
    """x^2 + 5x + 6 = (x + 2)(x + 3)"""
    low = 1 if level == 1 else -9
    a, b = sorted(rng.choice([n for n in range(low, 5 if level == 1 else 13) if n]) for _ in "ab")
    text = f"x^2{_plus(a + b, 'x')} {_signed(a * b)}"
    return f"Write {text} as (x + a)(x + b) with a <= b. Give (a, b).", f"({a}, {b})"


# Number theory


def gcd(rng: random.Random, level: int) -> Problem:
    """gcd(4, 6)"""
    common = _size(rng, min(level, 2))
    a, b = common * rng.randint(1, 4 * level), common * rng.randint(1, 4 * level)
    return f"What is the greatest common divisor of {a} and {b}?", str(math.gcd(a, b))


def lcm(rng: random.Random, level: int) -> Problem:
    """lcm(4, 6)"""
    a, b = rng.randint(2, 6 * level**2), rng.randint(2, 6 * level**2)
    return f"What is the least common multiple of {a} and {b}?", str(math.lcm(a, b))


def remainder(rng: random.Random, level: int) -> Problem:
    """7 modulo 3"""
    a, b = _size(rng, level, 2), rng.randint(2, (5, 12, 37)[level - 1])
    return f"What is the remainder when {a} is divided by {b}?", str(a % b)


def next_prime(rng: random.Random, level: int) -> Problem:
    """The first prime above 7"""
    number = _size(rng, level)
    prime = number + 1
    while any(prime % d == 0 for d in range(2, math.isqrt(prime) + 1)):
        prime += 1
    return f"What is the smallest prime number greater than {number}?", str(prime)


def largest_prime_factor(rng: random.Random, level: int) -> Problem:
    """3 of 12"""
    number = _size(rng, level, 2)
    rest, prime = number, 2
    while rest > 1:
        while rest % prime == 0:
            rest //= prime
        prime += 1
    return f"What is the largest prime factor of {number}?", str(prime - 1)


def divisors(rng: random.Random, level: int) -> Problem:
    """1, 2, 3 and 6 divide 6"""
    number = _size(rng, level, 2)
    count = sum(number % d == 0 for d in range(1, number + 1))
    return f"How many positive divisors does {number} have?", str(count)


def modular_power(rng: random.Random, level: int) -> Problem:
    """The last digit of 2^3; 3^7 modulo 11"""
    base, exponent = rng.randint(2, 9), rng.randint(2, (3, 9, 60)[level - 1])
    if level == 1:
        return f"What is the last digit of {base}^{exponent}?", str(base**exponent % 10)
    modulus = rng.randint(3, (0, 13, 29)[level - 1])
    text = f"What is the remainder when {base}^{exponent} is divided by {modulus}?"
    return text, str(pow(base, exponent, modulus))


def digit_sum(rng: random.Random, level: int) -> Problem:
    """12 has 3"""
    number = rng.randint(10, (99, 9999, 10**9)[level - 1])
    return f"What is the sum of the digits of {number}?", str(sum(map(int, str(number))))


#: kind → its templates.
KINDS: dict[str, list[Template]] = {
    "arithmetic": [total, difference, product, quotient, order, fractions, decimals, percent],
    "algebra": [linear, evaluate, quadratic, system, factors],
    "number_theory": [
        gcd, lcm, remainder, next_prime, largest_prime_factor, divisors, modular_power, digit_sum,
    ],
}  # fmt: skip
