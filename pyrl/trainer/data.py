"""Where randomness and prompts come from. Everything here is a function of (seed, step, purpose),
so a resumed run needs no generator state: only the step and the position in the data.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyrl.tasks import Prompt


def derive_seed(seed: int, step: int, purpose: str) -> int:
    """The first 63 bits of BLAKE2b("seed step purpose"): independent for every triple."""
    digest = hashlib.blake2b(f"{seed} {step} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(seed: int, step: int, purpose: str, n: int) -> np.ndarray:
    """A permutation of range(n), int64 [n], drawn from `derive_seed`."""
    return np.random.default_rng(derive_seed(seed, step, purpose)).permutation(n)


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and its token ids."""

    prompt: Prompt
    tokens: list[int]


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids: a text as it is, messages through the chat template up to the assistant's turn.

    ValueError naming the prompt when it has no tokens or the tokenizer has no chat template.
    """
    if isinstance(prompt.messages, str):
        tokens = tokenizer.encode(prompt.messages)
    elif tokenizer.chat_template is None:
        raise ValueError(f"prompt {prompt.id!r} is a chat, and the tokenizer has no chat template")
    else:
        tokens = tokenizer.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    if len(tokens) == 0:
        raise ValueError(f"prompt {prompt.id!r} has no tokens")
    return [int(token) for token in tokens]


class PromptStream:
    """The endless sequence of a data set's prompts: one seeded permutation after another.

    `room`: tokens a prompt may have at most. ValueError for an empty data set, here, and for a
    longer prompt, when it is drawn (`check` draws ahead).
    """

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any, room: int, seed: int) -> None:
        if len(prompts) == 0:
            raise ValueError("the task has no prompts in this split: nothing to sample from")
        self._prompts, self._tokenizer, self._room, self._seed = prompts, tokenizer, room, seed
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._prompts)

    def take(self, position: int, count: int) -> list[EncodedPrompt]:
        """The prompts at `position` … `position + count - 1` of the sequence."""
        return [self._at(p) for p in range(position, position + count)]

    def first(self, count: int) -> list[EncodedPrompt]:
        """The first prompts in the data set's own order (at most all), for evaluation."""
        return [self._encoded(i) for i in range(min(count, len(self)))]

    def check(self, position: int, count: int) -> None:
        """Draws ahead, so that a prompt which cannot be used stops a run before it starts."""
        for p in range(position, position + min(count, len(self))):
            self._at(p)

    def _at(self, position: int) -> EncodedPrompt:
        epoch, index = divmod(position, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self._seed, epoch, "data order", len(self)))
        return self._encoded(int(self._order[1][index]))

    def _encoded(self, index: int) -> EncodedPrompt:
        prompt = self._prompts[index]
        tokens = encode(self._tokenizer, prompt)
        if len(tokens) > self._room:
            raise ValueError(
                f"prompt {prompt.id!r} has {len(tokens)} tokens; the model's context less "
                f"rollout.max_new_tokens leaves room for {self._room}"
            )
        return EncodedPrompt(prompt, tokens)
