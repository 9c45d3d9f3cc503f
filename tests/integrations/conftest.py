"""Tiny GRPOTrainers, plain and patched, and batches such as TRL's generation hands to the loss."""

import os

import pytest
import torch

from pyrl.testing import tiny_model_folder

#: Prompt and completion widths, and the completions' lengths: full, ragged, one token, empty.
P, L, LENGTHS = 5, 7, (7, 4, 1, 0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Folders of tiny random models by architecture, made once."""
    made = {}

    def make(architecture="llama", **config):
        key = (architecture, *sorted(config.items()))
        if key not in made:
            path = tmp_path_factory.mktemp(architecture)
            made[key] = tiny_model_folder(path, architecture=architecture, **config)
        return made[key]

    return make


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """build(folder, patched, **GRPOConfig fields) -> GRPOTrainer on the CPU in fp32."""
    pytest.importorskip("trl")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from pyrl.integrations.trl import patch_grpo

    output = tmp_path_factory.mktemp("trl")
    dataset = Dataset.from_dict({"prompt": ["ab", "cd", "ef", "gh"]})

    def make(model, patched, *, cls=GRPOTrainer, peft_config=None, backend=None, **options):
        fields = {
            "output_dir": str(output),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "per_device_train_batch_size": len(LENGTHS),
            "gradient_accumulation_steps": 2,
            "num_generations": 2,
            "max_completion_length": L,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            **options,
        }
        undo = patch_grpo(backend=backend) if patched else None
        try:
            trainer = cls(
                model=model,
                reward_funcs=lambda completions, **kwargs: [float(len(c)) for c in completions],
                args=GRPOConfig(**fields),
                train_dataset=dataset,
                peft_config=peft_config,
            )
        finally:
            if undo is not None:
                undo()
        trainer.current_gradient_accumulation_steps = 2  # what train() sets
        trainer.model.train()
        return trainer

    return make


@pytest.fixture(scope="session")
def batch():
    """batch(trainer, **switches) -> inputs of _compute_loss; old log-probs 0.3 off the policy's."""

    def make(
        trainer,
        *,
        seed=0,
        noise=0.3,
        old=True,
        tools=False,
        per_token=False,
        lengths=LENGTHS,
        correction=None,
    ):
        g = torch.Generator().manual_seed(seed)
        b, vocabulary = len(lengths), trainer.model.config.get_text_config().vocab_size

        def randn(*shape):
            return torch.randn(*shape, generator=g)

        prompt = torch.randint(3, vocabulary, (b, P), generator=g)
        completion = torch.randint(3, vocabulary, (b, L), generator=g)
        prompt_mask = (torch.arange(P) >= torch.tensor([0, 2, 4, 1])[:b, None]).long()
        mask = (torch.arange(L) < torch.tensor(lengths)[:, None]).long()
        ids, attention = torch.cat([prompt, completion], 1), torch.cat([prompt_mask, mask], 1)
        with torch.no_grad():
            logps, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, attention, L
            )
        a = torch.tensor([1.3, -0.7, 0.4, -1.1])[:b]
        inputs = {
            "prompt_ids": prompt,
            "prompt_mask": prompt_mask,
            "completion_ids": completion,
            "completion_mask": mask,
            "advantages": a[:, None] * (1 + 0.2 * randn(b, L)) if per_token else a,
            "num_items_in_batch": torch.tensor(29),
            "ref_per_token_logps": (logps + noise * randn(b, L)) * mask,
        }
        if old:
            inputs["old_per_token_logps"] = (logps + noise * randn(b, L)) * mask
        if tools:
            inputs["tool_mask"] = torch.ones_like(mask)
            inputs["tool_mask"][0, 2:4] = 0
        if correction is not None:
            kept = mask * inputs.get("tool_mask", 1)
            sampling = inputs["old_per_token_logps"] + noise * randn(b, L)
            sampling[0, 1] = float("nan")  # what vLLM could not score
            inputs["sampling_per_token_logps"] = sampling
            inputs["importance_sampling_ratio"] = sampled_ratio(trainer, inputs, kept)
        return inputs

    return make


def sampled_ratio(trainer, inputs, mask):
    """TRL's vLLM correction: [B, L], or [B, 1] at sequence level."""
    diff = inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]
    log_w = torch.nan_to_num(diff * mask, nan=0.0)
    mode = trainer.vllm_importance_sampling_mode
    if mode.startswith("sequence"):
        log_w = log_w.sum(1, keepdim=True)
    w, low = log_w.exp(), trainer.vllm_importance_sampling_clip_min
    high = trainer.vllm_importance_sampling_clip_max
    if mode.endswith("truncate"):
        return w.clamp(low, high)
    low = -torch.inf if low is None else low
    return torch.where((w < low) | (w > high), 0.0, w)
