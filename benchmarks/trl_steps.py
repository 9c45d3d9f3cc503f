"""The TRL half of trainer_step.py, in a process of its own: python trl_steps.py FOLDER.

Reads FOLDER/work.json, trains with trl.GRPOTrainer and writes FOLDER/steps.jsonl, one object a step
with the same keys as this package's metrics.jsonl. Prompts come from the same seeded stream.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trainer_step import Workload
from trl import GRPOConfig, GRPOTrainer

from pyrl.models import model_folder
from pyrl.tasks import get_task
from pyrl.trainer.data import PromptStream


class TimedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with a clock around its phases; what it computes is unchanged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clock: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        super().__init__(*args, **kwargs)

    def _timed(self, phase: str, began: float) -> None:
        self.clock[phase] = self.clock.get(phase, 0.0) + time.perf_counter() - began

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = super()._generate(*args, **kwargs)
        self._timed("seconds_sample", began)
        self.counts = {
            "sampled_tokens": sum(map(len, result[1])),
            "prompt_tokens": sum(map(len, result[0])),
        }
        return result

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = super()._calculate_rewards(*args, **kwargs)
        self._timed("seconds_score", began)
        return result

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = super()._generate_and_score_completions(*args, **kwargs)
        self._timed("rollout", began)
        width = result["prompt_ids"].size(1) + result["completion_ids"].size(1)
        self.counts["tokens"] = result["prompt_ids"].size(0) * width
        return result


class StepLog(transformers.TrainerCallback):
    """Writes a line at each step's end; `update` is what is left of the step after the rollout."""

    def __init__(self, file: Path) -> None:
        self.file, self.began = file, 0.0
        self.trainer: TimedGRPOTrainer | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.clock = {}
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        clock, seconds = self.trainer.clock, time.perf_counter() - self.began
        line = {
            "step": state.global_step,
            "seconds": seconds,
            "seconds_sample": clock["seconds_sample"],
            "seconds_score": clock["seconds_score"],
            "seconds_update": seconds - clock["rollout"],
            **self.trainer.counts,
        }
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")


def main(folder: Path) -> None:
    given = json.loads((folder / "work.json").read_text())
    work, options = Workload(**given["work"]), given["options"]
    path = str(model_folder(work.model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    task = get_task(work.task_name)
    stream = PromptStream(task.prompts("train"), tokenizer, 1 << 30, work.seed)
    drawn = [item.prompt for item in stream.take(0, work.steps * work.prompts)]
    by_id = {prompt.id: prompt for prompt in drawn}
    dataset = Dataset.from_list([{"prompt": _messages(p), "prompt_id": p.id} for p in drawn])

    def reward(completions: list[Any], prompt_id: list[str], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [task.score(by_id[i], text) for i, text in zip(prompt_id, texts, strict=True)]

    samples = work.prompts * work.completions
    micro = min(options.pop("per_device_train_batch_size"), samples)
    config = GRPOConfig(
        **{"gradient_checkpointing": False, **options},
        output_dir=str(folder / "out"),
        use_cpu=True,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=samples // micro,
        num_generations=work.completions,
        max_completion_length=work.max_new_tokens,
        max_steps=work.steps,
        learning_rate=work.lr,
        lr_scheduler_type="constant",
        loss_type="dapo",
        epsilon=0.2,
        beta=0.0,
        temperature=1.0,
        shuffle_dataset=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        seed=work.seed,
    )
    log = StepLog(folder / "steps.jsonl")
    trainer = TimedGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[log],
    )
    log.trainer = trainer
    trainer.train()


def _messages(prompt: Any) -> Any:
    return prompt.messages if isinstance(prompt.messages, str) else list(prompt.messages)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
