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

from pyrl.ops.presets import PRESETS as PRESETS

Objective = Literal["reinforce", "clip", "cispo", "sapo", "gmpo", "vespo", "dppo"]
RatioLevel = Literal["token", "sequence", "sequence_token"]
KL = Literal["k1", "k2", "k3", "abs", "k3_st"]
Correction = Literal["tis", "mis", "icepop"]
CorrectionLevel = Literal["token", "sequence", "geometric"]
Divergence = Literal["tv", "kl"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant", "weighted"]

OBJECTIVES: tuple[str, ...] = get_args(Objective)
RATIO_LEVELS: tuple[str, ...] = get_args(RatioLevel)
KLS: tuple[str, ...] = get_args(KL)
CORRECTIONS: tuple[str, ...] = ("none", *get_args(Correction))
CORRECTION_LEVELS: tuple[str, ...] = get_args(CorrectionLevel)
DIVERGENCES: tuple[str, ...] = get_args(Divergence)

#: Order of the float64 vector that native kernels read (csrc/objective.h, kernels/objective.py). A
#: name is its index in the tuple above, a flag 0 or 1, and an absent bound infinity.
PARAMS = (
    "objective",
    "ratio_level",
    "clip_low",
    "clip_high",
    "dual_clip",
    "delta",
    "cispo_low",
    "cispo_high",
    "sapo_tau_pos",
    "sapo_tau_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "dppo_divergence",
    "dppo_low",
    "dppo_high",
    "kl",
    "kl_coef",
    "kl_ratio_weighted",
    "kl_clamp",
    "entropy_coef",
    "correction",
    "correction_level",
    "correction_low",
    "correction_high",
    "off_policy_threshold",
)

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
    "rollout_kl_sum",  # exp(d) - d - 1, d = old_logprob - rollout_logprob, scored tokens
    "ratio_sum",  # the ratio of `ratio_level` (gmpo: the sequence's geometric mean)
    "ratio_sq_sum",  # with ratio_sum: effective sample size
    "ratio_min",
    "ratio_max",
    "clip_low",  # A < 0 and the low bound stops the gradient; cispo: ratio < cispo_low
    "clip_high",  # A > 0 and the high bound stops the gradient; cispo: ratio > cispo_high
    "dual_clip",  # A < 0, -ratio * A > -dual_clip * A
    "correction_sum",  # correction weights after truncation, masked ones as 0
    "correction_sq_sum",  # with correction_sum: effective sample size
    "correction_max",
    "correction_masked",  # mis, icepop: weight outside the bounds
    "off_policy_masked",  # A < 0 in a sequence beyond off_policy_threshold
    "zero_advantage",
    "nan_old",  # missing old_logprob, treated as on-policy
    "nan_ref",  # missing ref_logprob, no KL term
    "nan_rollout",  # missing rollout_logprob, correction weight 1
)


_INF = math.inf
_TINY = math.ulp(0.0)  # > 0

#: Closed range of every number of a LossSpec; None is allowed where the field's default is None.
_RANGES: dict[str, tuple[float, float]] = {
    "clip_low": (0, 1),
    "clip_high": (0, _INF),
    "dual_clip": (math.nextafter(1, 2), _INF),
    "delta": (_TINY, _INF),
    "cispo_low": (0, _INF),
    "cispo_high": (_TINY, _INF),
    "sapo_tau_pos": (_TINY, _INF),
    "sapo_tau_neg": (_TINY, _INF),
    "vespo_k_pos": (0, _INF),
    "vespo_lambda_pos": (_TINY, _INF),
    "vespo_k_neg": (0, _INF),
    "vespo_lambda_neg": (_TINY, _INF),
    "dppo_low": (0, _INF),
    "dppo_high": (0, _INF),
    "kl_coef": (0, _INF),
    "kl_clamp": (_TINY, _INF),
    "entropy_coef": (-_INF, _INF),
    "correction_low": (0, _INF),
    "correction_high": (_TINY, _INF),
    "off_policy_threshold": (-_INF, _INF),
    "max_length": (_TINY, _INF),
    "temperature": (1e-30, _INF),
    "softcap": (_TINY, _INF),
    "logit_scale": (-_INF, _INF),
}


