"""From sums and counts to the numbers of metrics.jsonl; the clock of a step's phases."""

from __future__ import annotations

import contextlib
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrl.algorithms import Group
from pyrl.losses import LossSpec, reduce_metrics

if TYPE_CHECKING:
    from pyrl.trainer.gather import Gathered

STEP_PHASES = ("sample", "score", "pilot", "logprob", "update", "sync")
PHASES = (*STEP_PHASES, "evaluate", "checkpoint")


class Clock:
    """Seconds by phase: `with clock("sample"): ...`."""

    def __init__(self, on_phase: Callable[[str], None] = lambda name: None) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._on_phase = on_phase

    def take(self) -> dict[str, float]:
        """The seconds since the last `take`."""
        spent, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return spent

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts what happens inside towards `phase`, the device's queue included."""
        self._on_phase(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[phase] += time.perf_counter() - start

    def move(self, seconds: float, source: str, phase: str) -> None:
        """Counts seconds that fell into `source` towards `phase`."""
        self.seconds[source] -= seconds
        self.seconds[phase] += seconds


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def signal_share(groups: Sequence[Group]) -> float:
    """Of all completions of the groups, those that are kept with an advantage; 0 of none."""
    attempts = [attempt for group in groups for attempt in group.attempts]
    return sum(a.keep and a.advantage != 0 for a in attempts) / max(1, len(attempts))


def batch_metrics(gathered: Gathered) -> dict[str, float]:
    """Of everything that was sampled in a step, used for training or not; samples and tokens count
    the pilot's too. reward_prompt_mean: every prompt counts once, however often it was sampled."""
    groups = gathered.sampled
    attempts = [a for group in groups for a in group.attempts]
    scored = [a.reward for a in attempts if a.reward == a.reward]
    by_prompt: dict[str, list[float]] = {}
    for group in groups:
        own = [a.reward for a in group.attempts if a.reward == a.reward]
        if own:
            by_prompt.setdefault(group.prompt_id, []).extend(own)
    lengths = [len(a.tokens) for a in attempts]
    found = {
        "reward_mean": statistics.fmean(scored) if scored else math.nan,
        "reward_prompt_mean": statistics.fmean(map(statistics.fmean, by_prompt.values()))
        if by_prompt
        else math.nan,
        "reward_std": statistics.pstdev(scored) if scored else math.nan,
        "zero_variance_groups": sum(group.zero_variance for group in groups),
        "groups": len(groups),
        "nan_rewards": len(attempts) - len(scored),
        "completion_length_mean": statistics.fmean(lengths) if lengths else math.nan,
        "truncated_share": statistics.fmean(a.finish_reason == "length" for a in attempts)
        if attempts
        else math.nan,
        "sampled_tokens": sum(lengths) + gathered.pilot_tokens,
        "samples": len(attempts) + gathered.pilot_samples,
    }
    domains: dict[str, list[float]] = {}
    for group in groups:
        if group.domain:
            rewards = [a.reward for a in group.attempts if a.reward == a.reward]
            domains.setdefault(group.domain, []).extend(rewards)
    return found | {f"reward_{d}": statistics.fmean(r) for d, r in domains.items() if r}


def loss_metrics(
    parts: Iterable[dict[str, Tensor]], updates: int, spec: LossSpec
) -> dict[str, float | None]:
    """Means of the micro-batches' sums: losses per update, everything else per kept token.

    None: what the spec does not use (a reference, a correction, an off-policy mask), and everything
    when nothing was computed (no gradient at all).
    """
    m = {name: float(value) for name, value in reduce_metrics(parts).items()}
    n = m.get("tokens", 0.0)
    if n == 0:
        m, n = {}, 1.0

    def per(name: str, count: float) -> float | None:
        return m[name] / count if name in m else None

    corrected, masks = spec.correction is not None, spec.off_policy_threshold is not None
    terms = [per(name, updates) for name in ("policy_loss", "kl_loss", "entropy_loss")]
    return {
        "loss": sum(t for t in terms if t is not None) if m else None,
        "policy_loss": terms[0],
        "kl_loss": terms[1],
        "entropy_loss": terms[2],
        "entropy": per("entropy_sum", n),
        "kl": per("kl_k3_sum", n) if spec.needs_ref else None,
        "old_kl": per("old_kl_sum", n),
        "rollout_kl": per("rollout_kl_sum", max(1.0, n - m.get("nan_rollout", 0.0))),
        "ratio_mean": per("ratio_sum", n),
        "ratio_min": m.get("ratio_min"),
        "ratio_max": m.get("ratio_max"),
        "clip_low_share": per("clip_low", n),
        "clip_high_share": per("clip_high", n),
        "dual_clip_share": per("dual_clip", n),
        "correction_mean": per("correction_sum", n) if corrected else None,
        "correction_max": m.get("correction_max") if corrected else None,
        "correction_masked_share": per("correction_masked", n) if corrected else None,
        "off_policy_share": per("off_policy_masked", n) if masks else None,
        "ess": m["ratio_sum"] ** 2 / m["ratio_sq_sum"] / n if m.get("ratio_sq_sum") else None,
        "logprob_mean": per("logprob_sum", n),
    }
