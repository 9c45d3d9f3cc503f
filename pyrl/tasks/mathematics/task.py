"""Mathematics with a final answer that can be checked."""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pyrl.tasks.extract import last_boxed
from pyrl.tasks.mathematics import problems, symbolic
from pyrl.tasks.mathematics.compare import canonical, same
from pyrl.tasks.mathematics.final import final_answer
from pyrl.tasks.mathematics.notation import spaceless, squeeze
from pyrl.tasks.protocol import Prompt
from pyrl.tasks.reading import ReadingTask
from pyrl.tasks.rows import Row
from pyrl.tasks.rows import field as row_field

#: Where the question and the answer are, unless told otherwise; the first that a row has.
PROMPT_FIELDS = ("problem", "question", "prompt", "query", "instruction")
ANSWER_FIELDS = (
    "answer", "final_answer", "expected_answer", "ground_truth", "reward_model.ground_truth",
    "target", "solution",
)  # fmt: skip
#: Holds a worked solution: without "####" or a box it has no answer, as a proof has none.
WORKED = "solution"
#: Of a question, as much is searched for a copied answer.
SEARCHED = 20_000


@dataclass(eq=False, kw_only=True)
class Mathematics(ReadingTask):
    r"""reward = 1 if the completion's final answer (`final.final_answer`) is the reference
    (`compare.same`), else 0.

    Without `data`: drawn problems of three kinds, whose answers are numbers, pairs and sets of
    numbers. With data, the reference is what follows "####" (as GSM8K has it), else the last
    `\boxed{…}` (as MATH has it), else the field as it is; a list is a list of right answers.
    """

    name: ClassVar[str] = "mathematics"
    own_suffix: ClassVar[str] = r"Put the final answer in \boxed{}."

    kinds: Sequence[str] = tuple(problems.KINDS)
    """What is drawn: some of arithmetic, algebra, number_theory. Several are domains."""
    level: int = 1
    """How hard drawn problems are: 1 (one-digit sums) to 3."""
    prompt_field: str | None = None
    """The question's field, dotted where nested; None: the usual names. A list of messages is
    taken as it is, without suffix and system message."""
    answer_field: str | None = None
    """The answer's field; None: the usual names."""
    strict: bool = False
    r"""Only a `\boxed{}` is an answer."""
    evaluated: bool = True
    """A reference that is a number takes only numbers written out, not "2+3" (see `same`)."""
    verifier: Literal["symbolic", "string"] | None = None
    """"symbolic": what is neither number, list nor word is decided by math-verify, in a process
    that can be killed; "string": such answers must be spelled as the reference, up to
    `notation.squeeze`. None: symbolic with data, string without (drawn answers are numbers)."""
    trusted: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in problems.KINDS:
                raise ValueError(f"kinds: unknown {kind!r}; expected some of {[*problems.KINDS]}")
        if not self.kinds:
            raise ValueError(f"kinds={self.kinds!r}: expected some of {[*problems.KINDS]}")
        if self.level not in (1, 2, 3):
            raise ValueError(f"level={self.level!r}: expected 1, 2 or 3")
        if self.verifier not in ("symbolic", "string", None):
            raise ValueError(f"verifier={self.verifier!r}: expected 'symbolic' or 'string'")
        if self.verifier is None:
            self.verifier = "string" if self.data is None else "symbolic"
        if self.verifier == "symbolic" and importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError(
                'verifier="symbolic" needs the package math-verify: pip install "pyrl[tasks]"'
            )
        self.trusted = self.verifier == "string"  # linear code on a bounded answer
        super().__post_init__()

    def draw(self, id: str, rng: random.Random, index: int) -> Prompt:
        """A problem of the next kind."""
        kind = self.kinds[index % len(self.kinds)]
        template, question, answer = problems.draw(kind, rng, self.level)
        domain = kind if len(self.kinds) > 1 else ""
        return Prompt(id, self.chat(question), {"answer": answer, "template": template}, domain)

    def row_key(self, row: Row, where: str) -> str:
        """The question; an unusable answer is an error here, before the first step."""
        self._answers(row, where)
        question = self._question(row, where)
        return question if isinstance(question, str) else question[-1]["content"]

    def row_prompt(self, id: str, row: Row, where: str) -> Prompt:
        """The row's question and right answers."""
        question = self._question(row, where)
        messages = self.chat(question) if isinstance(question, str) else tuple(question)
        return Prompt(id, messages, {"answer": self._answers(row, where)})

    def score(self, prompt: Prompt, completion: str) -> float:
        """1.0 or 0.0."""
        answer = final_answer(completion, self.strict)
        if answer is None:
            return 0.0
        decide = functools.partial(_decide, prompt.text) if self.verifier == "symbolic" else None
        right = prompt.data["answer"]
        references = [right] if isinstance(right, str) else right
        percent = "%" in prompt.text or "percent" in prompt.text.lower()
        return float(any(same(one, answer, decide, self.evaluated, percent) for one in references))

    def answer(self, prompt: Prompt, completion: str) -> str | None:
        """The final answer in one spelling; `compare.canonical`."""
        answer = final_answer(completion, self.strict)
        expand = symbolic.expanded if self.verifier == "symbolic" else None
        return None if answer is None else canonical(answer, expand)

    def _question(self, row: Row, where: str) -> str | Sequence[Mapping[str, str]]:
        question = row_field(row, self.prompt_field or PROMPT_FIELDS, "question", where)
        if isinstance(question, str) and question.strip():
            return question
        if isinstance(question, list) and question and all("content" in m for m in question):
            return question
        raise ValueError(f"{where}: the question is {question!r}; expected a text or messages")

    def _answers(self, row: Row, where: str) -> str | list[str]:
        found = row_field(row, self.answer_field or ANSWER_FIELDS, "answer", where)
        others = (name for name in ANSWER_FIELDS if name != WORKED)
        if self.answer_field is None and all(row.get(name) is not found for name in others):
            text = str(row.get(WORKED))
            if found is row.get(WORKED) and "####" not in text and last_boxed(text) is None:
                raise ValueError(f"{where}: the solution {text[:80]!r} has no \\boxed answer")
        if isinstance(found, list):
            return [_reference(one, where) for one in found] or _reference("", where)
        return _reference(found, where)


def _reference(found: object, where: str) -> str:
    """The answer in what a row holds."""
    text = str(int(found) if isinstance(found, float) and found.is_integer() else found)
    _, mark, after = text.rpartition("####")
    boxed = None if mark else last_boxed(text)
    answer = (after if mark else text if boxed is None else boxed).strip()
    if not answer:
        raise ValueError(f"{where}: the answer {text[:80]!r} is empty")
    return answer


def _decide(question: str, reference: str, answer: str) -> bool:
    """`symbolic.equal`, unless the answer is a piece of the question: the sum that was to be
    computed equals its value, and is no answer."""
    piece = spaceless(answer)
    if len(piece) > 2 and piece in spaceless(squeeze(question[:SEARCHED])):
        return False
    return symbolic.equal(reference, answer)