def _range_text(low: float, high: float) -> str:
    if high < _INF:
        return f"a number in [{low:g}, {high:g}]"
    if low == -_INF:
        return "a finite number"
    if low == _TINY:
        return "a finite number > 0"
    return f"a finite number {'>=' if low == round(low) else '>'} {round(low)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSpec:
    """A policy-gradient loss as data. Per kept token t with advantage A, delta = logprob - old and
    the ratio r = exp(delta) of `ratio_level`, sg = detached:

        reinforce  -A logprob
        clip       -min(min(r, `delta`) A, clamp(r, 1 - clip_low, 1 + clip_high) A); where A < 0, at
                   most -dual_clip A
        cispo      -sg[clamp(r, cispo_low, cispo_high)] A logprob
        sapo       -A (4 / tau) sigmoid(tau (r - 1)), tau = sapo_tau_pos if A > 0 else sapo_tau_neg
        gmpo       -A exp(mean over the sequence of delta, clipped to clip_high where A > 0 and to
                   -clip_low where A < 0)
        vespo      -sg[exp(lambda + k log w - lambda w)] A logprob, log w = clamp(sum over the
                   sequence of clamp(delta, -20, 20) + clamp(log correction, log 1e-8, 20),
                   log 1e-8, 20), (k, lambda) = vespo_*_pos if A >= 0 else vespo_*_neg
        dppo       -r A, and 0 where the divergence of the sampled token's probability p from the
                   old q is above its bound: A > 0, p > q, D > dppo_high or A <= 0, p < q,
                   D > dppo_low; D = |p - q| (tv) or q log(q/p) + (1-q) log((1-q)/(1-p)) (kl)

        loss = sum_t weight_t (correction_t policy_t + kl_coef KL_t - entropy_coef H_t)

    where weight_t comes from `aggregation`. Frozen and hashable; `to_dict`/`from_dict` and
    `to_json`/`from_json` round-trip, so a spec can live in a recipe.

    Sources: PPO arXiv 1707.06347, dual clip 1912.09729, delta (two-sided clipping) 2505.07291,
    GRPO 2402.03300, DAPO 2503.14476, Dr.GRPO 2503.20783, CISPO 2506.13585, GSPO 2507.18071, GMPO
    2507.20673, SAPO 2511.20347, DPPO 2602.04879, IcePop 2510.18855; VESPO as in TRL 1.16.
    """

    objective: Objective = "clip"
    """The policy term, one of the formulas above."""
    clip_low: float = 0.2
    """Distance below 1 at which the ratio is clipped, in [0, 1] (gmpo: bound on -delta)."""
    clip_high: float = 0.2
    """Distance above 1 at which the ratio is clipped, >= 0 (DAPO's clip-higher: 0.28; gmpo: bound
    on delta itself)."""
    dual_clip: float | None = None
    """For A < 0 the policy term is at most -dual_clip * A; > 1."""
    delta: float | None = None
    """Cap of the ratio in the unclipped branch of `clip` only."""
    cispo_low: float = 0.0
    """Lower bound of cispo's ratio itself, not of ratio - 1."""
    cispo_high: float = 5.0
    """Upper bound of cispo's ratio itself, not of ratio - 1."""
    sapo_tau_pos: float = 1.0
    """Temperature of sapo's gate for A > 0."""
    sapo_tau_neg: float = 1.05
    """Temperature of sapo's gate for A <= 0."""
    vespo_k_pos: float = 2.0
    """Exponent of vespo's weight for A >= 0."""
    vespo_lambda_pos: float = 3.0
    """Rate of vespo's weight for A >= 0."""
    vespo_k_neg: float = 3.0
    """Exponent of vespo's weight for A < 0."""
    vespo_lambda_neg: float = 2.0
    """Rate of vespo's weight for A < 0."""
    dppo_divergence: Divergence = "tv"
    """Divergence that dppo bounds, of the two-point distributions (sampled token, all others)."""
    dppo_low: float = 0.15
    """dppo's bound for A <= 0."""
    dppo_high: float = 0.15
    """dppo's bound for A > 0."""
    ratio_level: RatioLevel = "token"
    """token: delta_t; sequence: the mean of delta over the sequence's kept tokens, with gradient to
    all of them (GSPO); sequence_token: that mean's value with token t's gradient (GSPO-token)."""
    kl: KL = "k3"
    """KL estimate against `ref_logprob`, d = ref - logprob: k1 = -d, k2 = d^2/2,
    k3 = exp(d) - d - 1, abs = |d|, k3_st = the value of k3 with the gradient of k2. In the loss k1
    has zero expected gradient, and the gradient of k3 is not the reverse KL's (k2's is)."""
    kl_coef: float = 0.0
    """Weight of the KL term; 0 needs no `ref_logprob`."""
    kl_ratio_weighted: bool = False
    """Whether the KL estimate is multiplied by the ratio (DeepSeek-V3.2's off-policy correction);
    both factors are differentiated."""
    kl_clamp: float | None = None
    """Each token's estimate is clamped to [-kl_clamp, kl_clamp] before the ratio multiplies it;
    beyond the bounds its gradient is 0."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, subtracted from the loss with its true gradient."""
    correction: Correction | None = None
    """Detached weight w = exp(old - rollout) on the policy term, not on the KL: tis = w clamped to
    [correction_low, correction_high]; mis, icepop = w inside those bounds and 0 outside. A NaN
    rollout log-prob weighs 1. vespo takes log w into its own weight instead."""
    correction_level: CorrectionLevel = "token"
    """token; sequence: the product of w over the sequence; geometric: its geometric mean."""
    correction_low: float = 0.0
    """Lower bound of the correction weight."""
    correction_high: float = 2.0
    """Upper bound of the correction weight."""
    off_policy_threshold: float | None = None
    """Policy term 0 where A < 0 and the sequence's mean of rollout (else old) - logprob is above
    this (DeepSeek-V3.2); the denominator does not change."""
    aggregation: Aggregation = "token_mean"
    """token_mean: 1/N; sequence_mean: 1/(B n_s); sequence_sum: 1/B; constant: 1/(B max_length);
    weighted: w_t / sum w."""
    max_length: int | None = None
    """Length that `aggregation="constant"` divides by (Dr.GRPO); a loss with that aggregation
    raises without it."""
    temperature: float = 1.0
    """Sampling temperature: logits are divided by it before the softmax."""
    softcap: float | None = None
    """softcap * tanh(z / softcap) on the logits (Gemma 2)."""
    logit_scale: float = 1.0
    """Multiplier of the logits before softcap and temperature (Cohere, Granite); not 0."""

    _json: ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            self._check_field(field.name, field.default, hints[field.name])
        if self.logit_scale == 0:
            raise ValueError("LossSpec.logit_scale=0: expected a non-zero number")
        for low, high in (("cispo_low", "cispo_high"), ("correction_low", "correction_high")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"LossSpec.{low}={getattr(self, low)!r} is above "
                    f"LossSpec.{high}={getattr(self, high)!r}"
                )
        for name in ("dual_clip", "delta"):
            if getattr(self, name) is not None and self.objective != "clip":
                raise ValueError(
                    f"LossSpec.{name}={getattr(self, name)!r}: objective {self.objective!r} has no "
                    "such bound, only 'clip' has"
                )
        if self.objective in ("gmpo", "vespo", "dppo") and self.ratio_level != "token":
            raise ValueError(
                f"LossSpec.ratio_level={self.ratio_level!r}: objective {self.objective!r} defines "
                "its own ratio; expected 'token'"
            )
        if self.objective == "vespo" and self.correction and self.correction_level != "token":
            raise ValueError(
                f"LossSpec.correction_level={self.correction_level!r}: objective 'vespo' sums "
                "log-weights of tokens; expected 'token'"
            )
        # Made here, once: the registered ops take the spec as text, which tracing cannot make.
        object.__setattr__(self, "_json", json.dumps(self.to_dict(), sort_keys=True))

    def _check_field(self, name: str, default: Any, hint: Any) -> None:
        value = getattr(self, name)
        names = [a for part in (hint, *get_args(hint)) for a in get_args(part)]
        names = [a for a in names if isinstance(a, str)]
        if value is None and default is None:
            return
        if names:
            if value not in names:
                raise ValueError(f"LossSpec.{name}={value!r}: expected one of {names}")
        elif hint is bool:
            if not isinstance(value, bool):
                raise ValueError(f"LossSpec.{name}={value!r}: expected true or false")
        elif hint == int | None and type(value) is not int:
            raise ValueError(f"LossSpec.{name}={value!r}: expected a whole number")
        else:
            low, high = _RANGES[name]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or not low <= value <= high:
                raise ValueError(f"LossSpec.{name}={value!r}: expected {_range_text(low, high)}")

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

    @property
    def needs_rollout(self) -> bool:
        """Whether the sampler's log-prob is needed."""
        return self.correction is not None

    @property
    def couples_tokens(self) -> bool:
        """Whether a token's loss depends on the rest of its sequence, so that no gradient is known
        before every log-prob of the sequence is."""
        return (
            self.ratio_level != "token"
            or self.objective in ("gmpo", "vespo")
            or self.off_policy_threshold is not None
            or (self.correction is not None and self.correction_level != "token")
        )

    def params(self) -> Tensor:
        """float64 CPU vector in the order of `PARAMS`."""
        return _params(self)


@functools.lru_cache(maxsize=256)
def _from_json(text: str) -> LossSpec:
    return LossSpec.from_dict(json.loads(text))


@functools.lru_cache(maxsize=256)
def _params(spec: LossSpec) -> Tensor:
    names = {
        "objective": OBJECTIVES,
        "ratio_level": RATIO_LEVELS,
        "dppo_divergence": DIVERGENCES,
        "kl": KLS,
        "correction": CORRECTIONS,
        "correction_level": CORRECTION_LEVELS,
    }

    def number(name: str) -> float:
        value = getattr(spec, name)
        if name in names:
            return float(names[name].index(value or "none"))
        return math.inf if value is None else float(value)

    return torch.tensor([number(name) for name in PARAMS], dtype=torch.float64)
