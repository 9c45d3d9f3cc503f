"""Where randomness and prompts come from. Everything here is a function of (seed, step, purpose),
so a resumed run needs no generator state: only the step and the position in the data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
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


class Prompts:
    """The training prompts of one task, or of the domains of a mixture.

    A place (domain, position) names a prompt for good: position p of that domain's own endless
    sequence. How far each domain has been drawn is the caller's to keep.
    """

    def __init__(self, streams: Mapping[str, PromptStream], seed: int) -> None:
        self._streams = dict(streams)
        self._offset = derive_seed(seed, 0, "domains") / 2**63

    def __len__(self) -> int:
        return sum(map(len, self._streams.values()))

    def take(
        self, drawn: dict[str, int], count: int, weights: Mapping[str, float]
    ) -> list[tuple[str, int]]:
        """The next `count` places; `drawn` [prompts drawn from each domain] goes on.

        Draw k is from the domain whose share of [0, 1) holds frac(offset + k golden ratio): after
        any number of draws every domain has its share to within a few prompts, and the weights may
        change at any time.
        """
        domains = [d for d in self._streams if weights.get(d, 1.0) > 0]
        total = sum(weights.get(d, 1.0) for d in domains)
        places = []
        for _ in range(count):
            point = (self._offset + sum(drawn.values()) * (math.sqrt(5) - 1) / 2) % 1.0 * total
            for domain in domains:
                point -= weights.get(domain, 1.0)
                if point < 0:
                    break
            places.append((domain, drawn.get(domain, 0)))
            drawn[domain] = drawn.get(domain, 0) + 1
        return places

    def at(self, place: tuple[str, int]) -> EncodedPrompt:
        """The prompt of a place."""
        domain, position = place
        (prompt,) = self._streams[domain].take(position, 1)
        return prompt

    def key(self, place: tuple[str, int]) -> tuple[str, int]:
        """The same for all places of one prompt: (domain, index in its data)."""
        domain, position = place
        return domain, self._streams[domain].index(position)


class PromptStream:
    """The endless sequence of a data set's prompts: one seeded permutation after another.

    `room`: tokens a prompt may have at most. ValueError for an empty data set, here, and for a
    longer prompt, when it is drawn (`check` draws ahead).
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: Any,
        room: int,
        seed: int,
        domain: str = "",
    ) -> None:
        if len(prompts) == 0:
            raise ValueError("the task has no prompts in this split: nothing to sample from")
        self._purpose = f"data order {domain}".strip()
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

    def index(self, position: int) -> int:
        """Where in the data the prompt of a position is."""
        epoch, place = divmod(position, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self._seed, epoch, self._purpose, len(self)))
        return int(self._order[1][place])

    def _at(self, position: int) -> EncodedPrompt:
        return self._encoded(self.index(position))

    def _encoded(self, index: int) -> EncodedPrompt:
        prompt = self._prompts[index]
        tokens = encode(self._tokenizer, prompt)
        if len(tokens) > self._room:
            raise ValueError(
                f"prompt {prompt.id!r} has {len(tokens)} tokens; the model's context less "
                f"rollout.max_new_tokens leaves room for {self._room}"
            )
        return EncodedPrompt(prompt, tokens)
