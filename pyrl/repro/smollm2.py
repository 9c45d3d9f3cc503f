"""Six algorithms on one task with SmolLM2-135M: the same samples, the same updates, several seeds.

Every arm is a run of `pyrl train` in a process of its own; a run folder that holds a summary is not
run again, so that a comparison which was broken off goes on. Its settings must be today's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pyrl.repro.claim import Arm, Chart, Line, Result, Table, rounded
from pyrl.repro.statistics import t_interval
from pyrl.trainer.recipe import ConfigError, load
from pyrl.trainer.sampling_config import flatten

#: Where the runs are kept; PYRL_REPRO_RUNS overrides it.
RUNS = "runs/repro-smollm2"
N, PROMPTS, STEPS = 8, 8, 15

BASE: dict[str, str] = {
    "model.name": "smollm2-135m",
    "task.name": "instructions",
    "task.options": '{ system = "", reward = "all", constraints = ["no_commas"] }',
    "rollout.prompts_per_step": str(PROMPTS),
    "rollout.n": str(N),
    "rollout.max_new_tokens": "32",
    "loss.preset": "bnpo",
    "optimizer.lr": "3e-5",
    "optimizer.warmup_steps": "2",
    "train.steps": str(STEPS),
    "train.updates_per_step": "2",
    "train.threads": "1",
    "train.checkpoint_every": "0",
    "train.save_model": "false",
    "eval.prompts": "48",
    "eval.samples": "4",
    "eval.every": "5",
}
SIGNED = {"advantage.method": "raw", "advantage.reward_map": "signed"}
BOTH = '["drop_all_correct", "drop_all_wrong"]'
ARMS: dict[str, dict[str, str]] = {
    "RAFT++": {"advantage.method": "positive", "advantage.filter": '["drop_all_wrong"]'},
    "Reinforce": SIGNED,
    "Reinforce-Rej": SIGNED | {"advantage.filter": BOTH},
    "GRPO": {"advantage.method": "grpo"},
    # Five prompts and those that replace the groups without a difference: about as many samples.
    "DAPO": {
        "advantage.method": "grpo",
        "advantage.reward_map": "signed",  # the punishment of 1 is against rewards of -1 and 1
        "loss.preset": "dapo",
        "rollout.prompts_per_step": "5",
        "rollout.refill_rounds": "1",
        "reward.overlong_buffer": "6",
    },
    "GVM-GRPO": {
        "advantage.method": "grpo",
        "budget.kind": "gvm",
        "budget.pilot_samples": "4",
        "budget.steps": "5",
        "budget.maximum": "32",
    },
}
QUICK = {"train.steps": "1", "eval.prompts": "2", "eval.samples": "1", "rollout.n": "6",
         "rollout.max_new_tokens": "8", "eval.every": "0",
         "rollout.prompts_per_step": "2"}  # fmt: skip


class RunError(RuntimeError):
    """A training run of the comparison failed, and the message ends with what it printed; or a
    finished one has other settings."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """One arm with one seed: held-out reward after so many samples and seconds."""

    samples: list[float]
    seconds: list[float]
    heldout: list[float]
    signal: float
    """Share of the learned completions with an advantage."""
    updates: int
    pilot: int
    """Samples that only served to estimate."""
    entropy: float
    """Of the last steps."""
    summary: dict[str, Any]


def compare(seeds: int, quick: bool) -> Result:
    """Runs what is missing and reads all of it. RunError names the run that failed, or that is
    there with other settings."""
    folder = Path(os.environ.get("PYRL_REPRO_RUNS", RUNS)).resolve()
    jobs = [(name, seed) for seed in range(seeds) for name in ARMS]

    def run(job: tuple[str, int]) -> _Run:
        name, seed = job
        tag = name.lower().replace("+", "p")
        return _read(_train(folder / f"{tag}-{seed}", ARMS[name], seed, quick))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # each waits for a process of one thread
        found = dict(zip(jobs, pool.map(run, jobs), strict=True))
    result = _result({name: [found[name, seed] for seed in range(seeds)] for name in ARMS})
    result.conditions = _conditions([run.summary for run in found.values()])
    return result


def _conditions(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the figures come from: the runs, which may be older than this process."""

    def distinct(values: Iterable[Any]) -> list[str]:
        return sorted({value for value in values if value})

    versions = [summary.get("versions", {}) for summary in summaries]
    packages = distinct(name for each in versions for name in each)
    return {
        "seconds": round(sum(summary["seconds"] for summary in summaries), 1),
        "threads": f"in the steps of {len(summaries)} runs, each on one thread",
        "commit": distinct(summary.get("commit") for summary in summaries),
        "machine": "; ".join(distinct(summary.get("machine") for summary in summaries)),
        "versions": {
            name: "; ".join(distinct(each.get(name) for each in versions)) for name in packages
        },
    }


