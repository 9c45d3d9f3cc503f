"""What TRL's and Liger's GRPO options mean as a `LossSpec`; the two share names and formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrl.losses import LossSpec
from pyrl.ops.objective import LOG_HUGE, LOG_TINY

#: loss_type → objective, and the aggregation that Liger's class uses.
LOSS_TYPES: dict[str, tuple[str, str]] = {
    "grpo": ("clip", "sequence_mean"),
    "bnpo": ("clip", "token_mean"),
    "dr_grpo": ("clip", "constant"),
    "dapo": ("clip", "token_mean"),
    "luspo": ("clip", "sequence_sum"),
    "cispo": ("cispo", "token_mean"),
    "sapo": ("sapo", "sequence_mean"),
    "vespo": ("vespo", "token_mean"),
}
LEVELS = ("token", "sequence")

#: A spec's field → the option it came from, for messages.
_OPTIONS = {
    "clip_low": "epsilon_low",
    "clip_high": "epsilon_high",
    "cispo_high": "epsilon_high",
    "kl_coef": "beta",
    "sapo_tau_pos": "sapo_temperature_pos",
    "sapo_tau_neg": "sapo_temperature_neg",
    "max_length": "max_completion_length",
}

#: With this, `rollout_logprob` carries any correction ratio into vespo's weight unchanged: vespo
#: itself clamps the logarithms to at most 20.
VESPO_CORRECTION: dict[str, Any] = {
    "correction": "tis",
    "correction_low": 0.0,
    "correction_high": 1e30,
}


def grpo_spec(
    *,
    loss_type: str,
    importance_sampling_level: str,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    beta: float,
    use_bias_correction_kl: bool,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
    vespo_k_pos: float,
    vespo_lambda_pos: float,
    vespo_k_neg: float,
    vespo_lambda_neg: float,
    temperature: float,
    **fields: Any,
) -> LossSpec:
    """The spec of these options; `fields` are further fields of the spec.

    ValueError names the option that no spec can hold.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r}: expected one of {sorted(LOSS_TYPES)}")
    if importance_sampling_level not in LEVELS:
        raise ValueError(
            f"importance_sampling_level={importance_sampling_level!r}: expected one of {LEVELS}"
        )
    objective = LOSS_TYPES[loss_type][0]
    values: dict[str, Any] = {
        "objective": objective,
        "ratio_level": importance_sampling_level,
        "kl": "k3",
        "kl_coef": beta,
        "kl_ratio_weighted": use_bias_correction_kl,
        "temperature": temperature,
        **fields,
    }
    if objective == "clip":
        # A ratio is never below 0, so a distance above 1 clips nothing more than 1 does.
        values |= {"clip_low": min(epsilon_low, 1.0), "clip_high": epsilon_high, "delta": delta}
    elif objective == "cispo":
        values |= {"cispo_low": 0.0, "cispo_high": epsilon_high}
    elif objective == "sapo":
        values |= {"sapo_tau_pos": sapo_temperature_pos, "sapo_tau_neg": sapo_temperature_neg}
    else:
        values |= {
            "vespo_k_pos": vespo_k_pos,
            "vespo_lambda_pos": max(vespo_lambda_pos, 1e-4),  # as TRL and Liger bound it
            "vespo_k_neg": vespo_k_neg,
            "vespo_lambda_neg": max(vespo_lambda_neg, 1e-4),
        }
    try:
        return LossSpec(**values)
    except ValueError as error:
        text = str(error)
        for field, option in _OPTIONS.items():
            text = text.replace(f"LossSpec.{field}=", f"{option}=")
        raise ValueError(text.replace("LossSpec.", "")) from error


def vespo_rollout(old: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
    """rollout [B, L] with sum over kept t of (old - rollout) = the sequence's log correction.

    old [B, L] · ratio [B, L] per token or [B, 1] per sequence, a given correction w, perhaps 0 ·
    mask bool [B, L]. The logarithm is clamped to [log 1e-8, 20] as vespo does; that of a sequence
    is spread evenly over its kept tokens.
    """
    log_w = ratio.float().log().clamp(LOG_TINY, LOG_HUGE)
    if ratio.shape != mask.shape:
        log_w = log_w / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask, old.float() - log_w, 0.0)
