"""The loss as data: one frozen, validated `LossSpec` and the presets that name points of its space.

It lives beside the ops because both the objective and the losses above read it; `pyrl.losses`
re-exports it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch
from torch import Tensor

Objective = Literal["reinforce", "clip"]
KL = Literal["k1", "k2", "k3"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant", "weighted"]

OBJECTIVES: tuple[str, ...] = get_args(Objective)
KLS: tuple[str, ...] = get_args(KL)

#: Order of the float64 vector that native kernels read (csrc/objective.h, kernels/objective.py).
PARAMS = ("objective", "clip_low", "clip_high", "dual_clip", "kl", "kl_coef", "entropy_coef")

#: Order of the float64 vector of sums and counts that every objective kernel returns.
METRICS = (
    "tokens",  # kept tokens
    "policy_loss",  # sum of weight * policy term
    "kl_loss",  # sum of weight * kl_coef * KL estimate
    "entropy_loss",  # -sum of weight * entropy_coef * entropy
    "logprob_sum",
    "entropy_sum",
    "kl_k1_sum",  # logprob - ref_logprob
    "kl_k3_sum",  # exp(d) - d - 1, d = ref_logprob - logprob
    "old_kl_sum",  # k3 against old_logprob
    "ratio_sum",
    "ratio_sq_sum",  # with ratio_sum: effective sample size
    "ratio_min",
    "ratio_max",
    "clip_low",  # A < 0, ratio < 1 - clip_low: the token has no gradient
    "clip_high",  # A > 0, ratio > 1 + clip_high: the token has no gradient
    "dual_clip",  # A < 0, -ratio * A > -dual_clip * A
    "zero_advantage",
    "nan_old",  # missing old_logprob, treated as on-policy
    "nan_ref",  # missing ref_logprob, no KL term
)


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"LossSpec.{name}={value!r}: expected a finite number > 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSpec:
    """A policy-gradient loss, per kept token t of sequence s with advantage A and ratio r:

        r = exp(logprob - old_logprob)
        policy = -A * logprob                                       objective="reinforce"
        policy = -min(r * A, clamp(r, 1 - clip_low, 1 + clip_high) * A)   objective="clip"
        loss = sum_t weight_t * (policy_t + kl_coef * KL_t - entropy_coef * H_t)

    where weight_t comes from `aggregation`. Frozen and hashable; `to_dict`/`from_dict` and
    `to_json`/`from_json` round-trip, so a spec can live in a recipe.
    """

    objective: Objective = "clip"
    """`reinforce` has no ratio; `clip` is PPO's pessimistic surrogate (arXiv 1707.06347)."""
    clip_low: float = 0.2
    """Distance below 1 at which the ratio is clipped, in [0, 1]."""
    clip_high: float = 0.2
    """Distance above 1 at which the ratio is clipped, >= 0 (DAPO's clip-higher: 0.28)."""
    dual_clip: float | None = None
    """For A < 0 the policy term is at most -dual_clip * A; > 1 (arXiv 1912.09729)."""
    kl: KL = "k3"
    """KL estimate against `ref_logprob`, d = ref - logprob: k1 = -d, k2 = d^2/2,
    k3 = exp(d) - d - 1. In the loss k1 has zero expected gradient, and the gradient of k3 is not
    the reverse KL's (k2's is)."""
    kl_coef: float = 0.0
    """Weight of the KL term; 0 needs no `ref_logprob`."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, subtracted from the loss with its true gradient."""
    aggregation: Aggregation = "token_mean"
    """token_mean: 1/N; sequence_mean: 1/(B n_s); sequence_sum: 1/B; constant: 1/(B max_length);
    weighted: w_t / sum w."""
    max_length: int | None = None
    """Length that `aggregation="constant"` divides by (Dr.GRPO, arXiv 2503.20783); a loss with that
    aggregation raises without it."""
    temperature: float = 1.0
    """Sampling temperature: logits are divided by it before the softmax."""
    softcap: float | None = None
    """softcap * tanh(z / softcap) on the logits (Gemma 2)."""
    logit_scale: float = 1.0
    """Multiplier of the logits before softcap and temperature (Cohere, Granite)."""

    _json: ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in (f.name for f in dataclasses.fields(self)):
            value, allowed = getattr(self, field), get_args(hints[field])
            if allowed and all(isinstance(a, str) for a in allowed) and value not in allowed:
                raise ValueError(f"LossSpec.{field}={value!r}: expected one of {list(allowed)}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"LossSpec.clip_low={self.clip_low!r}: expected a number in [0, 1]")
        for name in ("clip_high", "kl_coef"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"LossSpec.{name}={value!r}: expected a finite number >= 0")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(
                f"LossSpec.entropy_coef={self.entropy_coef!r}: expected a finite number"
            )
        if self.dual_clip is not None and not (
            math.isfinite(self.dual_clip) and self.dual_clip > 1
        ):
            raise ValueError(f"LossSpec.dual_clip={self.dual_clip!r}: expected a finite number > 1")
        if not (math.isfinite(self.logit_scale) and self.logit_scale != 0):
            raise ValueError(
                f"LossSpec.logit_scale={self.logit_scale!r}: expected a non-zero number"
            )
        _positive("temperature", self.temperature)
        _positive("softcap", self.softcap)
        _positive("max_length", self.max_length)
        # Made here, once: the registered ops take the spec as text, which tracing cannot make.
        object.__setattr__(self, "_json", json.dumps(self.to_dict(), sort_keys=True))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LossSpec:
        """The named preset with `overrides`; an unknown name lists the known ones."""
        if name not in PRESETS:
            raise ValueError(f"LossSpec.preset({name!r}): expected one of {sorted(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LossSpec:
        """From a mapping, for example a TOML table; an unknown key is a ValueError."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"LossSpec has no field {key!r}: expected one of {known}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def to_json(self) -> str:
        """The spec as JSON; `from_json` gives an equal spec back."""
        return self._json

    @classmethod
    def from_json(cls, text: str) -> LossSpec:
        """The spec that `to_json` wrote."""
        return _from_json(text)

    @property
    def needs_ref(self) -> bool:
        """Whether a reference log-prob is needed."""
        return self.kl_coef != 0

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropy must be given with a gradient."""
        return self.entropy_coef != 0

    def params(self) -> Tensor:
        """float64 CPU vector in the order of `PARAMS`; absent options are 0."""
        return _params(self)


@functools.lru_cache(maxsize=256)
def _from_json(text: str) -> LossSpec:
    return LossSpec.from_dict(json.loads(text))


@functools.lru_cache(maxsize=256)
def _params(spec: LossSpec) -> Tensor:
    values = {name: getattr(spec, name) for name in PARAMS}
    values["objective"] = OBJECTIVES.index(spec.objective)
    values["kl"] = KLS.index(spec.kl)
    values["dual_clip"] = spec.dual_clip or 0.0
    return torch.tensor([float(values[name]) for name in PARAMS], dtype=torch.float64)


#: Names for points of the space; no code of their own. RAFT and RAFT++ differ from reinforce and
#: clip in their advantages (`group_advantage(method="positive")`).
PRESETS: dict[str, dict[str, Any]] = {
    "reinforce": {"objective": "reinforce"},
    "raft": {"objective": "reinforce"},
    "raft++": {"objective": "clip"},
    "grpo": {"objective": "clip", "aggregation": "sequence_mean"},
    "bnpo": {"objective": "clip", "aggregation": "token_mean"},
    "dapo": {"objective": "clip", "clip_high": 0.28, "aggregation": "token_mean"},
    "dr_grpo": {"objective": "clip", "aggregation": "constant"},
}
