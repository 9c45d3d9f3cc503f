"""One optimizer step of a whole RL trainer: this package's beside TRL's GRPOTrainer.

    python benchmarks/run.py --only trainer_step

SmolLM2-135M, 8 prompts x 8 completions x at most 32 new tokens, the same prompts in the same order,
the same reward function, the same loss (clip 0.2 / 0.2, mean over tokens), AdamW at 1e-6, gradient
norm clipped at 1, temperature 1, no KL term. Each trainer runs in its own fresh process, one after
the other; the first step is warm-up and left out.
`peak_rss_mib` is the trainer process' maximum resident memory by the system's own count (VmHWM),
last read at most half a second before its end; `peak_tree_mib` samples the proportional memory of
it and all its helpers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from harness import HERE, conditions, version_of, write_rows

NAME = "trainer_step"
#: Seconds after which a trainer is given up: a step of the slowest one takes about a minute.
DEADLINE = 1500.0
PHASES = ("sample", "score", "logprob", "update", "sync")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What both trainers are given."""

    model: str = "smollm2-135m"
    task: str = "dense"
    """`dense` (trainer_task.py): no group ties, so nobody can skip work. Else a built-in task."""
    prompts: int = 8
    completions: int = 8
    max_new_tokens: int = 32
    lr: float = 1e-6
    seed: int = 0
    steps: int = 4
    """The first is warm-up."""

    @property
    def task_name(self) -> str:
        return f"{HERE / 'trainer_task.py'}:Dense" if self.task == "dense" else self.task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """A row: which trainer and how it is set up."""

    name: str
    package: str
    dtype: str
    note: str
    options: dict[str, Any]
    task: str = "dense"
    extra: bool = False
    """Only with --all, or named."""

    def steps(self, measured: int | None) -> int:
        """A step of TRL takes over a minute: by itself it runs a warm-up and one, for only from the
        second on are the optimizer's moments beside the gradients. Ours runs a warm-up and two."""
        if measured is not None:
            return 1 + measured
        return 2 if self.package == "trl" else 3


#: Of our micro-batches: 2048, the default, takes a fifth less time and 1.3 GiB more.
ROW_TOKENS = 512

TRAINERS: tuple[Trainer, ...] = (
    Trainer(
        name="trl", package="trl", dtype="float32",
        note="GRPOTrainer, fp32, the 64 samples in one micro-batch, no gradient checkpointing",
        options={"bf16": False, "per_device_train_batch_size": 64}, extra=True,
    ),
    Trainer(
        name="trl-lean", package="trl", dtype="float32",
        note="GRPOTrainer, fp32, micro-batches of 8, gradient checkpointing: its least memory",
        options={"bf16": False, "per_device_train_batch_size": 8, "gradient_checkpointing": True},
    ),
    Trainer(
        name="trl-bf16", package="trl", dtype="bfloat16",
        note="GRPOTrainer, bf16=True (autocast over fp32 weights), otherwise as trl",
        options={"bf16": True, "per_device_train_batch_size": 64}, extra=True,
    ),
    Trainer(
        name="pyrl", package="pyrl", dtype="float32",
        note=f"pyrl train, fp32, micro-batches of {ROW_TOKENS} tokens",
        options={"dtype": "float32"},
    ),
    Trainer(
        name="pyrl-bf16", package="pyrl", dtype="bfloat16",
        note=f"pyrl train, bf16 compute over fp32 masters, micro-batches of {ROW_TOKENS} tokens",
        options={"dtype": "bfloat16"},
    ),
    Trainer(
        name="pyrl-bf16-ties", package="pyrl", dtype="bfloat16", task="instructions",
        note="the same with the quickstart's reward, where groups tie: completions without a "
        "gradient are not computed",
        options={"dtype": "bfloat16"}, extra=True,
    ),
)  # fmt: skip


