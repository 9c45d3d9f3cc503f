"""Instructions that code can verify, on top of a request to write something."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pyrl.tasks import generated as drawn
from pyrl.tasks.extract import after_thinking
from pyrl.tasks.ifeval import vocabulary as v
from pyrl.tasks.ifeval.google import Unsupported, read_row
from pyrl.tasks.ifeval.kind import LEVELS
from pyrl.tasks.ifeval.kinds import CLASHES, KINDS
from pyrl.tasks.ifeval.text import is_answer, words
from pyrl.tasks.protocol import Prompt, Split, check_split, split_prompts

REWARDS = ("fraction", "all")


class IFEval:
    """A request ("Write a letter to a friend about old maps in a formal tone") with instructions
    that code can verify, in the manner of IFEval (arXiv 2311.07911); kinds and wording are our own.

    reward = (instructions kept) / (instructions), of the text after the last `</think>`;
    reward="all": 1 if all are kept, else 0. Either is 0 unless the text is an answer at all
    (`text.is_answer`): "no commas" must not pay for an empty text, a heap of words, or a copy of
    the prompt. Generated prompts need at least 15 words (JSON: 6), half of them distinct, that name
    the topic (not in another language), and but for JSON and other languages are English prose as
    its function words tell it, which pseudo-words between enough of these pass too; where JSON or
    another language is asked for, nothing else is an answer. Rows of `data` only need some words
    that are not the prompt's.

    Prompts are drawn one by one: the i-th is a function of (seed, split, i). No request of one
    split is in the other, and clashing instructions are never together (`kinds.CLASHES`).
    """

    name = "ifeval"
    trusted = True  # linear in the text, and bounded: longer texts than MOST_CHARACTERS get 0

    def __init__(
        self,
        *,
        kinds: Sequence[str] | None = None,
        level: int | Sequence[int] = (1, 2, 3),
        reward: Literal["fraction", "all"] = "fraction",
        train: int = 8192,
        heldout: int = 256,
        seed: int = 0,
        system: str | None = None,
        data: str | None = None,
    ) -> None:
        """kinds: instructions to draw from (see `kinds.KINDS`; default: all).
        level: 1 to 3, or several, of which each prompt draws one: so many instructions (fewer only
        where the kinds clash), the harder the higher.
        reward: "fraction" or "all". train, heldout: numbers of prompts; with data: at most so many,
        and at least one of each. seed: decides every draw. system: a system message.
        data: rows in the form of Google's IFEval, a file or a data set as `pyrl.tasks.rows` reads
        them, instead of generated prompts. Rows with an instruction, or a language, that has no
        check here are left out. kinds and level do not apply to them.
        """
        self._kinds = _known(kinds)
        self._levels = _level(level)
        if reward not in REWARDS:
            raise ValueError(f"reward={reward!r}: expected 'fraction' or 'all'")
        for name, count in (("train", train), ("heldout", heldout)):
            if count < 1:
                raise ValueError(f"{name}={count}: expected at least 1")
        self._all = reward == "all"
        self._sizes = {"train": train, "heldout": heldout}
        self._seed, self._system, self._data = seed, system, data
        self._rows: list[Prompt] = []  # of `data`, once it is read

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows: scoring reads the prompt's own data."""
        return {**self.__dict__, "_rows": []}

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The prompts of a split: drawn one by one, or the rows of `data`."""
        check_split(split)
        if self._data is None:
            return drawn.generated(
                split,
                self._sizes[split],
                lambda rng, index: self._draw(rng, f"{split}-{index}"),
                seed=self._seed,
                key=lambda prompt: prompt.data["request"],
            )
        if not self._rows:
            self._rows = self._read(self._data)
        held = self._sizes["heldout"]
        chosen = split_prompts(self._rows, split, heldout=held, seed=self._seed)
        return chosen[: self._sizes[split]] if split == "train" else chosen

    def score(self, prompt: Prompt, completion: str) -> float:
        """The share of the instructions that the completion keeps, or all or nothing."""
        text = after_thinking(completion).strip()
        data = prompt.data
        if not _answers(prompt, text):
            return 0.0
        instructions = data["instructions"]
        kept = sum(KINDS[i["kind"]].check(i, text) for i in instructions)
        return float(kept == len(instructions)) if self._all else kept / len(instructions)

    def _draw(self, rng: random.Random, id: str) -> Prompt:
        level = rng.choice(self._levels)
        topic = rng.choice(list(v.TOPICS))
        kinds: list[str] = []
        for kind in rng.sample(self._kinds, len(self._kinds)):
            if len(kinds) < level and not any(frozenset((kind, k)) in CLASHES for k in kinds):
                kinds.append(kind)
        if "replies" in kinds:
            request = rng.choice(v.QUESTIONS).format(topic=topic)
        else:
            request = f"{rng.choice(v.REQUESTS).format(topic=topic)} {rng.choice(v.MANNERS)}."
        instructions = [{"kind": k, **KINDS[k].draw(rng, level, request)} for k in kinds]
        _separate(rng, instructions, request)
        orders = [KINDS[i["kind"]].wording(i) for i in instructions]
        return Prompt(
            id,
            self._messages(" ".join([request, *orders])),
            {
                "request": request,
                "instructions": instructions,
                "least": min(KINDS[k].least for k in kinds),
                "topic": "" if "language" in kinds else v.TOPICS[topic],
                "prose": all(KINDS[k].prose for k in kinds),
            },
        )

    def _messages(self, text: str) -> tuple[dict[str, str], ...]:
        system = () if self._system is None else ({"role": "system", "content": self._system},)
        return (*system, {"role": "user", "content": text})

    def _read(self, data: str) -> list[Prompt]:
        from pyrl.tasks.rows import load_rows

        found: list[Prompt] = []
        reason = "there are no rows"
        for i, row in enumerate(load_rows(data)):
            try:
                text, instructions = read_row(row, f"{data} row {i}")
            except Unsupported as error:
                reason = str(error)
                continue
            found.append(Prompt(f"row-{i}", self._messages(text), {"instructions": instructions}))
        if not found:
            raise ValueError(f"data={data!r}: no row can be checked; the last: {reason}")
        return found


def _answers(prompt: Prompt, text: str) -> bool:
    """`text.is_answer`, of what follows a repeated sentence; and the topic is named."""
    data: Mapping[str, Any] = prompt.data
    generated = "least" in data
    for instruction in data["instructions"]:
        kind = KINDS[instruction["kind"]]
        if generated and not kind.prose and not kind.check(instruction, text):
            return False
        if instruction["kind"] == "repeat":
            text = text.removeprefix(instruction["text"])
        elif instruction["kind"] == "replies" and not generated:
            return bool(text)  # the whole answer is one of the given replies
    topic = data.get("topic", "")
    if not is_answer(text, prompt.text, least=data.get("least", 1), prose=data.get("prose", False)):
        return False
    return not topic or any(word.startswith(topic) for word in words(text))


def _separate(rng: random.Random, instructions: list[dict[str, Any]], request: str) -> None:
    """Draws the words to use again until no instruction asks for a word twice."""
    asked = [i for i in instructions if i["kind"] in ("include", "frequency")]
    if len(asked) == 2:
        frequent = next(i for i in asked if i["kind"] == "frequency")
        included = next(i for i in asked if i["kind"] == "include")["words"]
        while frequent["word"] in included:
            frequent["word"] = rng.choice(v.KEYWORDS)


def _known(kinds: Sequence[str] | None) -> list[str]:
    if kinds is None:
        return list(KINDS)
    if isinstance(kinds, str) or not kinds:
        raise ValueError(f"kinds={kinds!r}: expected a list of some of {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds: unknown {kind!r}; expected some of {', '.join(KINDS)}")
    return list(dict.fromkeys(kinds))


def _level(level: int | Sequence[int]) -> list[int]:
    levels = [level] if isinstance(level, int) else list(level)
    if not levels or any(isinstance(x, bool) or x not in LEVELS for x in levels):
        raise ValueError(f"level={level!r}: expected 1, 2 or 3, or a list of them")
    return levels
