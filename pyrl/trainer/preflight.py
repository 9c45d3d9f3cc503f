"""The largest micro-batch there can be, before the first step: what does not fit fails now."""

from __future__ import annotations

import torch

from pyrl.packing import Sample, pack
from pyrl.trainer.rows import policy_loss
from pyrl.trainer.session import Session


def preflight(session: Session) -> int:
    """Forward and backward over one row of `train.tokens_per_row` tokens; its tokens, 0 if not run.

    Every token but each sample's first carries loss, samples are as long as completions can be, and
    no prefix is shared: no row of the run needs more, unless a prompt and its completion exceed
    `train.tokens_per_row`. Gradients are discarded, no random number is drawn.

    Raises ValueError naming the setting when the device's memory does not suffice.
    """
    config, policy, spec = session.config, session.parts.policy, session.parts.spec
    device = policy.head().weight.device
    wanted = config.train.preflight
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return 0
    longest = min(config.rollout.max_new_tokens + 1, config.train.tokens_per_row)
    lengths = [longest] * (config.train.tokens_per_row // longest)
    vocab = policy.model.get_input_embeddings().weight.shape[0]
    samples = [
        Sample(
            prompt=[s % vocab],
            completion=[(7919 * t + s) % vocab for t in range(length - 1)],
            advantage=1.0,
            old_logprob=[0.0] * (length - 1),
            ref_logprob=[0.0] * (length - 1),
            rollout_logprob=[0.0] * (length - 1),
        )
        for s, length in enumerate(lengths)
    ]
    budget = sum(lengths)
    row = pack(samples, budget, share_prefix=False, aligned=False).row(0).to(device)
    try:
        policy_loss(
            policy,
            row,
            spec,
            old_logprob=row.old_logprob,
            ref_logprob=row.ref_logprob if spec.needs_ref else None,
            denominator=float(budget),
            backend=config.train.backend,
        ).loss.backward()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(
            f"train.tokens_per_row = {config.train.tokens_per_row}: a micro-batch of {budget} "
            f"tokens does not fit into memory ({error}); lower it, or turn on "
            "model.gradient_checkpointing"
        ) from None
    finally:
        session.optimizer.discard_gradients()
    return budget
