"""What a task is: prompts in two disjoint splits, and code that scores a completion."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, overload, runtime_checkable

Split = Literal["train", "heldout"]
SPLITS: tuple[str, ...] = get_args(Split)


@dataclass(frozen=True)
class Prompt:
    """One prompt and what its scoring needs.

    Raises ValueError for an empty id, no messages, or a message without role and content.
    """

    id: str
    """Unique in the task; it names the prompt in samples and error messages."""
    messages: tuple[Mapping[str, str], ...] | str
    """Chat messages (`role`, `content`), or a text that is tokenized as it is."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that `Task.score` reads. It must pickle: scoring may run in another process."""
    domain: str = ""
    """What kind of prompt it is: evaluations have a table a domain ("" = no kind)."""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise ValueError(f"Prompt.id={self.id!r}: expected a non-empty string")
        if not isinstance(self.domain, str):
            raise ValueError(f"prompt {self.id!r}: domain={self.domain!r}: expected a string")
        if isinstance(self.messages, str):
            if not self.messages:
                raise ValueError(f"prompt {self.id!r}: the text is empty")
            return
        object.__setattr__(self, "messages", tuple(self.messages))
        if not self.messages:
            raise ValueError(f"prompt {self.id!r}: there are no messages")
        for i, message in enumerate(self.messages):
            for key in ("role", "content"):
                if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                    raise ValueError(
                        f"prompt {self.id!r}: messages[{i}]={message!r} has no string {key!r}"
                    )

    @property
    def text(self) -> str:
        """What a person would want to read of it: the text, or the last message's."""
        return self.messages if isinstance(self.messages, str) else self.messages[-1]["content"]


def user_prompt(id: str, text: str, **data: Any) -> Prompt:
    """A chat of one user message."""
    return Prompt(id, ({"role": "user", "content": text},), data)


@runtime_checkable
class Task(Protocol):
    """Prompts and their rewards. A class attribute `trusted = True` declares that `score` cannot
    hang or crash, and lets it run inside the training process; see `pyrl.tasks.scoring`.

    A task may also have `answer(prompt, completion) -> str | None`: the completion's final answer
    in a canonical form (equal answers are equal strings), None where it gives none. Evaluations
    then have maj@k and the share of completions with an answer. `NotImplementedError` says that
    this prompt's kind of task has no notion of one. `trusted` covers it too.
    """

    name: str

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The prompts of a split: the same ones on every call, none of them in both splits."""
        ...

    def score(self, prompt: Prompt, completion: str) -> float:
        """The reward of a completion (without special tokens): a number, finite in float32."""
        ...


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")


class LazyPrompts(Sequence[Prompt]):
    """`length` prompts, the i-th made by `make(i)` when it is asked for: nothing is stored."""

    def __init__(self, length: int, make: Callable[[int], Prompt]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._length))]
        position = index + self._length if index < 0 else index
        if not 0 <= position < self._length:
            raise IndexError(f"prompt {index} of {self._length}")
        return self._make(position)


def split_prompts(
    prompts: Sequence[Prompt], split: Split, *, heldout: int, seed: int = 0
) -> list[Prompt]:
    """One side of a seeded split of a list: `heldout` distinct prompts, or all the others.

    Prompts with equal messages always fall on the same side, so a duplicate cannot leak.
    Raises ValueError when the list is empty or holds no more than `heldout` distinct prompts.
    """
    check_split(split)
    if not prompts:
        raise ValueError("the data set is empty: there is nothing to split")
    if heldout < 1:
        raise ValueError(f"heldout={heldout}: expected at least 1")
    distinct = sorted({_content(p) for p in prompts})
    if len(distinct) <= heldout:
        raise ValueError(
            f"heldout={heldout}: the data set has only {len(distinct)} distinct prompts, "
            "and some must be left for training"
        )
    held = set(random.Random(seed).sample(distinct, heldout))
    return [p for p in prompts if (_content(p) in held) == (split == "heldout")]


def _content(prompt: Prompt) -> str:
    """Equal for prompts that read the same to the model."""
    if isinstance(prompt.messages, str):
        return prompt.messages
    return repr([sorted(m.items()) for m in prompt.messages])


def overlap(task: Task, limit: int) -> str | None:
    """The id of a held-out prompt that training also has, looking at `limit` of each at most."""
    train = {_content(p) for p in task.prompts("train")[:limit]}
    for prompt in task.prompts("heldout")[:limit]:
        if _content(prompt) in train:
            return prompt.id
    return None
