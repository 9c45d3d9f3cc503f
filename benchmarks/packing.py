"""Packing sequences into rows of a token budget: time, rows and tokens against their lower bounds.

    python benchmarks/run.py --only packing

Best fit: lengths of two shapes, the skewed one of sampled completions (log-normal, median 300, up
to the capacity) and short answers (uniform, 16 to 160); every token is computed.

Tree: samples of prompts, each prompt computed once a row. Prompts differ in their first token, so
the least tokens follow from the lengths: a group's completions, and its prompt as often as they
fill rows beside it. Uniform groups of 16 (prompts and completions of 16 to 160 tokens), in order
and shuffled, and groups of 50 like those of Temporal Clue (about 1220 and 1000 tokens).

The least rows are ceil(tokens computed / capacity).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Timing, conditions, known_or_raise, version_of, write_rows

NAME = "packing"
CAPACITY = 4096
TREE_CAPACITY = 16_384


def lengths(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [n], each in 1..CAPACITY."""
    if kind == "uniform 16-160":
        return rng.integers(16, 161, n)
    return np.clip(rng.lognormal(math.log(300), 0.9, n), 1, CAPACITY).astype(np.int64)


@dataclasses.dataclass
class Groups:
    """Sequences of a prompt and a completion each; prompt: int64 [S], the group of each."""

    prompt: np.ndarray
    prompt_lengths: np.ndarray  # int64 [groups]
    completion_lengths: np.ndarray  # int64 [S]

    @property
    def shareable(self) -> np.ndarray:
        return self.prompt_lengths[self.prompt]

    @property
    def offsets(self) -> np.ndarray:
        ends = np.cumsum(self.shareable + self.completion_lengths)
        return np.concatenate([np.zeros(1, np.int64), ends])

    def tokens(self, rng: np.random.Generator) -> np.ndarray:
        """int64 [N]; a prompt opens with a token of its own."""
        offsets, longest = self.offsets, int(self.prompt_lengths.max())
        tokens = rng.integers(0, 50_000, offsets[-1])
        texts = rng.integers(0, 50_000, (self.prompt_lengths.size, longest))
        texts[:, 0] = np.arange(len(texts))
        for at in range(0, self.prompt.size, 50_000):  # bounds the memory of the masks
            part = slice(at, at + 50_000)
            inside = np.arange(longest) < self.shareable[part, None]
            places = offsets[:-1][part, None] + np.arange(longest)
            tokens[places[inside]] = texts[self.prompt[part]][inside]
        return tokens

    def least_tokens(self, capacity: int) -> int:
        """Of any plan: a row that holds some of a group holds its prompt."""
        completions = np.bincount(self.prompt, self.completion_lengths).astype(np.int64)
        rows = -(-completions // (capacity - self.prompt_lengths))
        return int((completions + rows * self.prompt_lengths).sum())


def groups(kind: str, n: int, rng: np.random.Generator) -> Groups:
    """n sequences of uniform groups; the Temporal Clue shape has its own number."""
    if kind == CLUE:
        prompt = np.repeat(np.arange(32), 50)
        prompts, completions = rng.normal(1220, 200, 32), rng.normal(1000, 300, prompt.size)
        return Groups(
            prompt,
            np.clip(prompts, 400, 3000).astype(np.int64),
            np.clip(completions, 50, 3000).astype(np.int64),
        )
    prompt = np.repeat(np.arange(n // 16), 16)
    if "shuffled" in kind:
        rng.shuffle(prompt)
    return Groups(prompt, rng.integers(16, 161, n // 16), rng.integers(16, 161, prompt.size))


CLUE = "32 prompts ~1220 x 50 completions ~1000"
TREES = (
    "prompts 16-160 x 16 completions 16-160",
    "prompts 16-160 x 16 completions 16-160, shuffled",
    CLUE,
)


def planners() -> dict[str, Callable[[np.ndarray, int], np.ndarray]]:
    """Name -> plan(lengths, capacity) -> bin index of each; empty where the package is absent."""
    found: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {}
    try:
        from pyrl import _host

        found["pyrl-native"] = _host.best_fit
    except ImportError:
        pass
    return found


def run(
    out: Path,
    *,
    quick: bool = False,
    everything: bool = False,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of every planner and length distribution, written to `out`/packing.jsonl."""
    n = 10_000 if quick else 1_000_000
    where = conditions("cpu")
    rows = []
    table: dict[str, Callable[..., np.ndarray] | None] = {"pyrl-native": None, **planners()}
    known_or_raise(NAME, names, [*table, TREE])
    for kind in ("uniform 16-160", "log-normal 300"):
        for name, plan in table.items():
            if names and name not in names:
                continue
            row: dict[str, Any] = {
                "op": NAME, "implementation": name, "package": "pyrl",
                "version": version_of("pyrl"), "dtype": "int64", "shape": [n], "kept_share": 1.0,
                "settings": f"{kind}, capacity {CAPACITY}", **where,
            }  # fmt: skip
            rows.append(row)
            if plan is None:
                row.update(
                    status="absent", reason="the compiled host module pyrl._host is not built"
                )
                continue
            say(f"packing: {name}, {n} lengths, {kind}")
            samples, excess = [], []
            for i in range(rounds or 2):
                drawn = lengths(kind, n, np.random.default_rng(i))
                began = time.perf_counter()
                bins = np.asarray(plan(drawn, CAPACITY))
                samples.append((time.perf_counter() - began) * 1e3)
                check(drawn, bins)
                excess.append((int(bins.max()) + 1) / math.ceil(drawn.sum() / CAPACITY))
            timing = Timing.of(samples)
            row.update(
                status="ok", rounds=timing.rounds, ms_p20=round(timing.p20, 2),
                ms_p50=round(timing.p50, 2), ms_p80=round(timing.p80, 2),
                rows_over_bound=round(float(np.median(excess)), 5),
            )  # fmt: skip
    if not names or TREE in names:
        rows += run_trees(n, rounds or 2, where, say)
    write_rows(out / f"{NAME}.jsonl", rows)
    return rows


TREE = "pyrl-native-tree"


def run_trees(
    n: int, rounds: int, where: dict[str, Any], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row of the prefix-tree planner for each shape."""
    from pyrl.packing.prefix_tree import plan_tree

    rows = []
    for kind in TREES:
        row: dict[str, Any] = {
            "op": NAME, "implementation": TREE, "package": "pyrl", "version": version_of("pyrl"),
            "dtype": "int64", "shape": [1600 if kind == CLUE else n], "kept_share": 1.0,
            "settings": f"{kind}, capacity {TREE_CAPACITY}", **where,
        }  # fmt: skip
        rows.append(row)
        if importlib.util.find_spec("pyrl._host") is None:
            row.update(status="absent", reason="the compiled host module pyrl._host is not built")
            continue
        say(f"packing: {TREE}, {row['shape'][0]} sequences, {kind}")
        samples, excess, tokens_excess, unshared = [], [], [], []
        for i in range(rounds):
            rng = np.random.default_rng(i)
            drawn = groups(kind, n, rng)
            arguments = (drawn.tokens(rng), drawn.offsets, drawn.shareable)
            began = time.perf_counter()
            layout = plan_tree(*arguments, TREE_CAPACITY)
            samples.append((time.perf_counter() - began) * 1e3)
            filled = np.bincount(layout.row, weights=layout.end - layout.begin)
            if filled.max() > TREE_CAPACITY or layout.num_rows != filled.size:
                raise AssertionError(f"row {filled.argmax()} holds {filled.max():.0f} tokens")
            excess.append(layout.num_rows / math.ceil(layout.num_tokens / TREE_CAPACITY))
            tokens_excess.append(layout.num_tokens / drawn.least_tokens(TREE_CAPACITY))
            unshared.append(layout.num_tokens / arguments[0].size)
        timing = Timing.of(samples)
        row.update(
            status="ok", rounds=timing.rounds, ms_p20=round(timing.p20, 2),
            ms_p50=round(timing.p50, 2), ms_p80=round(timing.p80, 2),
            rows_over_bound=round(float(np.median(excess)), 5),
            tokens_over_bound=round(float(np.median(tokens_excess)), 5),
            tokens_over_unshared=round(float(np.median(unshared)), 5),
        )  # fmt: skip
    return rows


def check(drawn: np.ndarray, bins: np.ndarray) -> None:
    """Every sequence is in a bin and no bin overflows."""
    if bins.shape != drawn.shape or bins.min() < 0:
        raise AssertionError(f"a plan of shape {bins.shape} for {drawn.shape} lengths")
    filled = np.bincount(bins, weights=drawn)
    if filled.max() > CAPACITY:
        raise AssertionError(f"bin {filled.argmax()} holds {filled.max():.0f} > {CAPACITY} tokens")


COLUMNS = (
    "planner", "lengths", "sequences", "ms (p20–p80)", "rows / lower bound",
    "tokens / lower bound", "tokens / unshared",
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    head = [row["implementation"], row["settings"], f"{row['shape'][0]:,}"]
    if row["status"] != "ok":
        return [*head, f"{row['status']}: {row['reason']}", "", "", ""]
    digits = 0 if row["ms_p50"] >= 10 else 1
    spread = f"{row['ms_p50']:.{digits}f} ({row['ms_p20']:.{digits}f}–{row['ms_p80']:.{digits}f})"
    tokens = [row.get(key) for key in ("tokens_over_bound", "tokens_over_unshared")]
    return [
        *head, spread, f"{row['rows_over_bound']:.4f}",
        *("" if share is None else f"{share:.4f}" for share in tokens),
    ]  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    from table import print_cells

    print_cells("packing", COLUMNS, [cells(row) for row in rows], 3)


def markdown(rows: list[dict[str, Any]]) -> str:
    from table import conditions_text, markdown_cells

    lines = markdown_cells(COLUMNS, [cells(row) for row in rows])
    return "\n".join([*lines, "", conditions_text(rows), ""])
