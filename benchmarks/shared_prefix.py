"""A policy update with and without shared prefixes: seconds, and the ratio in one run.

    python benchmarks/run.py --only shared_prefix

SmolLM2-135M in bf16 over fp32 masters; 4 prompts x 8 completions, 4096 prompt and completion tokens
in all, of which the prompts are 50 percent (`--all`: 20 and 80 too); rows of 2048 computed tokens.
One call is
what the trainer's update is: pack, forward, clipped loss, backward of every row, AdamW. Rounds
interleave the variants on new random tokens; a ratio is the median over rounds. `tokens` are the
computed ones, `tokens_ratio` what the time would be if it followed them alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import (
    Timing,
    conditions,
    interleave,
    known_or_raise,
    median_ratio,
    version_of,
    write_rows,
)

NAME = "shared_prefix"
PROMPTS, COMPLETIONS, LENGTH, BUDGET = 4, 8, 128, 2048
SHARES = (0.2, 0.5, 0.8)
VARIANTS = ("plain", "shared")


def run(
    out: Path,
    *,
    quick: bool = False,
    everything: bool = False,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of both variants for every prompt share, written to `out`/shared_prefix.jsonl."""
    from pyrl.models import load_policy
    from pyrl.ops.spec import LossSpec
    from pyrl.packing import Sample
    from pyrl.trainer.config import OptimizerConfig, TrainSection
    from pyrl.trainer.optimizer import MasterAdamW
    from pyrl.trainer.rows import pack_rows, policy_loss

    known_or_raise(NAME, names, VARIANTS)
    where = conditions("cpu")
    policy = load_policy("smollm2-135m", dtype=torch.bfloat16, check=False)
    optimizer, spec = MasterAdamW(policy.model, OptimizerConfig()), LossSpec()
    prompts, length = (1, 32) if quick else (PROMPTS, LENGTH)
    computed: dict[str, int] = {}

    def update(samples: list[Sample], packing: str) -> None:
        train = TrainSection.model_validate({"packing": packing, "tokens_per_row": BUDGET})
        packed = pack_rows(samples, train, policy.device)
        computed[packing] = sum(row.num_tokens for row in packed)
        tokens = sum(len(sample.completion) for sample in samples)
        for row in packed:
            policy_loss(policy, row, spec, denominator=float(tokens)).loss.backward()
        optimizer.step(0.0)

    chosen = [name for name in VARIANTS if not names or name in names or name == "plain"]
    calls = {name: functools.partial(update, packing=name) for name in chosen}
    rows: list[dict[str, Any]] = []
    least = functools.partial(draw_samples, prompts=1, length=length, share=SHARES[-1])
    for call in calls.values():  # warm-up; shapes of rows differ from draw to draw anyway
        call(least(2**31))
    rounds = rounds or (1 if quick else 5 if everything else 2)
    for share in SHARES if everything else SHARES[1:2]:
        draw = functools.partial(draw_samples, prompts=prompts, length=length, share=share)
        say(f"shared_prefix: prompts are {share:.0%} of the tokens")
        times = interleave(calls, draw, rounds=rounds, device="cpu")
        for name, samples in times.items():
            timing = Timing.of(samples)
            rows.append({
                "op": NAME, "implementation": name, "package": "pyrl",
                "version": version_of("pyrl"), "dtype": "bfloat16",
                "shape": [prompts * COMPLETIONS, length], "kept_share": 1.0,
                "settings": f"smollm2-135m, {prompts} prompts x {COMPLETIONS}, "
                f"prompt share {share:.0%}, rows of {BUDGET}",
                **where, "status": "ok", "prompt_share": share, "rounds": timing.rounds,
                "ms_p20": round(timing.p20, 1), "ms_p50": round(timing.p50, 1),
                "ms_p80": round(timing.p80, 1), "tokens": computed[name],
                "tokens_ratio": round(computed[name] / computed["plain"], 4),
                "time_ratio": round(median_ratio(samples, times["plain"]), 4),
            })  # fmt: skip
        write_rows(out / f"{NAME}.jsonl", rows)
    return rows


def draw_samples(seed: int, *, prompts: int, length: int, share: float) -> list[Any]:
    """Random tokens: samples of `length`, of which `share` is a prompt that COMPLETIONS have."""
    from pyrl.packing import Sample

    generator = torch.Generator().manual_seed(seed)
    own = round(length * (1 - share))

    def ids(n: int) -> torch.Tensor:
        return torch.randint(17, 49_000, (n,), generator=generator)

    return [
        Sample(prompt, ids(own), advantage=1.0 if c % 2 else -1.0)
        for prompt in (ids(length - own) for _ in range(prompts))
        for c in range(COMPLETIONS)
    ]


COLUMNS = (
    "packing",
    "prompt share",
    "computed tokens",
    "s (p20–p80)",
    "tokens ratio",
    "time ratio",
)


def cells(row: dict[str, Any]) -> list[str]:
    p20, p50, p80 = (row[f"ms_p{q}"] / 1e3 for q in (20, 50, 80))
    return [
        row["implementation"], f"{row['prompt_share']:.0%}", f"{row['tokens']:,}",
        f"{p50:.2f} ({p20:.2f}–{p80:.2f})", f"{row['tokens_ratio']:.3f}",
        f"{row['time_ratio']:.3f}",
    ]  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    from table import print_cells

    print_cells("shared_prefix: one policy update", COLUMNS, [cells(row) for row in rows], 1)


def markdown(rows: list[dict[str, Any]]) -> str:
    from table import conditions_text, markdown_cells

    lines = markdown_cells(COLUMNS, [cells(row) for row in rows])
    return "\n".join([*lines, "", conditions_text(rows), ""])
