"""Instruction following, checked by code: the task of `make quickstart`."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Literal

from pyrl.tasks.instructions.constraints import CLASHES, KINDS, clause, satisfied
from pyrl.tasks.instructions.text import copies, is_sentence, mentions, words
from pyrl.tasks.instructions.vocabulary import vocabulary
from pyrl.tasks.protocol import LazyPrompts, Prompt, Split, check_split

DEFAULT_CONSTRAINTS = ("keyword", "opener")
FEWEST_WORDS, MOST_WORDS = 8, 14


class Instructions:
    """Prompts: `Write a simple sentence about {topic}, with at most {limit} words. It must …`

    Reward: 0 unless the completion is one finished sentence in its own words
    (`text.is_sentence`, and no five words in a row from the prompt). Otherwise the share of its
    demands that it meets: it mentions the topic, it keeps to the limit, and each constraint holds.
    With `reward="all"`: 1 if it meets them all, else 0.

    Topics, keywords and openers of the held-out split never occur in training prompts. A split
    has one prompt for every (topic, keyword) pair: thousands, none of them stored.
    """

    name = "instructions"
    trusted = True  # pure string checks, linear in the text: nothing to kill

    def __init__(
        self,
        *,
        constraints: Sequence[str] = DEFAULT_CONSTRAINTS,
        per_prompt: int = 1,
        reward: Literal["fraction", "all"] = "fraction",
        system: str | None = None,
        seed: int = 0,
    ) -> None:
        """constraints: kinds to draw from (see `constraints.KINDS`); per_prompt: how many each
        prompt sets; system: the system message, None for the chat template's own default;
        seed: decides the split and every draw.
        """
        for kind in constraints:
            if kind not in KINDS:
                raise ValueError(f"constraints: unknown {kind!r}; expected some of {list(KINDS)}")
        if reward not in ("fraction", "all"):
            raise ValueError(f"reward={reward!r}: expected 'fraction' or 'all'")
        self._mixes = [
            mix
            for mix in itertools.combinations(dict.fromkeys(constraints), per_prompt)
            if not any(frozenset(pair) in CLASHES for pair in itertools.combinations(mix, 2))
        ]
        if not self._mixes:
            raise ValueError(
                f"constraints={list(constraints)}, per_prompt={per_prompt}: "
                "no such combination can be made"
            )
        self.reward, self.system, self.seed = reward, system, seed

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """One prompt for every (topic, keyword) pair of the split, in a scattered order."""
        check_split(split)
        lexicon = vocabulary(split, self.seed)
        pairs = len(lexicon.topics) * len(lexicon.keywords)
        stride = _coprime(round(pairs * 0.618), pairs)  # golden section: neighbours far apart

        def make(index: int) -> Prompt:
            topic_index, keyword_index = divmod(index * stride % pairs, len(lexicon.keywords))
            topic, keyword = lexicon.topics[topic_index], lexicon.keywords[keyword_index]
            rng = random.Random(f"{self.seed} {split} {index}")
            constraints = [
                {"kind": kind, **KINDS[kind].draw(rng, lexicon, keyword)}
                for kind in rng.choice(self._mixes)
            ]
            limit = rng.randint(FEWEST_WORDS, MOST_WORDS)
            text = (
                f"Write a simple sentence about {topic}, with at most {limit} words. "
                f"It must {' and '.join(clause(c) for c in constraints)}."
            )
            user = {"role": "user", "content": text}
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            return Prompt(
                f"{split}-{index}",
                (*system, user),
                {"topic": topic, "limit": limit, "constraints": constraints},
            )

        return LazyPrompts(pairs, make)

    def score(self, prompt: Prompt, completion: str) -> float:
        """The reward in [0, 1]; see the class."""
        if not is_sentence(completion) or copies(completion, prompt.text):
            return 0.0
        kept = [
            mentions(completion, prompt.data["topic"]),
            len(words(completion)) <= prompt.data["limit"],
        ]
        kept += [satisfied(c, completion) for c in prompt.data["constraints"]]
        return float(all(kept)) if self.reward == "all" else sum(kept) / len(kept)


def _coprime(start: int, n: int) -> int:
    return next(k for k in itertools.count(max(start, 1)) if math.gcd(k, n) == 1)