def _train(folder: Path, settings: dict[str, str], seed: int, quick: bool) -> Path:
    if quick:
        folder = folder.with_name(f"quick-{folder.name}")
    values = BASE | settings | {"train.seed": str(seed)} | (QUICK if quick else {})
    if (folder / "summary.json").exists():
        _check(folder, values)
        return folder
    flags = [part for key, value in values.items() for part in (f"--{key}", value)]
    recipe = folder.parent / "empty.toml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.touch()
    command = [sys.executable, "-m", "pyrl.cli", "train", str(recipe), "--run", str(folder)]
    resume = ["--resume"] if (folder / "config.toml").exists() else []
    done = subprocess.run(
        [*command, *resume, *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=recipe.parent,  # `-m` looks there first, and a checkout has a folder named kernels/
    )
    if done.returncode:
        raise RunError(f"{folder.name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return folder


def _check(folder: Path, values: dict[str, str]) -> None:
    """RunError naming the keys in which the finished run differs from `values`; what its
    config.toml lacks has the default."""
    try:
        kept = load(folder / "config.toml")
    except ConfigError as error:
        raise RunError(f"{folder} holds a run that cannot be compared: {error}") from error
    there, here = (
        dict(flatten(config.model_dump(mode="json"))) for config in (kept, load(None, values))
    )
    different = [
        f"{key} = {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]
    if different:
        raise RunError(
            f"{folder} holds a run with other settings: {'; '.join(different)}: move it away, "
            "or have PYRL_REPRO_RUNS name another folder"
        )


def _read(folder: Path) -> _Run:
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    samples, seconds, heldout = [0.0], [0.0], [summary["heldout_before"]["mean"]]
    clock = 0.0
    for row in rows:
        clock += row["seconds"]
        if row.get("heldout_mean") is not None:
            samples.append(row["samples_total"])
            seconds.append(clock)
            heldout.append(row["heldout_mean"])
    samples.append(rows[-1]["samples_total"])
    seconds.append(clock)
    heldout.append(summary["heldout_after"]["mean"])
    return _Run(
        samples,
        seconds,
        heldout,
        float(np.mean([row["signal_share"] for row in rows])),
        sum(row["updates"] for row in rows),
        int(sum(row.get("budget_pilot_samples") or 0 for row in rows)),
        float(np.mean([r["entropy"] for r in rows[-3:] if r["entropy"] is not None] or [np.nan])),
        summary,
    )


def _result(runs: dict[str, list[_Run]]) -> Result:
    def interval(values: list[float], digits: int = 3) -> str:
        found = t_interval(values)
        if len(values) < 2:
            return f"{found.mean:.{digits}f}"
        return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"

    rows = []
    for name, found in runs.items():
        rows.append(
            [
                name,
                interval([run.heldout[0] for run in found]),
                interval([run.heldout[-1] for run in found]),
                " ".join(f"{run.heldout[-1]:.3f}" for run in found),
                f"{np.mean([run.samples[-1] for run in found]):,.0f}",
                f"{np.mean([run.pilot for run in found]):,.0f}",
                f"{np.mean([run.updates for run in found]):.0f}",
                f"{np.mean([run.signal for run in found]):.0%}",
                f"{np.mean([run.entropy for run in found]):.2f}",
                f"{np.mean([run.seconds[-1] for run in found]):.0f}",
            ]
        )

    def lines(x: str) -> list[Line]:
        return [
            Line(
                name,
                rounded(np.mean([getattr(run, x) for run in found], axis=0)),
                [rounded(run.heldout) for run in found],
            )
            for name, found in runs.items()
        ]

    settings = json.dumps(BASE, indent=1)
    return Result(
        name="smollm2",
        title="Six algorithms, one budget, SmolLM2-135M",
        paper="arXiv 2504.11343, 2503.14476, 2505.02391",
        published="On Qwen2.5-Math-7B (average of mathematics benchmarks): RAFT++ 56.1, Reinforce "
        "53.9, GRPO 56.3, Reinforce-Rej 56.4; on Qwen2.5-Math-1.5B: GRPO 38.1, GVM-GRPO 40.4. "
        "Differences of that size are far below what these runs can tell apart.",
        regime=f"SmolLM2-135M-Instruct in bf16 on two CPU cores learns to write one finished "
        f"sentence on a topic, within a number of words and without commas: reward 1 if all of it "
        f"holds, else 0. {STEPS} steps of {PROMPTS} prompts x {N} completions of at most 32 "
        "tokens, "
        "2 updates a step, AdamW 3e-5, clip .2/.2 and token mean in every arm but DAPO (clip .28, "
        "dynamic sampling, overlong punishment). Reinforce is with rewards of -1 and 1. DAPO draws "
        "5 prompts a step and refills once; GVM spends half of its samples on pilots. Both so have "
        "about the others' budget: the table has the exact counts.",
        figure="Held-out reward: 48 prompts that training never sees, 4 completions each; mean and "
        "95% t interval over the seeds.",
        caveats=[
            "Two seeds and one learning rate for all: the order of the arms is not settled by "
            "this, and no verdict is given.",
            "DAPO's number of samples depends on what it finds; here it drew fewer than the "
            "others.",
            "Seconds are those of the steps on one core, evaluations left out, with another run on "
            "every other core.",
        ],
        arms=[
            Arm("held-out reward", name, rounded([run.heldout[-1] for run in found]))
            for name, found in runs.items()
        ],
        charts=[
            Chart(
                "Held-out reward against samples",
                "held-out reward",
                "samples drawn, pilots included",
                lines("samples"),
            ),
            Chart(
                "Held-out reward against time",
                "held-out reward",
                "seconds of training",
                lines("seconds"),
            ),
        ],
        tables=[
            Table(
                "Held-out reward",
                [
                    "algorithm",
                    "before",
                    "after",
                    "each seed",
                    "samples",
                    "of pilots",
                    "updates",
                    "with an advantage",
                    "entropy at the end",
                    "seconds",
                ],
                rows,
                "with an advantage: share of the completions learned from whose advantage is not 0",
            )
        ],
        text=f"<details><summary>Settings of all arms</summary>\n\n```json\n{settings}\n```\n\n"
        f"and of each:\n\n```json\n{json.dumps(ARMS, indent=1)}\n```\n\n</details>",
    )
