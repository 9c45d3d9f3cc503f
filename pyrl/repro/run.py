"""Runs miniatures, keeps their results and writes the document."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pyrl.repro import document
from pyrl.repro.claim import Result
from pyrl.repro.registry import MINIATURES, find
from pyrl.trainer.tracking import provenance

#: Of a quick run: enough for an interval.
QUICK_SEEDS = 2


def reproduce(
    names: Sequence[str],
    *,
    seeds: int | None = None,
    quick: bool = False,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Runs the named miniatures one after another; with `out`, keeps each result as soon as it is
    there and writes the document from every result kept. No names: the document alone.

    seeds: None = each miniature's own number. ValueError: an unknown name, seeds below 1, nothing
    to do.
    """
    wanted = list(dict.fromkeys(name for given in names for name in find(given)))
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds={seeds}: expected a whole number >= 1")
    if not wanted and out is None:
        raise ValueError("no miniature named, and no folder to write the document in")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # not after the work
    torch.set_num_threads(1)  # small tensors, and one order of summation on every machine
    results = []
    for name in wanted:
        miniature = MINIATURES[name]
        count = seeds or (QUICK_SEEDS if quick else miniature.seeds)
        source = provenance()  # before the run: the tree may change during it
        began = time.perf_counter()
        result = miniature.load()(count, quick)
        seconds = round(time.perf_counter() - began, 1)
        ours = {"seconds": seconds, "seeds": count, "quick": quick, **source}
        # What a miniature says itself is of the runs that it read, not of this process.
        result.conditions = ours | result.conditions
        results.append(result)
        say(document.console_text(result))
        if out is not None:
            document.save(result, out)
    if out is not None:
        say(str(document.write(out)))
    return results
