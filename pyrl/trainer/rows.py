"""One micro-batch: samples to rows, a row to its log-probs, a row to its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrl.losses import PolicyLoss, linear_policy_loss
from pyrl.models import Policy
from pyrl.ops.linear_logprob import linear_logprob
from pyrl.ops.spec import LossSpec
from pyrl.packing import PackedBatch, Sample, pack
from pyrl.trainer.config import TrainSection

#: Tokens' worth of time that one more segment costs in attention (docs/packing.md: about 1.6 on a
#: CPU). Prefixes that save less are computed again.
SEGMENT_COST = 2.0


def pack_rows(
    samples: Sequence[Sample], train: TrainSection, device: torch.device
) -> list[PackedBatch]:
    """The samples in rows of at most `train.tokens_per_row` computed tokens, the largest first.

    A longer sample widens the rows to its size. Largest first: what does not fit into memory fails
    at once. `sequence_ids` count in `samples`.
    """
    if not samples:
        return []
    sizes = [len(sample.prompt) + len(sample.completion) for sample in samples]
    if train.packing == "off":
        rows = []
        for i, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
            row = pack([sample], size, aligned=False).to(device)
            rows.append(dataclasses.replace(row, sequence_ids=torch.tensor([i])))
    else:
        rows = list(
            pack(
                samples,
                max(train.tokens_per_row, *sizes),
                share_prefix=train.packing == "shared",
                aligned=False,
                segment_cost=SEGMENT_COST,
            ).to(device)
        )
    return sorted(rows, key=lambda row: row.num_tokens, reverse=True)


@torch.no_grad()
def logprobs(policy: Policy, row: PackedBatch, spec: LossSpec, backend: str | None) -> Tensor:
    """log p(target) at the spec's temperature under `policy`, fp32 [R]; 0 outside the mask."""
    hidden = policy.hidden(row.tokens, row.positions, row.plan)
    head = policy.head()
    return linear_logprob(
        row.at_targets(hidden),
        head.weight,
        row.target,
        bias=head.bias,
        temperature=spec.temperature,
        softcap=spec.softcap,
        logit_scale=spec.logit_scale,
        mask=row.loss_mask,
        backend=backend,
    ).logprob


def policy_loss(
    policy: Policy,
    row: PackedBatch,
    spec: LossSpec,
    *,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    denominator: float,
    backend: str | None = None,
) -> PolicyLoss:
    """The row's share of the update's loss; `denominator` is the whole update's."""
    hidden = policy.hidden(row.tokens, row.positions, row.plan)
    head = policy.head()
    return linear_policy_loss(
        row.at_targets(hidden),
        head.weight,
        row.target,
        row.advantages,
        spec,
        bias=head.bias,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        rollout_logprob=row.rollout_logprob,
        mask=row.loss_mask,
        cu_seqlens=row.cu_seqlens,
        weights=row.weights if spec.aggregation == "weighted" else None,
        denominator=denominator,
        backend=backend,
    )
