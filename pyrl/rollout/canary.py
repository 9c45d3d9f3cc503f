"""The canary: after every sync, engine and trainer score one fixed sample and must agree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from .protocol import Rollout, RolloutError


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Bounds on |engine - trainer| of a sample's log-probs at temperature 1."""

    max: float
    mean: float


#: By the coarser dtype of engine and trainer. Measured on SmolLM2-135M, vLLM and the transformers
#: engine against the trainer's packed forward, 20-token samples:
#: float32: max 5e-5, from the order of sums alone.
#: bfloat16: max 0.27 on text the model wrote, 0.73 (mean 0.13) on text it finds unlikely; either
#: side is 0.4 from the float32 value, because every layer rounds to 8 bits. Twice that is allowed,
#: so a bfloat16 canary tells wrong weights from right ones, not last step's from this step's.
#: float16: 3 bits more than bfloat16, so an eighth of it.
TOLERANCE = {
    torch.float32: Tolerance(max=1e-4, mean=1e-4),
    torch.bfloat16: Tolerance(max=1.5, mean=0.3),
    torch.float16: Tolerance(max=0.2, mean=0.04),
}


class CanaryError(RolloutError):
    """The engine and the trainer disagree about one fixed sample beyond the dtype's rounding."""


@dataclasses.dataclass(frozen=True)
class Canary:
    """One fixed sample; `check` compares the engine's log-probs of it with the trainer's."""

    prompt: list[int]
    completion: list[int]
    #: instead of `TOLERANCE[dtype]`
    tolerance: Tolerance | None = None

    def __post_init__(self) -> None:
        if not self.prompt or not self.completion:
            raise ValueError(
                f"Canary: prompt of {len(self.prompt)} and completion of {len(self.completion)} "
                "tokens: expected at least one of each"
            )

    def check(
        self,
        engine: Rollout,
        trainer_logprobs: Sequence[float],
        dtype: torch.dtype | None = None,
    ) -> float:
        """max_t |engine.score[t] - trainer[t]|.

        trainer_logprobs: log p(completion[t]) at temperature 1 under the trainer's weights; dtype:
        the coarser of the two sides', default the engine's. Raises CanaryError when the max or the
        mean is beyond the tolerance or not a number.
        """
        dtype = dtype or engine.dtype
        limit = self.tolerance or TOLERANCE.get(dtype)
        if limit is None:
            raise ValueError(f"Canary: no tolerance for {dtype}; known: {[*map(str, TOLERANCE)]}")
        if len(trainer_logprobs) != len(self.completion):
            raise ValueError(
                f"Canary: {len(trainer_logprobs)} trainer log-probs for "
                f"{len(self.completion)} tokens"
            )
        scored = engine.score(self.prompt, self.completion)
        gaps = [abs(a - b) for a, b in zip(scored, trainer_logprobs, strict=True)]
        at = max(range(len(gaps)), key=lambda t: math.inf if math.isnan(gaps[t]) else gaps[t])
        mean = sum(gaps) / len(gaps)
        if gaps[at] <= limit.max and mean <= limit.mean:  # false for NaN
            return gaps[at]
        raise CanaryError(
            f"canary: after sync to version {engine.version} the {engine.name} engine and the "
            f"trainer disagree on a fixed sample: max |Δ log-prob| {gaps[at]:.3g} at token {at} "
            f"(engine {scored[at]:.5f}, trainer {trainer_logprobs[at]:.5f}), mean {mean:.3g}; "
            f"tolerance for {dtype}: max {limit.max:.3g}, mean {limit.mean:.3g}. Likely causes: "
            "stale weights (the sync did not reach the engine, or an older version did), keys and "
            "values cached before the sync, weights that became NaN, or an engine that computes "
            "another model (dtype, head, RoPE settings)."
        )
