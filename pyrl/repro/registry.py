"""Every miniature by name; modules are imported when they are run."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable

from pyrl.repro.claim import Result

#: Takes the number of seeds and whether to be quick: sizes at which nothing is shown but that the
#: code runs.
Run = Callable[[int, bool], Result]


@dataclasses.dataclass(frozen=True)
class Miniature:
    """Where a miniature is, what it shows in a line, and its usual number of seeds."""

    where: str
    summary: str
    seeds: int
    in_all: bool = True
    """False: longer than a miniature; run by its own name only."""

    def load(self) -> Run:
        """The function that `where`, "module:function", names."""
        module, _, name = self.where.partition(":")
        return getattr(importlib.import_module(module), name)


MINIATURES: dict[str, Miniature] = {
    "filter": Miniature(
        "pyrl.repro.minimalist:filter_test",
        "what removing all-wrong and all-correct groups does where most prompts are unsolvable",
        seeds=8,
    ),
    "entropy": Miniature(
        "pyrl.repro.minimalist:entropy_test",
        "how fast RAFT++, GRPO and Reinforce-Rej use up entropy",
        seeds=6,
    ),
    "gvm": Miniature(
        "pyrl.repro.gvm:tabular",
        "exact gradient variance under GVM's sampling budgets, tabular policies",
        seeds=40,
    ),
    "gvm-transformer": Miniature(
        "pyrl.repro.gvm_transformer:transformer",
        "the same of a frozen, warm-started transformer",
        seeds=10,
    ),
    "gvm-online": Miniature(
        "pyrl.repro.gvm_online:online",
        "accuracy against samples: uniform, GVM with its pilots counted, and ours without a pilot",
        seeds=10,
    ),
    "kl-reset": Miniature(
        "pyrl.repro.kl_reset:kl_reset",
        "a fixed reference is a ceiling with a closed form; resets of the reference lift it",
        seeds=6,
    ),
    "dynamic-sampling": Miniature(
        "pyrl.repro.dynamic_sampling:dynamic_sampling",
        "share of samples with a gradient, with and without refilling, and what it costs",
        seeds=6,
    ),
    "temporal-clue": Miniature(
        "pyrl.repro.temporal_clue:temporal_clue",
        "held-out accuracy on small puzzles, learned from 16 of them or from many",
        seeds=4,
    ),
    "smollm2": Miniature(
        "pyrl.repro.smollm2:compare",
        "six algorithms with SmolLM2-135M, held-out reward against samples and seconds",
        seeds=2,
        in_all=False,
    ),
}


def find(name: str) -> list[str]:
    """The miniatures a command line means; ValueError with the nearest name."""
    if name == "all":
        return [key for key, miniature in MINIATURES.items() if miniature.in_all]
    if name not in MINIATURES:
        close = difflib.get_close_matches(name, [*MINIATURES, "all"], n=1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"no miniature {name!r}{guess}; expected one of {', '.join(MINIATURES)}, or all"
        )
    return [name]
