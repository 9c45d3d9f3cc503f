"""The families that `problems` draws from: a statement, a right program and inputs, each a few
lines. `<a>`, `<b>` stand for parameters; a new family is one entry of FAMILIES."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, int]


@dataclass(frozen=True)
class Family:
    """A kind of problem."""

    name: str
    level: int
    statement: str
    """Begins with "Return"."""
    arguments: tuple[tuple[str, str], ...]
    """(name, kind): kinds are int, list and str."""
    result: str
    """int, list, str or bool."""
    parameters: Mapping[str, tuple[int, int]]
    """name → (least, most)"""
    body: str
    """Of the reference function."""
    draw: Callable[[random.Random, Values], list[Any]]
    """Arguments."""


def _list(rng: random.Random, low: int = -20, high: int = 60, longest: int = 10) -> list[int]:
    return [rng.randint(low, high) for _ in range(rng.choice((0, *range(1, longest + 1))))]


def _word(rng: random.Random, letters: str = "abcdefghij", longest: int = 12) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(1, longest)))


def _text(rng: random.Random, letters: str = "abcdeiou", words: int = 7) -> str:
    return " ".join(_word(rng, letters, 7) for _ in range(rng.randint(1, words)))


def _one_list(rng: random.Random, values: Values) -> list[Any]:
    return [_list(rng)]


def _naturals(rng: random.Random, values: Values) -> list[Any]:
    return [_list(rng, 0, 30)]


def _one_int(low: int, high: int) -> Callable[[random.Random, Values], list[Any]]:
    return lambda rng, values: [rng.randint(low, high)]


def _one_word(rng: random.Random, values: Values) -> list[Any]:
    return [_word(rng)]


def _one_text(rng: random.Random, values: Values) -> list[Any]:
    return [_text(rng)]


def _runs(rng: random.Random, values: Values) -> list[Any]:
    return ["".join(c * rng.randint(1, 6) for c in _word(rng, "abc", 6))]


def _brackets(rng: random.Random, values: Values) -> list[Any]:
    depth, text = 0, ""
    for _ in range(rng.randint(2, 16)):
        step = rng.choice("()") if depth or rng.random() < 0.1 else "("
        depth, text = depth + (1 if step == "(" else -1), text + step
    return [text + ")" * max(depth, 0) * (rng.random() < 0.8)]


def _expression(rng: random.Random, values: Values) -> list[Any]:
    text = str(rng.randint(0, 20))
    for _ in range(rng.randint(0, 6)):
        text += f" {rng.choice('+-*')} {rng.randint(0, 12)}"
    return [text]


XS, N, S = (("xs", "list"),), (("n", "int"),), (("s", "str"),)

FAMILIES = (
    # Level 1: one pass over a list, a number or a text.
    Family("sum of multiples", 1,
           "Return the sum of the elements of `xs` that are divisible by <a> or larger than <b>.",
           XS, "int", {"a": (2, 12), "b": (5, 50)},
           "return sum(x for x in xs if x % <a> == 0 or x > <b>)", _one_list),
    Family("count between", 1,
           "Return how many elements of `xs` are at least -<a> and at most <b>.",
           XS, "int", {"a": (1, 15), "b": (5, 50)},
           "return sum(-<a> <= x <= <b> for x in xs)", _one_list),
    Family("scale and shift", 1,
           "Return the list of <a> * x + <b> for each element x of `xs`, in the same order.",
           XS, "list", {"a": (2, 20), "b": (1, 40)},
           "return [<a> * x + <b> for x in xs]", _one_list),
    Family("clip", 1,
           "Return `xs` with every element below -<a> replaced by -<a> and every element above "
           "<b> replaced by <b>.",
           XS, "list", {"a": (1, 15), "b": (5, 50)},
           "return [min(max(x, -<a>), <b>) for x in xs]", _one_list),
    Family("digit sum", 1,
           "Return the sum of the decimal digits of <a> * n + <b>.",
           N, "int", {"a": (2, 40), "b": (1, 90)},
           "return sum(int(d) for d in str(<a> * n + <b>))", _one_int(0, 99999)),
    Family("every so many", 1,
           "Return the text made of the characters of `s` at the positions <a>, <a> + <b>, "
           "<a> + 2 * <b>, and so on, where the first character has position 0.",
           S, "str", {"a": (0, 7), "b": (2, 9)},
           "return s[<a>::<b>]", lambda rng, values: [_word(rng, "abcdefghij", 40)]),
    Family("long words", 1,
           "Return how many words of `s` have more than <a> letters or begin with the letter "
           "number <b> of the alphabet (a is number 1); words are separated by single spaces.",
           S, "int", {"a": (2, 6), "b": (1, 15)},
           "return sum(len(w) > <a> or w[0] == chr(96 + <b>) for w in s.split())", _one_text),
    Family("last digits", 1,
           "Return n ** <a> modulo <b>.",
           N, "int", {"a": (2, 30), "b": (7, 99)},
           "return pow(n, <a>, <b>)", _one_int(0, 10**6)),
    Family("rotate", 1,
           "Return `xs` rotated to the left by <a> places, with <b> added to each element.",
           XS, "list", {"a": (1, 9), "b": (1, 30)},
           "k = <a> % len(xs) if xs else 0\nreturn [x + <b> for x in xs[k:] + xs[:k]]", _one_list),
    # Level 2: some state, or two steps.
    Family("best window", 2,
           "Return the largest sum of <a> consecutive elements of `xs`, or -<b> if `xs` has fewer "
           "than <a> elements.",
           XS, "int", {"a": (2, 5), "b": (1, 99)},
           "if len(xs) < <a>:\n    return -<b>\n"
           "return max(sum(xs[i:i + <a>]) for i in range(len(xs) - <a> + 1))", _one_list),
    Family("shift cipher", 2,
           "Return `s` with each lowercase letter moved <a> places on in the alphabet, from z on "
           "to a, and every group of <b> characters of the result reversed (also the last, "
           "shorter one).",
           S, "str", {"a": (1, 25), "b": (2, 6)},
           "t = ''.join(chr((ord(c) - 97 + <a>) % 26 + 97) for c in s)\n"
           "return ''.join(t[i:i + <b>][::-1] for i in range(0, len(t), <b>))", _one_word),
    Family("base", 2,
           "Return n + <b> written in base <a>, as a text of digits without leading zeros.",
           N, "str", {"a": (2, 9), "b": (0, 60)},
           "n += <b>\nout = ''\nwhile n:\n    out, n = str(n % <a>) + out, n // <a>\n"
           "return out or '0'", _one_int(0, 10**5)),
    Family("recurrence", 2,
           "Let f(0) = 0, f(1) = 1 and f(k) = (<a> * f(k-1) + <b> * f(k-2)) modulo 1009. "
           "Return f(n).",
           N, "int", {"a": (1, 30), "b": (1, 30)},
           "x, y = 0, 1\nfor _ in range(n):\n    x, y = y, (<a> * y + <b> * x) % 1009\nreturn x",
           _one_int(0, 500)),
    Family("distinct by remainder", 2,
           "Return the elements of `xs` without those whose remainder modulo <a> equals that of "
           "an earlier element, followed by the number <b>.",
           XS, "list", {"a": (3, 25), "b": (0, 40)},
           "seen, out = set(), []\nfor x in xs:\n    if x % <a> not in seen:\n"
           "        seen.add(x % <a>)\n        out.append(x)\nreturn out + [<b>]", _one_list),
    Family("run lengths", 2,
           "Return the length of the longest run of equal characters in `s`, plus <b> for every "
           "run of at least <a> characters.",
           S, "int", {"a": (2, 6), "b": (1, 50)},
           "import itertools\nruns = [len(list(g)) for _, g in itertools.groupby(s)]\n"
           "return max(runs) + <b> * sum(r >= <a> for r in runs)", _runs),
    Family("divisors", 2,
           "Return the sum of the positive divisors of n that are not divisible by <a> and are at "
           "most <b>.",
           N, "int", {"a": (2, 9), "b": (10, 99)},
           "return sum(d for d in range(1, <b> + 1) if n % d == 0 and d % <a>)",
           lambda rng, values: [rng.randint(1, 40) * rng.choice((1, 6, 12, 35))]),
    Family("sort by remainder", 2,
           "Return `xs` sorted by the remainder modulo <a>, elements of equal remainder by value "
           "from large to small, without the elements equal to <b>.",
           XS, "list", {"a": (3, 15), "b": (0, 30)},
           "return sorted((x for x in xs if x != <b>), key=lambda x: (x % <a>, -x))", _naturals),
    Family("vowel words", 2,
           "Return the words of `s` that have at least <a> vowels (a, e, i, o, u) or exactly <b> "
           "letters, in alphabetical order and joined by single spaces.",
           S, "str", {"a": (1, 4), "b": (1, 13)},
           "return ' '.join(sorted(w for w in s.split() "
           "if sum(c in 'aeiou' for c in w) >= <a> or len(w) == <b>))", _one_text),
    # Level 3: a known algorithm, or a small language.
    Family("coins", 3,
           "Return the least number of coins with a total of n, from coins of 1, <a> and <b>, as "
           "many of each as needed.",
           N, "int", {"a": (3, 12), "b": (13, 30)},
           "best = [0]\nfor k in range(1, n + 1):\n"
           "    best.append(1 + min(best[k - c] for c in (1, <a>, <b>) if c <= k))\n"
           "return best[n]", _one_int(0, 200)),
    Family("rising steps", 3,
           "Return the length of the longest subsequence of `xs` (elements in their order, not "
           "necessarily neighbours) in which each element exceeds the one before by at least <a> "
           "and at most <b>.",
           XS, "int", {"a": (1, 5), "b": (6, 40)},
           "best = []\nfor i, x in enumerate(xs):\n"
           "    best.append(1 + max((best[j] for j in range(i) if <a> <= x - xs[j] <= <b>), "
           "default=0))\nreturn max(best, default=0)", _one_list),
    Family("brackets", 3,
           "Return whether the brackets of `s`, which are all `(` or `)`, are balanced and never "
           "nested deeper than <a>, or `s` has exactly <b> characters.",
           S, "bool", {"a": (1, 5), "b": (1, 15)},
           "depth, fine = 0, True\nfor c in s:\n    depth += 1 if c == '(' else -1\n"
           "    fine = fine and 0 <= depth <= <a>\nreturn (fine and depth == 0) or len(s) == <b>",
           _brackets),
    Family("expression", 3,
           "`s` holds whole numbers and the signs +, - and *, separated by single spaces. Here + "
           "and - bind more strongly than *, and equal strength goes from left to right. Return "
           "its value times <a>, modulo <b>.",
           S, "int", {"a": (1, 20), "b": (50, 999)},
           "total = 1\nfor part in s.split(' * '):\n    words = part.split(' ')\n"
           "    value = int(words[0])\n    for sign, word in zip(words[1::2], words[2::2]):\n"
           "        value += int(word) if sign == '+' else -int(word)\n    total *= value\n"
           "return total * <a> % <b>", _expression),
    Family("grid paths", 3,
           "A token on a square grid starts at (0, 0) and moves from (x, y) to (x+1, y) or "
           "(x, y+1). It may not stand on a square where <a> * x + y is <b> or <b> + 7. Return the "
           "number of ways to (n, n), modulo 10007.",
           N, "int", {"a": (2, 9), "b": (1, 30)},
           "ways = {(0, 0): 1}\nfor x in range(n + 1):\n    for y in range(n + 1):\n"
           "        if x or y:\n"
           "            free = <a> * x + y not in (<b>, <b> + 7)\n"
           "            ways[x, y] = (ways.get((x - 1, y), 0) + ways.get((x, y - 1), 0)) * free\n"
           "return ways[n, n] % 10007", _one_int(0, 12)),
    Family("josephus", 3,
           "The people 1 to n stand in a circle. Starting with person 1, they count to <a>; who "
           "says <a> leaves, and the next one counts from 1 again, until one is left. Return the "
           "number of that person times <b>.",
           N, "int", {"a": (2, 20), "b": (1, 20)},
           "last = 0\nfor size in range(2, n + 1):\n    last = (last + <a>) % size\n"
           "return (last + 1) * <b>", _one_int(1, 60)),
    Family("knapsack", 3,
           "`xs` are the weights of objects, each there once. Return the largest total weight of "
           "some of them that is at most <a> and is not divisible by <b>, or 0 if there is none.",
           XS, "int", {"a": (10, 60), "b": (2, 9)},
           "sums = {0}\nfor x in xs:\n    sums |= {s + x for s in sums if s + x <= <a>}\n"
           "return max((s for s in sums if s % <b>), default=0)", _naturals),
    Family("counter machine", 3,
           "A machine starts with the value <a>. For each character of `s`: a adds <b>, b doubles "
           "the value, c subtracts 1, d replaces it by its remainder modulo 97, and any other "
           "does nothing. Return the final value.",
           S, "int", {"a": (0, 30), "b": (1, 30)},
           "value = <a>\nfor c in s:\n    if c == 'a':\n        value += <b>\n"
           "    elif c == 'b':\n        value *= 2\n    elif c == 'c':\n        value -= 1\n"
           "    elif c == 'd':\n        value %= 97\nreturn value",
           lambda rng, values: [_word(rng, "abcde", 15)]),
)  # fmt: skip
