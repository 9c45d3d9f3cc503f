"""What a recipe may say under [rollout.options]: the keyword arguments of an engine."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

#: Arguments that `make_rollout` and the engines fill in: no options.
TAKEN = ("engine", "policy", "model_path", "model", "shares_weights")


def check_names(
    engine: str,
    options: Iterable[str],
    made_by: Callable[..., Any],
    passes_to: Callable[..., Any] | None = None,
) -> None:
    """ValueError naming the first option that `made_by` has no keyword argument for, and those it
    has. passes_to: what other options are for, and has keyword arguments for them."""
    parameters = inspect.signature(made_by).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    others = inspect.signature(passes_to).parameters if passes_to is not None else {}
    for name in options:
        if name in own or name in others:
            continue
        known = [n for n in own if n not in TAKEN]
        close = difflib.get_close_matches(name, [*known, *others], n=1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        shown = ", ".join(f"{n}={own[n]!r}" for n in known)
        more = f", and those of {passes_to.__qualname__}" if passes_to is not None else ""
        raise ValueError(
            f"rollout engine {engine!r} has no option {name!r}{guess}; its options: {shown}{more}"
        )
