"""What a step draws: prompts with their numbers of samples, cut into steps and into groups."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

#: (domain, position in that domain's stream of prompts)
Place = tuple[str, int]
PromptWeight = Literal["none", "inverse_np", "inverse_accepted"]
PROMPT_WEIGHTS = ("none", "inverse_np", "inverse_accepted")


@dataclasses.dataclass(frozen=True)
class Draw:
    """One group of completions to sample."""

    place: Place
    count: int
    """Completions, at least 1."""
    weight: float = 1.0
    """Factor of the group's advantages."""
    group: int = 0
    """Tells several groups of one prompt apart."""


class Share(NamedTuple):
    """What one prompt gets."""

    place: Place
    samples: int
    rate: float | None
    """p > 0 for "inverse_np"; None = not known."""


def cut_into_steps(shares: Sequence[Share], steps: int) -> list[list[Share]]:
    """The prompts with samples, in order, in `steps` parts, cut at the prompt's end that is nearest
    to k N / steps samples. Where several cuts want the same end, the nearest of them has it and the
    others split a prompt, so that no part is empty (N >= steps)."""
    shares = [share for share in shares if share.samples]
    ends = [0, *itertools.accumulate(share.samples for share in shares)]
    even = [ends[-1] * k // steps for k in range(steps + 1)]
    nearest = []
    for cut in even:
        i = bisect.bisect_left(ends, cut)
        nearest.append(min(ends[max(0, i - 1) : i + 1], key=lambda end: abs(end - cut)))
    closest: dict[int, int] = {}
    for cut, end in zip(even, nearest, strict=True):
        if end not in closest or abs(cut - end) < abs(closest[end] - end):
            closest[end] = cut
    cuts = [end if closest[end] == cut else cut for cut, end in zip(even, nearest, strict=True)]
    parts = []
    for begin, end in itertools.pairwise(cuts):
        first = bisect.bisect_right(ends, begin) - 1
        last = bisect.bisect_left(ends, end) if end > begin else first
        parts.append(
            [
                shares[i]._replace(samples=min(end, ends[i + 1]) - max(begin, ends[i]))
                for i in range(first, last)
            ]
        )
    return parts


def draws_of(shares: Sequence[Share], weight: PromptWeight, size: int) -> list[Draw]:
    """The draws of one step."""
    raw = [
        1 / (share.samples * share.rate) if weight == "inverse_np" and share.rate else None
        for share in shares
    ]
    known = [r for r in raw if r is not None]
    mean = sum(known) / max(1, len(known))
    draws = []
    for share, r in zip(shares, raw, strict=True):
        groups = max(1, share.samples // size) if size else 1
        rest = share.samples - (groups - 1) * size
        for group in range(groups):
            count = rest if group == groups - 1 else size
            draws.append(Draw(share.place, count, 1.0 if r is None else r / mean, group))
    return draws


def step_metrics(draws: Sequence[Draw]) -> dict[str, float]:
    """How many prompts and samples a step has."""
    return {
        "budget_prompts": float(len({draw.place for draw in draws})),
        "budget_samples": float(sum(draw.count for draw in draws)),
    }


def accepted_weights(draws: Sequence[Draw], accepted: Sequence[int]) -> list[float]:
    """w = 1 / |D_i| over its mean, [len(draws)]: each prompt's accepted samples count as one.

    accepted: of the draws' samples; |D_i| adds up the draws of one prompt. A prompt without any has
    weight 0 and no part in the mean, which makes the others' 1.
    """
    total: dict[Place, int] = {}
    for draw, count in zip(draws, accepted, strict=True):
        total[draw.place] = total.get(draw.place, 0) + count
    raw = {place: 1 / count for place, count in total.items() if count}
    mean = sum(raw.values()) / max(1, len(raw))
    return [raw[draw.place] / mean if draw.place in raw else 0.0 for draw in draws]


def check_whole(**values: tuple[Any, int]) -> None:
    """name=(value, least): ValueError for the first value that is no integer >= least."""
    for name, (value, least) in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: expected a whole number >= {least}")


def check_weight(name: str) -> None:
    """ValueError for an unknown `prompt_weight`."""
    if name not in PROMPT_WEIGHTS:
        raise ValueError(f"prompt_weight={name!r}: expected one of {', '.join(PROMPT_WEIGHTS)}")


def check_kind(state: Mapping[str, Any], kind: str) -> None:
    """ValueError for the state of another kind of budget."""
    if state.get("kind") != kind:
        raise ValueError(f"the state is of a budget {state.get('kind')!r}, not {kind!r}")
