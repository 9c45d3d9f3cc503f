"""What scoring adds to a training step: SmolLM2-135M on a mixture of code, mathematics and STEM.

Four arms with the same samples, token for token: the reward is a hash of the completion in all of
them, and `work` says what is done before it is returned. Steps of the arms are taken in turn, so
that a busy machine is busy for all of them; the median over steps is compared.

  none      the hash alone, in the training process: what a step costs without scoring
  overlap   the domain's own scoring in worker processes, while sampling goes on
  after     the same, begun when the last completion is sampled
  here      the same work in the training process, while sampling stands still (not for code)

    python benchmarks/scoring_overlap.py [--steps 8] [--out FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pyrl.tasks import Mixture, get_task
from pyrl.trainer.config import Config
from pyrl.trainer.console import Console
from pyrl.trainer.loop import sync, train_step
from pyrl.trainer.session import Session

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("code", "mathematics", "stem")
ARMS = ("none", "overlap", "after")


class Hashed:
    """reward = a hash of the completion, after the mixture's own scoring where `work` is true."""

    name = "hashed"

    def __init__(self, *, work: bool) -> None:
        self.work, self.trusted = work, not work
        self.mixture = Mixture({d: get_task(d) for d in DOMAINS})

    def prompts(self, split: str) -> list[Any]:
        parts = [self.mixture.domain(d, split)[:64] for d in DOMAINS]
        return [prompt for turn in zip(*parts, strict=True) for prompt in turn]

    def score(self, prompt: Any, completion: str) -> float:
        if self.work:
            # What the base model writes rarely holds a program; every second one gets one.
            text = completion
            if prompt.domain == "code" and len(completion) % 2:
                text = f"```python\nprint(input())\n{'x = 1' * 1}\n```"
            self.mixture.score(prompt, text)
        return hashlib.blake2b(completion.encode(), digest_size=1).digest()[0] / 255


def config(work: bool, steps: int) -> Config:
    return Config.model_validate(
        {
            "model": {"name": "smollm2-135m"},
            "task": {"name": f"{__file__}:Hashed", "options": {"work": work}, "workers": 2},
            "rollout": {"prompts_per_step": 8, "n": 8, "max_new_tokens": 64},
            "optimizer": {"lr": 1e-6},
            "train": {"steps": steps, "tokens_per_row": 2048, "save_model": False},
            "eval": {"prompts": 0},
        }
    )


class Late:
    """An engine that tells of its completions when all are there."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *args: Any, on_completion: Any, **options: Any) -> Any:
        groups = self._engine.generate(*args, **options)
        for i, group in enumerate(groups):
            for j, completion in enumerate(group):
                on_completion(i, j, completion)
        return groups


def measure(steps: int) -> dict[str, Any]:
    import contextlib
    import dataclasses

    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        sessions = {}
        for arm in ARMS:
            console = Console(steps, stream=open("/dev/null", "w"))  # noqa: SIM115
            session = stack.enter_context(
                Session.open(config(arm != "none", steps), Path(folder) / arm,
                             resume=False, console=console)
            )  # fmt: skip
            if arm == "after":
                session.parts = dataclasses.replace(
                    session.parts, engine=Late(session.parts.engine)
                )
            sync(session, 0)
            sessions[arm] = session
        for step in range(steps):
            for arm in ARMS[step % len(ARMS) :] + ARMS[: step % len(ARMS)]:
                session = sessions[arm]
                session.enter_step()
                begin = time.perf_counter()
                train_step(session)
                rows[arm].append({"seconds": time.perf_counter() - begin})
    return {arm: [row["seconds"] for row in found] for arm, found in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seconds = measure(args.steps)
    base = statistics.median(seconds["none"][1:])
    for arm, found in seconds.items():
        middle = statistics.median(found[1:])
        print(f"{arm:8} {middle:7.3f} s a step  {100 * (middle / base - 1):+6.2f} %")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    if args.out:
        args.out.write_text(json.dumps({
            "commit": commit, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "steps": args.steps, "seconds": seconds}, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
