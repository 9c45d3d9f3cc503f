"""A tiny transformer and a toy task with one or many right answers, warm-started on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrl.testing import tiny_config

VOCABULARY = 320
#: Token of digit d is DIGIT + d; of operation k, OPERATION + k. Any ids would do.
DIGIT, OPERATION = 10, 30
#: Operations on digits a, b, and which pairs (x, y) answer them.
OPERATIONS = {
    "copy": lambda a, b, x, y: (x, y) == (a, b),
    "successor": lambda a, b, x, y: (x, y) == ((a + 1) % 10, (b + 1) % 10),
    "sum": lambda a, b, x, y: (x + y) % 10 == (a + b) % 10,
    "below": lambda a, b, x, y: max(x, y) < max(a, b),
    "above": lambda a, b, x, y: min(x, y) > min(a, b),
}


def tiny_policy(seed: int, **config: Any) -> Any:
    """A random two-layer Llama of D=32, vocabulary 320, in float32; keeps the global RNG."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(vocab_size=VOCABULARY, **config))
    return model.float().train(False)


def questions() -> list[tuple[list[int], list[list[int]]]]:
    """(prompt tokens, every right completion of two tokens) of each answerable question."""
    digits = range(10)
    found = []
    for k, right in enumerate(OPERATIONS.values()):
        for a in digits:
            for b in digits:
                pairs = [
                    [DIGIT + x, DIGIT + y] for x in digits for y in digits if right(a, b, x, y)
                ]
                if pairs:
                    found.append(([OPERATION + k, DIGIT + a, DIGIT + b], pairs))
    return found


def completion_logprob(model: Any, prompts: Tensor, completions: Tensor) -> Tensor:
    """Summed log-prob [B] of completions [B, C] after prompts [B, P]."""
    tokens = torch.cat([prompts, completions], 1)
    logits = model(input_ids=tokens, use_cache=False).logits[:, prompts.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(2, completions[..., None])[..., 0].sum(1)


def warm_start(model: Any, steps: int, seed: int, lr: float = 3e-3, batch: int = 64) -> None:
    """Adam on -log π(answer) of random questions and, for each, a random right answer."""
    generator = torch.Generator().manual_seed(seed)
    every = questions()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        chosen = [every[i] for i in torch.randint(len(every), (batch,), generator=generator)]
        picks = torch.rand(batch, generator=generator).tolist()
        answers = [a[int(u * len(a))] for (_, a), u in zip(chosen, picks, strict=True)]
        prompts = torch.tensor([prompt for prompt, _ in chosen])
        loss = -completion_logprob(model, prompts, torch.tensor(answers)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
