"""Prompts that are drawn, not stored: each a function of (seed, split, index)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

from pyrl.tasks.protocol import LazyPrompts, Prompt, Split, check_split

#: Share of all that can be drawn which belongs to the held-out split.
HELDOUT_SHARE = 0.125
#: Draws for one prompt; (1 - HELDOUT_SHARE) ** 400 < 1e-23.
DRAWS = 400


def side(key: str) -> Split:
    """The split that a content belongs to, whatever the seed: BLAKE2b(key) / 2^64 < HELDOUT_SHARE
    is held out."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return "heldout" if number < HELDOUT_SHARE * 2**64 else "train"


def generated(
    split: Split,
    count: int,
    draw: Callable[[random.Random, int], Prompt],
    *,
    seed: int = 0,
    key: Callable[[Prompt], str] = lambda prompt: prompt.text,
) -> LazyPrompts:
    """`count` prompts: the i-th is the first of `draw(generator(seed, split, i), i)` whose `key`
    is on this side. No key is ever in both splits, under any seeds.

    key: what makes two prompts the same; by default the last message.
    ValueError for count < 1, and from a prompt when none of DRAWS draws is on this side: then there
    is too little to draw from.
    """
    check_split(split)
    if count < 1:
        raise ValueError(f"{split} = {count}: expected at least 1 prompt")

    def make(index: int) -> Prompt:
        rng = random.Random(f"{seed} {split} {index}")
        for _ in range(DRAWS):
            prompt = draw(rng, index)
            if side(key(prompt)) == split:
                return prompt
        raise ValueError(
            f"{split} prompt {index}: none of {DRAWS} draws belongs to this split; "
            "there are too few different prompts"
        )

    return LazyPrompts(count, make)
