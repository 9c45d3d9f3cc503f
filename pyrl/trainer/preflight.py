"""The largest micro-batch there can be, before the first step: what does not fit fails now."""

from __future__ import annotations

import torch

from pyrl.packing import PackedBatch, Sample, pack
from pyrl.trainer.config import Config
from pyrl.trainer.rows import policy_loss
from pyrl.trainer.session import Session


def preflight(session: Session) -> int:
    """Forward and backward over one row of `train.tokens_per_row` tokens; its tokens, 0 if not run.

    Its completions are as long as they can be, and all tokens but the prompts' carry loss. With
    `train.packing` = "off" it is one sample. Room for the optimizer's moments is held meanwhile.
    Gradients are discarded, no random number is drawn. A row of the run needs more only where a
    single sample is longer than `train.tokens_per_row`.

    Raises ValueError naming the setting when the device's memory does not suffice.
    """
    config, policy, spec = session.config, session.parts.policy, session.setting.spec
    device, train = policy.head().weight.device, config.train
    if train.preflight == "off" or (train.preflight == "auto" and device.type != "cuda"):
        return 0
    row = _largest_row(config, policy.model.get_input_embeddings().weight.shape[0]).to(device)
    try:
        moments = torch.empty(2 * session.optimizer.trained, device=device)
        policy_loss(
            policy,
            row,
            spec,
            old_logprob=row.old_logprob,
            ref_logprob=row.ref_logprob if spec.needs_ref else None,
            denominator=float(row.num_tokens),
            backend=train.backend,
        ).loss.backward()
        del moments
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(
            f"train.tokens_per_row = {train.tokens_per_row}: a micro-batch of {row.num_tokens} "
            f"tokens does not fit into memory ({error}); lower it, or turn on "
            "model.gradient_checkpointing"
        ) from None
    finally:
        session.optimizer.discard_gradients()
    return row.num_tokens


def _largest_row(config: Config, vocab: int) -> PackedBatch:
    """Completions after one-token prompts, the same token where prompts are shared."""
    budget, longest = config.train.tokens_per_row, config.rollout.max_new_tokens
    shared, off = config.train.packing == "shared", config.train.packing == "off"
    own = 0 if shared else 1  # prompt tokens of each sample; a shared one counts once
    left = max(budget - (1 - own), 1 + own)
    sizes: list[int] = []
    while left > own and not (off and sizes):
        sizes.append(min(longest, left - own))
        left -= sizes[-1] + own
    if left and not off:  # a prompt's worth of tokens is left: no completion fits behind it
        sizes[-1] += left
    nothing = [[0.0] * size for size in sizes]
    samples = [
        Sample(
            prompt=[0],
            completion=[(7919 * t + s) % vocab for t in range(size)],
            advantage=1.0,
            old_logprob=zeros,
            ref_logprob=zeros,
            rollout_logprob=zeros,
        )
        for s, (size, zeros) in enumerate(zip(sizes, nothing, strict=True))
    ]
    return pack(samples, max(budget, 2), share_prefix=shared, aligned=False).row(0)
