"""TRL's GRPOTrainer on SmolLM2-135M with and without `patch_grpo`: three steps in fp32.

Each trainer runs in a process of its own, so that its peak memory is its own.

16 completions of at most 32 tokens a batch, each batch used twice (`num_iterations=2`), so that the
second loss of a batch has ratios that are not 1.
"""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

TRAIN = """
import json, os, resource, sys
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
folder, out, patched = sys.argv[1], sys.argv[2], sys.argv[3] == "patched"
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

if patched:
    from pyrl.integrations.trl import patch_grpo
    patch_grpo()
topics = ["the sea", "a train", "winter", "bread"]
prompts = [[{"role": "user", "content": f"Write one sentence about {t}."}] for t in topics]
trainer = GRPOTrainer(
    model=folder,
    # Letters and length: no two completions tie, and the reward is the same whatever the process.
    reward_funcs=lambda completions, **kwargs: [
        len(c[0]["content"]) / 100 + c[0]["content"].count("e") / 10 for c in completions
    ],
    args=GRPOConfig(
        output_dir=out, use_cpu=True, bf16=False, report_to="none", max_steps=3, logging_steps=1,
        per_device_train_batch_size=16, num_generations=8, max_completion_length=32,
        num_iterations=2, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
        # Adam divides small gradients by themselves: their rounding with them. At the gradient's
        # norm of 1 the update is far above the rounding of the weights.
        optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", seed=3,
    ),
    train_dataset=Dataset.from_dict({"prompt": prompts}),
)
trainer.train()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
log = [e for e in trainer.state.log_history if "loss" in e]
torch.save(trainer.model.state_dict(), f"{out}/state.pt")
json.dump({"log": log, "peak_mib": peak}, open(f"{out}/run.json", "w"))
"""


def test_three_steps_agree_and_take_less_memory(tmp_path, record_property):
    from transformers import AutoModelForCausalLM

    from pyrl.models.smollm2 import smollm2_folder

    folder = smollm2_folder()
    (tmp_path / "train.py").write_text(TRAIN)
    runs, states = {}, {}
    for name in ("plain", "patched"):
        out = tmp_path / name
        out.mkdir()
        command = [sys.executable, str(tmp_path / "train.py"), str(folder), str(out), name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        runs[name] = json.loads((out / "run.json").read_text())
        states[name] = torch.load(out / "state.pt")
    assert len(runs["plain"]["log"]) == 3
    for theirs, ours in zip(runs["plain"]["log"], runs["patched"]["log"], strict=True):
        assert {"loss", "grad_norm", "entropy"} <= ours.keys() == theirs.keys()
        for key in ("loss", "grad_norm", "entropy", "reward", "completions/mean_length"):
            if key in theirs:  # the last two of the steps that sample
                assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-4, abs=1e-6)
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    moved = difference = 0.0
    for key, before in start.items():
        theirs, ours = (states[name][key].double() - before.double() for name in runs)
        moved += theirs.square().sum().item()
        difference += (ours - theirs).square().sum().item()
    error, peaks = (difference / moved) ** 0.5, {k: r["peak_mib"] for k, r in runs.items()}
    record_property("update_error", error)
    print(f"update differs by {error:.1e} relative; peak MiB {peaks}")
    assert moved > 0.1 and error <= 1e-4
    assert peaks["patched"] < peaks["plain"]
