"""Questions of science and technology: multiple choice, numbers with units, short texts."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from pyrl.tasks.mathematics.final import LONGEST, final_answer
from pyrl.tasks.mathematics.notation import leading, squeeze
from pyrl.tasks.protocol import Prompt
from pyrl.tasks.reading import ReadingTask
from pyrl.tasks.rows import Row, field
from pyrl.tasks.stem.choice import LETTERS, chosen
from pyrl.tasks.stem.quantity import read, same_quantity
from pyrl.tasks.stem.questions import SUBJECTS, Question, show

PROMPT_FIELDS = ("question", "Question", "problem", "prompt", "query")
ANSWER_FIELDS = (
    "answer", "answer_index", "answerKey", "correct_answer", "Correct Answer", "label", "cop",
    "target", "answers",
)  # fmt: skip
CHOICE_FIELDS = ("choices", "options", "endings")
#: Data sets that keep the right option and the wrong ones in fields of their own.
WRONG_FIELDS = (
    ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    ("distractor1", "distractor2", "distractor3"),
)
#: Options that speak of others must keep their places.
_ABOUT_OTHERS = re.compile(
    r"(?:all|none|any|both|neither) of (?:the|these)|(?:both|neither) \(?[A-J]\b", re.IGNORECASE
)
_ARTICLES = re.compile(r"\b(?:the|an?)\b")


@dataclass(eq=False, kw_only=True)
class Stem(ReadingTask):
    """reward = 1 if the completion chooses the right option (`choice.chosen`), gives the number
    within its tolerance (`quantity.same_quantity`), or says the text (up to case, punctuation and
    articles) or one of its other spellings; else 0.

    Without `data`: questions drawn from formulas and tables, every other one multiple choice. With
    data, a row with options is multiple choice, one without is a number or a text.
    """

    name: ClassVar[str] = "stem"
    trusted: ClassVar[bool] = True  # linear string checks, and fractions of bounded length
    own_suffix: ClassVar[str] = r"Put the final answer (of options, the letter) in \boxed{}."

    subjects: Sequence[str] = tuple(SUBJECTS)
    """What is drawn: some of physics, chemistry, biology, earth, computing. Several are domains."""
    prompt_field: str | None = None
    """The question's field, dotted where nested; None: the usual names."""
    answer_field: str | None = None
    """The answer's: an index from 0, a letter, a label, the text of an option; without options a
    number, a text or a list of texts. None: the usual names."""
    choice_field: str | None = None
    """The options': a list, a mapping of letters, or lists `text` and `label`. None: the usual
    names, or "Incorrect Answer 1" … 3, or "distractor1" … 3."""
    tolerance: float = 0.01
    """Relative tolerance of numbers, where a row has no field "tolerance"; drawn questions have it
    for numbers with a unit only, and those that are exact conversions (kelvin) have none."""
    shuffle: bool = True
    """Options in an order drawn by `seed`, unless one is about others ("all of the above")."""
    strict: bool = False
    r"""Only a `\boxed{}` is an answer."""

    def __post_init__(self) -> None:
        for subject in self.subjects:
            if subject not in SUBJECTS:
                raise ValueError(f"subjects: unknown {subject!r}; expected some of {[*SUBJECTS]}")
        if not self.subjects:
            raise ValueError(f"subjects={self.subjects!r}: expected some of {[*SUBJECTS]}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance}: expected a number in [0, 1)")
        super().__post_init__()

    def draw(self, id: str, rng: random.Random, index: int) -> Prompt:
        """A question of the next subject, every other one with options."""
        subject = self.subjects[index // 2 % len(self.subjects)]
        template = rng.choice(SUBJECTS[subject])
        made = template(rng)
        options = options_of(made, rng) if index % 2 == 0 else []
        domain = subject if len(self.subjects) > 1 else ""
        known = {"question": made.text, "template": template.__name__}
        if options:
            return self._choice(id, made.text, options, 0, rng, domain, known)
        if isinstance(made.answer, str):
            data: dict[str, Any] = {"texts": [made.answer, *made.spellings]}
        else:
            value = str(Fraction(made.answer))
            # Without a unit it is a count; 1% of 274 K would pay for five different integers.
            limit = self.tolerance if made.unit and not made.exact else 0.0
            data = {"value": value, "unit": made.unit, "tolerance": limit}
        return Prompt(id, self.chat(made.text), known | data, domain)

    def drawn_key(self, prompt: Prompt) -> str:
        """The question, whatever its options."""
        return prompt.data["question"]

    def row_key(self, row: Row, where: str) -> str:
        """The question; an unusable answer is an error here, before the first step."""
        self.row_prompt("x", row, where)
        return self._question(row, where)

    def row_prompt(self, id: str, row: Row, where: str) -> Prompt:
        """The row's question, with its options if it has some."""
        question = self._question(row, where)
        options, labels, right = self._options(row, where)
        if options:
            if len(options) > len(LETTERS):
                raise ValueError(f"{where}: {len(options)} options; at most {len(LETTERS)}")
            if right is None:
                answer = field(row, self.answer_field or ANSWER_FIELDS, "answer", where)
                right = _right(answer, options, labels, where)
            rng = random.Random(f"{self.seed} {question}")
            return self._choice(id, question, options, right, rng, "", {})
        answer = field(row, self.answer_field or ANSWER_FIELDS, "answer", where)
        texts = [str(a) for a in answer] if isinstance(answer, list) else [str(answer)]
        if not texts or not all(_words(t) or squeeze(t[:LONGEST]) for t in texts):
            raise ValueError(f"{where}: the answer {answer!r} is empty")
        data: dict[str, Any] = {"texts": texts}
        number = read(texts[0]) if len(texts) == 1 else None
        if number is not None and (number.unit or not number.rest):
            data = {"value": str(number.number), "unit": number.rest,
                    "tolerance": float(row.get("tolerance") or self.tolerance),
                    "fraction": bool(number.fraction)}  # fmt: skip
        return Prompt(id, self.chat(question), data)

    def score(self, prompt: Prompt, completion: str) -> float:
        """1.0 or 0.0."""
        data = prompt.data
        if "right" in data:
            return float(chosen(completion, data["options"], self.strict) == data["right"])
        answer = final_answer(completion, self.strict, units=True)
        if answer is None:
            return 0.0
        if "value" in data:
            # A reference that is a fraction itself may have both of its numbers in the question.
            text = "" if data.get("fraction") else prompt.text
            known = (data["value"], data["unit"], answer, data["tolerance"], text)
            return float(same_quantity(*known))
        said = _words(answer)
        return float(bool(said) and any(said == _words(text) for text in data["texts"]))

    def answer(self, prompt: Prompt, completion: str) -> str | None:
        """The letter of an option; a number in its unit to six digits; a text without case."""
        if "right" in prompt.data:
            index = chosen(completion, prompt.data["options"], self.strict)
            return None if index is None else LETTERS[index]
        answer = final_answer(completion, self.strict, units=True)
        if answer is None or len(answer) > LONGEST:
            return answer
        number = leading(squeeze(answer)) if "value" in prompt.data else None
        return _words(answer) or answer if number is None else f"{float(number[0]):.6g}{number[1]}"

    def _question(self, row: Row, where: str) -> str:
        question = field(row, self.prompt_field or PROMPT_FIELDS, "question", where)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{where}: the question is {question!r}; expected a text")
        return question

    def _options(self, row: Row, where: str) -> tuple[list[str], list[str], int | None]:
        """The options, their labels, and the right one's index where the fields say it."""
        names = (self.choice_field,) if self.choice_field else CHOICE_FIELDS
        if self.choice_field or any(row.get(name) is not None for name in names):
            found = field(row, names, "options", where)
            labels: list[str] = []
            if isinstance(found, Mapping):
                labels, found = (
                    (found.get("label") or [], found["text"])
                    if isinstance(found.get("text"), list)
                    else map(list, zip(*((k, v) for k, v in found.items() if v), strict=True))
                )
            if not isinstance(found, list) or len(found) < 2:
                raise ValueError(f"{where}: the options are {found!r}; expected two or more")
            return [str(option) for option in found], [str(one) for one in labels], None
        for wrong in WRONG_FIELDS:
            if any(row.get(name) for name in wrong):
                right = field(row, self.answer_field or ANSWER_FIELDS, "answer", where)
                return [str(right), *(str(row[n]) for n in wrong if row.get(n))], [], 0
        return [], [], None

    def _choice(
        self, id: str, question: str, options: list[str], right: int, rng: random.Random,
        domain: str, data: Mapping[str, Any],
    ) -> Prompt:  # fmt: skip
        order = list(range(len(options)))
        if self.shuffle and not any(_ABOUT_OTHERS.search(option) for option in options):
            rng.shuffle(order)
        shown = [options[i] for i in order]
        lines = "".join(f"\n{LETTERS[i]}) {option}" for i, option in enumerate(shown))
        known = {**data, "options": shown, "right": order.index(right)}
        return Prompt(id, self.chat(question + lines), known, domain)


def options_of(question: Question, rng: random.Random) -> list[str]:
    """The answer and up to three wrong ones that read differently, each with the unit."""
    unit = {"": "", "percent": "%"}.get(question.unit, f" {question.unit}")
    answer = show(question.answer)
    wrong = list(dict.fromkeys(show(w) for w in question.wrong))
    if not isinstance(question.answer, str):
        about = Fraction(question.answer)
        wrong = [w for w in wrong if abs(Fraction(w) - about) > abs(about) / 50]
        while len(wrong) < 3:
            near = show(about * Fraction(rng.choice((5, 8, 12, 15, 20)), 10) + rng.randint(1, 9))
            if near not in wrong and abs(Fraction(near) - about) > abs(about) / 50:
                wrong.append(near)
    wrong = [w for w in wrong if w != answer]
    return [answer + unit, *(w + unit for w in rng.sample(wrong, min(3, len(wrong))))]


def _right(answer: Any, options: Sequence[str], labels: Sequence[str], where: str) -> int:
    """The index of the right option: a label, a letter, an option's text, or an index from 0."""
    text = str(answer).strip()
    letter = LETTERS.find(text.strip("().").upper()) if len(text.strip("().")) == 1 else -1
    if not isinstance(answer, int):
        for known in (labels, options):
            if text in known:
                return known.index(text)
    if 0 <= letter < len(options):
        return letter
    if text.isdecimal() and int(text) < len(options):
        return int(text)
    raise ValueError(f"{where}: the answer {answer!r} is none of the {len(options)} options")


def _words(text: str) -> str:
    """A text without case, punctuation, articles and extra spaces."""
    text = unicodedata.normalize("NFKC", squeeze(text)[:LONGEST] if len(text) <= LONGEST else text)
    kept = "".join(c if c.isalnum() or c in "+-" else " " for c in text.casefold())
    return " ".join(_ARTICLES.sub(" ", kept).split())
