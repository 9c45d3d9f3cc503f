"""Symbolic equality through math-verify (sympy), for expressions that are small enough to try."""

from __future__ import annotations

import logging
import re

#: Deepest nesting of brackets, largest number in an exponent, most powers of powers, most digits
#: of a number, largest number with a factorial. Beyond, an expression is only a string.
DEEPEST, LARGEST_EXPONENT, MOST_RAISED, MOST_DIGITS, LARGEST_FACTORIAL = 12, 1000, 2, 60, 100
_NEVER = MOST_RAISED  # the level of what must not be raised again
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+|\*\*|.", re.DOTALL)
_OPEN, _CLOSE = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
#: What evaluates these may not end: sums and limits are questions, not answers, and a binomial of
#: powers is beyond anything.
_HEAVY = re.compile(
    r"\\(?:sum|prod|i*nt|oint|lim[a-z]*)(?![A-Za-z])|\\[dt]?binom ?\{[^{}]*(?:\^|\} ?\{[^{}]*\^)"
)


def within_bounds(squeezed: str) -> bool:
    r"""Whether the symbolic parser may see it: see DEEPEST and the others. Linear.

    9^9^9^9, 10^{10^{10}}, ((9^9)^9)^9, (9!)!, x^{2000} and \sum are refused; 2^{1000}, (x^2+1)^{3}
    and 20! are not. An exponent may hold no power at all, so e^{x^2} is only ever a string.
    """
    if _HEAVY.search(squeezed):
        return False
    groups = [(0, False, False)]  # open brackets: level inside, (in) an exponent, an exponent's own
    level = 0  # how many powers deep is what stands before this token
    raised = False  # this token is an exponent
    before = ""
    for token in _TOKEN.findall(squeezed.replace(" ", "")):
        inside, exponent, own = groups[-1]
        exponent = exponent or raised
        if token in ("^", "**"):
            if exponent or level >= MOST_RAISED:
                return False
            raised = True
            groups[-1] = (max(inside, level + 1), False, own)
        elif token in _OPEN:
            if len(groups) > DEEPEST:
                return False
            groups.append((0, exponent, raised))
            level, raised = 0, False
        elif token in _CLOSE:
            if len(groups) == 1:
                return False
            groups.pop()
            level = _NEVER if own else inside
            outside = groups[-1]
            groups[-1] = (max(outside[0], inside), *outside[1:])
        elif token == "!":
            small = before.isalpha() or (before.isdigit() and int(before) <= LARGEST_FACTORIAL)
            if exponent or level or not small:
                return False
            level = _NEVER
        elif not (raised and token in "+-"):
            if token.isdigit() and (
                len(token) > MOST_DIGITS or (exponent and int(token) > LARGEST_EXPONENT)
            ):
                return False
            level, raised = _NEVER if raised else 0, False
        before = token
    return len(groups) == 1


def equal(reference: str, answer: str) -> bool:
    """Whether math-verify holds two squeezed expressions equal; False beyond the bounds.

    It has no time limit of its own here (those of math-verify need the main thread and SIGALRM):
    call it where it can be killed.
    """
    if not (within_bounds(reference) and within_bounds(answer)):
        return False
    known, given = _parse(reference), _parse(answer)
    if not known or not given:
        return False
    from math_verify import verify

    return bool(verify(known, given, timeout_seconds=None))


def expanded(squeezed: str) -> str | None:
    """The expression multiplied out, in sympy's spelling; None where it cannot be parsed."""
    if not within_bounds(squeezed):
        return None
    parsed = _parse(squeezed)
    if not parsed:
        return None
    import sympy

    try:
        return str(sympy.expand(parsed[0].doit()))
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return None


def _parse(squeezed: str) -> list:
    from math_verify import LatexExtractionConfig, parse  # with sympy: a second the first time

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # warns of its missing time limit
    return parse(
        f"${squeezed}$",
        [LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
