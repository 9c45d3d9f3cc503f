"""How an answer sheet is read and scored: lines `A. answer` or `A) answer`, one a question."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pyrl.tasks.extract import after_thinking

#: An answer is a name of the puzzle; what is longer is not one.
LONGEST_ANSWER = 80
#: What may stand around a letter or an answer: emphasis, code, quotes, brackets, list marks.
_AROUND = " \t*_`\"'“”‘’()[]{}<>«»"
_REMARK = re.compile(r"[,;(]")
_LINE = re.compile(
    rf"^[{re.escape(_AROUND)}#>|•–-]*([A-Za-z])[{re.escape(_AROUND)}]*[.)](.*)$", re.MULTILINE
)
_BOXED = re.compile(r"\\boxed *\{(?:\\text[a-z]* *\{)?([^{}]*)\}")
_TIME = re.compile(r"([0-9]{1,2}:[0-9]{2}) ?([ap])\.? ?m")


def read_sheet(completion: str) -> dict[str, str]:
    """letter → the answer of its last line `A. answer` or `A) answer`, as `plain` has it; of a line
    with `\\boxed{answer}`, what the last box holds. Thoughts are not read.

    Linear in the text's length. A line longer than any answer can be answers nothing: "".
    """
    found: dict[str, str] = {}
    for match in _LINE.finditer(after_thinking(completion)):
        boxed = _BOXED.findall(match[2])
        found[match[1].upper()] = plain(boxed[-1] if boxed else match[2])
    return found


def plain(answer: str) -> str:
    """One answer as answers are compared: lower case, single spaces, nothing around it (emphasis,
    code marks, quotes, brackets, a full stop), without a remark after a comma, a semicolon or in
    brackets, and without a "the" before it; "11:30pm" and "11:30 p.m." are "11:30 pm"."""
    text = answer.lstrip(_AROUND)
    head = _REMARK.split(text, maxsplit=1)[0].rstrip(_AROUND)
    if len(head) > 2 * LONGEST_ANSWER:
        return ""
    words = " ".join(head.replace("’", "'").lower().split())
    bare = words.strip(_AROUND + ".:!").removeprefix("the ").lstrip(_AROUND)
    time = _TIME.fullmatch(bare)
    return f"{time[1]} {time[2]}m" if time else bare[:LONGEST_ANSWER]


def score_sheet(answers: Mapping[str, str], completion: str, *, legacy: bool = False) -> float:
    """(questions answered right) / (questions), in [0, 1].

    answers: letter → right answer. The last answer of a letter counts, in any case.
    legacy: as the public scorer has it: `A. answer` anywhere in the whole completion, where an
    answer is made of letters, spaces and `. : -` only, so that one with a digit, as every time has,
    never scores. A perfect sheet then gets about .926 on average over the published puzzles.

    ValueError without answers, or for a letter that is not one of A to Z.
    """
    check_answers(answers)
    if legacy:
        right = sum(_public(letter, completion) == a.lower() for letter, a in answers.items())
    else:
        sheet = read_sheet(completion)
        right = sum(sheet.get(letter) == plain(answer) for letter, answer in answers.items())
    return right / len(answers)


def perfect_sheet(answers: Mapping[str, str]) -> str:
    """The sheet that scores 1."""
    return "\n".join(f"{letter}. {answer}" for letter, answer in answers.items())


def check_answers(answers: Mapping[str, str]) -> None:
    """Raises ValueError unless there is an answer, each of a letter A to Z and readable."""
    if not answers:
        raise ValueError("answers={}: expected at least one")
    for letter, answer in answers.items():
        if not isinstance(letter, str) or not re.fullmatch("[A-Z]", letter):
            raise ValueError(f"answers: {letter!r} is no letter from A to Z")
        if not isinstance(answer, str) or not 0 < len(plain(answer)) < LONGEST_ANSWER:
            raise ValueError(f"answers[{letter!r}]={answer!r}: expected a short text")


def _public(letter: str, completion: str) -> str | None:
    found = None
    # One scan a letter: "A. x B. y" is an answer of A and, apart from that, one of B.
    for match in re.finditer(letter + r"\. ([ .:A-Za-z-]+)", completion):
        found = match[1]
    return None if found is None else found.strip().lower()