def run(
    out: Path,
    *,
    quick: bool = False,
    everything: bool = False,
    rounds: int | None = None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of every trainer, written to `out`/trainer_step.jsonl as each one ends. `rounds` counts
    the measured steps."""
    known = [t.name for t in TRAINERS]
    for name in names or ():
        if name not in known:
            raise ValueError(f"trainer_step has no trainer {name!r}: expected one of {known}")
    measured = rounds or (1 if quick else 3 if everything else None)
    work = Workload()
    if quick:
        work = dataclasses.replace(work, prompts=2, completions=4, max_new_tokens=8)
    run_id = uuid.uuid4().hex[:8]
    rows = []
    for trainer in TRAINERS:
        if trainer.name not in names if names else trainer.extra and not (everything or quick):
            continue
        work = dataclasses.replace(work, task=trainer.task, steps=trainer.steps(measured))
        say(f"trainer_step: {trainer.name}, {work.steps} steps in a fresh process")
        row = {
            "op": NAME, "implementation": trainer.name, "package": trainer.package,
            "version": version_of(trainer.package), "dtype": trainer.dtype, "kept_share": 1.0,
            "shape": [work.prompts, work.completions, work.max_new_tokens],
            "settings": f"{work.model}, {trainer.task} reward", "note": trainer.note, "run": run_id,
            **conditions("cpu"),
        }  # fmt: skip
        row |= run_trainer(trainer, work)
        rows.append(row)
        write_rows(out / f"{NAME}.jsonl", [row])
    return rows


def run_trainer(trainer: Trainer, work: Workload) -> dict[str, Any]:
    """Fields of one trainer's row: status, seconds by phase (medians over the measured steps),
    tokens, peak memory."""
    with tempfile.TemporaryDirectory(prefix="trainer_step-") as scratch:
        folder = Path(scratch)
        (folder / "work.json").write_text(
            json.dumps({"work": dataclasses.asdict(work), "options": trainer.options})
        )
        if trainer.package == "trl":
            command = [sys.executable, str(HERE / "trl_steps.py"), str(folder)]
            steps_file = folder / "steps.jsonl"
        else:
            recipe = folder / "recipe.toml"
            recipe.write_text(tomli_w.dumps(pyrl_recipe(work, trainer.options["dtype"])))
            command = [
                str(Path(sys.executable).with_name("pyrl")), "train", str(recipe),
                "--run", str(folder / "run"),
            ]  # fmt: skip
            steps_file = folder / "run" / "metrics.jsonl"
        done = run_watched(command, folder / "output.log")
        if done["returncode"] != 0 or not steps_file.exists():
            tail = (folder / "output.log").read_text(errors="replace").strip().splitlines()
            reason = tail[-1][:300] if tail else f"exit status {done['returncode']}"
            return {"status": "failed", "reason": reason}
        steps = [json.loads(line) for line in steps_file.read_text().splitlines()]
    return {
        "status": "ok",
        "peak_mib": round(done["peak_rss_mib"], 1),
        "peak_tree_mib": round(done["peak_tree_mib"], 1),
        **summarize(steps),
    }


def summarize(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all steps but the first, in seconds, or the only step; tokens are means, being
    sampled."""
    if not steps:
        raise ValueError("0 steps: at least one is needed")
    measured = steps[1:] or steps

    def middle(key: str) -> float:
        return round(statistics.median(step.get(key) or 0.0 for step in measured), 3)

    found = {"seconds": middle("seconds"), "seconds_first": round(steps[0]["seconds"], 3)}
    found |= {f"seconds_{phase}": middle(f"seconds_{phase}") for phase in PHASES}
    found |= {"steps": len(measured), "seconds_all": [round(s["seconds"], 3) for s in measured]}
    for key in ("sampled_tokens", "tokens"):
        values = [s[key] for s in measured if s.get(key) is not None]
        found[key] = round(statistics.mean(values), 1) if values else None
    return found


def pyrl_recipe(work: Workload, dtype: str) -> dict[str, Any]:
    """The workload as a recipe; `bnpo` is the clip loss averaged over tokens."""
    return {
        "model": {"name": work.model, "dtype": dtype},
        "task": {"name": work.task_name},
        "rollout": {
            "prompts_per_step": work.prompts, "n": work.completions,
            "max_new_tokens": work.max_new_tokens, "temperature": 1.0,
        },
        "loss": {"preset": "bnpo"},
        "optimizer": {"lr": work.lr, "max_grad_norm": 1.0},
        "train": {
            "steps": work.steps, "seed": work.seed, "checkpoint_every": 0, "save_model": False,
            "tokens_per_row": ROW_TOKENS,
        },
        "eval": {"prompts": 0},
    }  # fmt: skip


def run_watched(command: Sequence[str], log: Path, deadline: float = DEADLINE) -> dict[str, Any]:
    """Run to the end; its status, its maximum resident memory and the sampled peak of the
    proportional memory (PSS) of it and its helpers."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        peaks, ended = Peaks(), threading.Event()
        watcher = threading.Thread(target=_watch, args=(process, peaks, ended, deadline))
        watcher.start()
        process.wait()
        ended.set()
        watcher.join()
    return {
        "returncode": process.returncode,
        "peak_rss_mib": peaks.own / 2**20,
        "peak_tree_mib": peaks.tree / 2**20,
    }


@dataclasses.dataclass
class Peaks:
    """Bytes."""

    own: int = 0
    tree: int = 0


def high_water(pid: int) -> int:
    """VmHWM of a process, in bytes; 0 when it has ended. wait4's ru_maxrss would begin with what
    the parent held when it forked."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _watch(
    process: subprocess.Popen[bytes], peaks: Peaks, ended: threading.Event, deadline: float
) -> None:
    began = time.monotonic()
    while not ended.wait(0.5):
        if time.monotonic() - began > deadline:
            process.kill()
            return
        total, peaks.own = 0, max(peaks.own, high_water(process.pid))
        try:
            family = [root := psutil.Process(process.pid), *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for member in family:
            try:
                total += member.memory_full_info().pss
            except psutil.Error:
                continue
        peaks.tree = max(peaks.tree, total)


COLUMNS = (
    "trainer",
    "version",
    "s a step",
    "first",
    *PHASES,
    "peak MiB",
    "with helpers",
    "tokens sampled",
)


def cells(row: dict[str, Any]) -> list[str]:
    name, version = row["implementation"], row.get("version") or "–"
    if row["status"] != "ok":
        return [name, version, f"{row['status']}: {row['reason']}", *[""] * (len(COLUMNS) - 3)]
    phases = [f"{row[f'seconds_{phase}']:.2f}" for phase in PHASES]
    sampled = "–" if row["sampled_tokens"] is None else f"{row['sampled_tokens']:.0f}"
    return [
        name, version, f"{row['seconds']:.2f}", f"{row['seconds_first']:.2f}", *phases,
        f"{row['peak_mib']:.0f}", f"{row['peak_tree_mib']:.0f}", sampled,
    ]  # fmt: skip


def show(rows: Sequence[dict[str, Any]]) -> None:
    from table import print_cells

    print_cells("one training step", COLUMNS, [cells(row) for row in rows], 2)


def counted(row: dict[str, Any]) -> str:
    if row.get("seconds_all") == [row.get("seconds_first")]:
        return "the first step alone"
    steps = row.get("steps", 0)
    return "one step after a warm-up" if steps == 1 else f"medians of {steps} steps after a warm-up"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    from table import markdown_cells

    parts = []
    for shape in sorted({tuple(r["shape"]) for r in rows}, reverse=True):
        members = [r for r in rows if tuple(r["shape"]) == shape]
        prompts, completions, new = shape
        first = members[0]
        parts += [
            f"### One training step of {Workload.model}: {prompts} prompts x {completions} "
            f"completions x at most {new} new tokens on {first['device']}",
            "",
            *markdown_cells(COLUMNS, [cells(row) for row in members]),
            "",
        ]
        parts += [f"- `{r['implementation']}`: {r['note']}; {r['settings']}" for r in members]
        parts += ["", *sorted({
            f"{r['threads']} threads, torch {r['torch']}, commit {r['commit']}, {r['date'][:10]}, "
            f"load {r['load']} before the run, {counted(r)}"
            for r in members
        }), ""]  # fmt: skip
    return "\n".join(parts)
