"""`PairCredit`: iterative DPO as a credit, its gradient exact for any split of pairs over rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyrl.algorithms.credit import Credit, DivergedError, with_advantages
from pyrl.algorithms.experience import Attempt, Group, RewardMap
from pyrl.packing import PackedBatch

#: The loss that `PairCredit` is exact for; any other spec trains something else.
LOSS: dict[str, Any] = {"objective": "reinforce", "aggregation": "sequence_sum"}


class PairCredit(Credit):
    """A_t = +-2 beta ((1 - s) sigmoid(-m_p) - s sigmoid(m_p)) for the tokens of pair p's chosen (+)
    and rejected (-) completion, with the margin m_p = beta (D(chosen) - D(rejected)) and D = the
    sum over the completion of log pi - log ref.

    With `LOSS`, -sum_t A_t log pi_t / 2P over the minibatch's P pairs has the gradient of
    `preference_loss`: dL / dlog pi_t = -A_t / 2P. A pair is the best and the worst completion of a
    group by map(reward) + bonus (the first of equals). A group whose completions are all equal, the
    completions between, lost and empty ones, and with `mask_truncated` those that no stop token
    ended, take no part. beta > 0, s = label_smoothing in [0, 0.5). `Group.weight` is not used.

    The metrics are means over the step's pairs, each as it was before its update; none: NaN.
    Sources: DPO arXiv 2305.18290, iterative DPO 2312.11456, best and worst 2504.11343.
    """

    needs_ref = True
    whole_groups = True

    def __init__(
        self,
        beta: float,
        label_smoothing: float = 0.0,
        *,
        reward_map: RewardMap = "identity",
        mask_truncated: bool = False,
    ) -> None:
        if not 0 < beta < math.inf:
            raise ValueError(f"beta={beta!r}: expected a finite number > 0")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={label_smoothing!r}: expected a number in [0, 0.5)")
        self.beta, self.label_smoothing = beta, label_smoothing
        self.reward_map, self.mask_truncated = reward_map, mask_truncated
        self._margins: list[Tensor] = []

    def assign(self, groups: Sequence[Group]) -> dict[str, float]:
        """+1 for each group's best, -1 for its worst; `keep` is false for all others."""
        pairs = 0
        for group in groups:
            for attempt in group.attempts:
                attempt.advantage, attempt.keep = 0.0, False
            fit = [attempt for attempt in group.attempts if self._fits(attempt)]
            if not fit:
                continue
            best, worst = max(fit, key=self._total), min(fit, key=self._total)
            if self._total(best) > self._total(worst):
                pairs += 1
                best.advantage, best.keep = 1.0, True
                worst.advantage, worst.keep = -1.0, True
        return {"pairs": float(pairs)}

    def _fits(self, attempt: Attempt) -> bool:
        cut = self.mask_truncated and attempt.finish_reason == "length"
        return bool(attempt.tokens) and math.isfinite(self._total(attempt)) and not cut

    def _total(self, attempt: Attempt) -> float:
        return attempt.total(self.reward_map)

    def reweigh(
        self,
        rows: list[PackedBatch],
        ref: list[Tensor | None],
        logprob: Callable[[PackedBatch], Tensor],
    ) -> list[PackedBatch]:
        """The advantages above, for samples that are pair after pair, in either order inside.

        DivergedError: a margin is not finite. ValueError: a row has no reference log-probs, or the
        samples are not such pairs.
        """
        if not rows:
            return []
        device = rows[0].target.device
        score, sign = _gaps(rows, ref, logprob)
        chosen = sign.reshape(-1, 2).argmax(1) + 2 * torch.arange(len(sign) // 2)
        other = chosen ^ 1
        margin = self.beta * (score[chosen.to(device)] - score[other.to(device)])
        if not margin.isfinite().all():
            raise DivergedError("a pair's margin is not finite: lower preference.beta or the rate")
        s = self.label_smoothing
        pull = 2 * self.beta * ((1 - s) * torch.sigmoid(-margin) - s * torch.sigmoid(margin))
        worth = torch.empty_like(score)
        worth[chosen.to(device)], worth[other.to(device)] = pull, -pull
        self._margins.append(margin)
        result = []
        for row in rows:
            each = worth[row.sequence_ids.to(device)]
            result.append(with_advantages(row, each.repeat_interleave(_lengths(row))))
        return result

    def metrics(self) -> dict[str, float]:
        """preference_loss, preference_accuracy (the share with m > 0) and preference_margin m."""
        margin = torch.cat([torch.zeros(0, dtype=torch.float64), *[m.cpu() for m in self._margins]])
        self._margins = []
        s = self.label_smoothing
        return {
            "preference_loss": float(
                (-(1 - s) * logsigmoid(margin) - s * logsigmoid(-margin)).mean()
            ),
            "preference_accuracy": float((margin > 0).double().mean()),
            "preference_margin": float(margin.mean()),
        }


def _lengths(row: PackedBatch) -> Tensor:
    """Targets of each sample, on the row's device."""
    return row.bounds.diff().to(row.target.device)


def _gaps(
    rows: list[PackedBatch],
    ref: list[Tensor | None],
    logprob: Callable[[PackedBatch], Tensor],
) -> tuple[Tensor, Tensor]:
    """sum over a sample of logprob - ref, float64 [N] on the device, and the signs of the assigned
    advantages, int64 [N] on the host; N samples by number. ValueError unless they are pairs."""
    numbers = torch.cat([row.sequence_ids for row in rows])
    total = len(numbers)
    if not numbers.sort().values.equal(torch.arange(total)):
        raise ValueError(
            f"sequence_ids {numbers.tolist()}: expected each of the minibatch's samples once"
        )
    device = rows[0].target.device
    score = torch.zeros(total, dtype=torch.float64, device=device)
    sign = torch.zeros(total, dtype=torch.float64, device=device)
    prompts = torch.zeros(total, dtype=torch.int64)
    for i, (row, expected) in enumerate(zip(rows, ref, strict=True)):
        if expected is None:
            raise ValueError(f"row {i} has no reference log-probs: pairs are compared against them")
        ids = row.sequence_ids.to(device).repeat_interleave(_lengths(row))
        gap = logprob(row).double() - expected.double()
        # Summed in float64: a margin is a small difference of two long sums.
        score.index_add_(0, ids, gap.where(row.loss_mask, 0.0))
        sign.index_add_(0, ids, row.advantages.sign().double())
        prompts[row.sequence_ids] = row.prompt_lengths
    signs = sign.sign().long().cpu()
    for i in range(0, total, 2):
        two = signs[i : i + 2].tolist()
        if sorted(two) != [-1, 1] or prompts[i] != prompts[i + 1]:
            raise ValueError(
                f"samples {i} and {i + 1}: expected a chosen and a rejected completion of one "
                f"prompt, got advantages of signs {two}"
            )
    return score, signs
