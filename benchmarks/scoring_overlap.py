"""What scoring adds to a training step: SmolLM2-135M on a mixture of code, mathematics and STEM.

Three arms with the same samples, token for token: the reward is a hash of the completion in all of
them, and the arms differ in what is done before it is returned. Steps of the arms are taken in
turn, so that a busy machine is busy for all of them; each arm's step is compared with the same step
of the first.

  none      the hash alone, in the training process: what a step costs without scoring
  overlap   the domain's own scoring in worker processes, while sampling goes on
  after     the same, begun when the last completion is sampled

    python benchmarks/scoring_overlap.py [--steps 8] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pyrl.tasks import Mixture, get_task
from pyrl.trainer.config import Config
from pyrl.trainer.console import Console
from pyrl.trainer.loop import sync, train_step
from pyrl.trainer.session import Session
from pyrl.trainer.tracking import provenance

DOMAINS = ("code", "mathematics", "stem")
ARMS = ("none", "overlap", "after")
#: Runs every test of a problem to its end.
PROGRAM = "```python\nimport sys\nfor line in sys.stdin:\n    print(line)\n```"


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
            # The base model rarely writes a program, so that code would cost nothing.
            text = PROGRAM if prompt.domain == "code" else completion
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


def measure(steps: int) -> dict[str, list[dict[str, float]]]:
    """Of every arm and step, the first left out: seconds, and those of phase `score`."""
    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        sessions = {}
        for arm in ARMS:
            session = stack.enter_context(
                Session.open(config(arm != "none", steps + 1), Path(folder) / arm, resume=False,
                             console=Console(steps, quiet=True))
            )  # fmt: skip
            if arm == "after":
                late: Any = Late(session.parts.engine)
                session.parts = dataclasses.replace(session.parts, engine=late)
            sync(session, 0)
            sessions[arm] = session
        for step in range(steps + 1):
            for arm in ARMS[step % len(ARMS) :] + ARMS[: step % len(ARMS)]:
                session = sessions[arm]
                session.enter_step()
                begin = time.perf_counter()
                train_step(session)
                rows[arm].append({"seconds": time.perf_counter() - begin})
        for arm in ARMS:
            metrics = [json.loads(x) for x in (Path(folder) / arm / "metrics.jsonl").open()]
            for row, logged in zip(rows[arm], metrics, strict=True):
                row["score"] = logged["seconds_score"]
                row["nan_rewards"] = logged["nan_rewards"]
    return {arm: found[1:] for arm, found in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, help="appends a JSON line")
    args = parser.parse_args()
    rows = measure(args.steps)
    added = {}
    for arm, found in rows.items():
        pairs = zip(found, rows["none"], strict=True)
        added[arm] = statistics.median(a["seconds"] / b["seconds"] - 1 for a, b in pairs)
        seconds = statistics.median(row["seconds"] for row in found)
        waited = statistics.median(row["score"] for row in found)
        print(f"{arm:8} {seconds:7.3f} s a step, of which {waited:.3f} s waiting for scores  "
              f"{100 * added[arm]:+6.2f} %")  # fmt: skip
    if args.out:
        record = {**provenance(), "steps": args.steps, "added": added, "rows": rows}
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
