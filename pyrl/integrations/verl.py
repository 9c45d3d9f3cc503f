"""verl 0.9 policy losses computed by `policy_objective`: `register()`, `loss_mode=pyrl_gspo`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrl.losses import LossSpec, policy_objective

#: verl's PolicyLossFn: (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
#: rollout_is_weights) -> (loss, metrics).
PolicyLossFn = Callable[..., tuple[Tensor, dict[str, Any]]]


def _bounds(config: Any) -> tuple[float, float]:
    """clip_ratio_low, clip_ratio_high, each clip_ratio where not set."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return (
        config.clip_ratio if low is None else low,
        config.clip_ratio if high is None else high,
    )


def _clip(config: Any) -> dict[str, Any]:
    low, high = _bounds(config)
    # A ratio is never below 0: a distance above 1 bounds it no more than 1 does.
    return {"objective": "clip", "clip_low": min(low, 1.0), "clip_high": high}


def _vanilla(config: Any) -> dict[str, Any]:
    return {**_clip(config), "dual_clip": config.get("clip_ratio_c", 3.0)}


def _gspo(config: Any) -> dict[str, Any]:
    return {**_clip(config), "ratio_level": "sequence_token", "delta": math.exp(10.0)}


def _sapo(config: Any) -> dict[str, Any]:
    return {"objective": "sapo", "sapo_tau_pos": config.tau_pos, "sapo_tau_neg": config.tau_neg}


def _geo_mean(config: Any) -> dict[str, Any]:
    low, high = _bounds(config)
    return {"objective": "gmpo", "clip_low": low, "clip_high": high}


def _cispo(config: Any) -> dict[str, Any]:
    low, high = _bounds(config)
    return {"objective": "cispo", "cispo_low": max(0.0, 1 - low), "cispo_high": 1 + high}


def _dppo(config: Any, divergence: str) -> dict[str, Any]:
    low, high = _bounds(config)
    return {
        "objective": "dppo",
        "dppo_divergence": divergence,
        "dppo_low": low,
        "dppo_high": high,
    }


#: verl's loss_mode → the fields of its spec, from verl's ActorConfig.
LOSSES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "vanilla": _vanilla,
    "gspo": _gspo,
    "sapo": _sapo,
    "geo_mean": _geo_mean,
    "cispo": _cispo,
    "dppo_tv": lambda config: _dppo(config, "tv"),
    "dppo_kl": lambda config: _dppo(config, "kl"),
    "gpg": lambda config: {"objective": "reinforce"},
}


def register(prefix: str = "pyrl_", *, backend: str | None = None) -> list[str]:
    """Registers every loss of `LOSSES` with verl as prefix + its name; returns those names.

    Afterwards `actor_rollout_ref.actor.policy_loss.loss_mode=pyrl_vanilla` selects one. Every
    worker process must register: `VERL_USE_EXTERNAL_MODULES=pyrl.integrations.verl_plugin` does.
    """
    names = []
    for name, fields in LOSSES.items():
        register_spec(prefix + name, fields, backend=backend)
        names.append(prefix + name)
    return names


def register_spec(
    name: str,
    spec: LossSpec | Callable[[Any], dict[str, Any]],
    *,
    backend: str | None = None,
) -> None:
    """Registers a spec, any that needs neither entropy nor reference, as verl's loss `name`."""
    from verl.trainer.ppo.core_algos import register_policy_loss

    register_policy_loss(name)(policy_loss(spec, backend=backend))


def policy_loss(
    spec: LossSpec | Callable[[Any], dict[str, Any]], *, backend: str | None = None
) -> PolicyLossFn:
    """A verl policy loss: policy_objective(log_prob, advantages, spec), aggregated as verl asks.

    `spec`: a LossSpec, whose aggregation is replaced by verl's `loss_agg_mode`, or one of `LOSSES`.
    verl adds its KL and entropy terms itself, so a spec with either raises. The loss and gradient
    equal those of verl's loss of the same name, except:

    - dppo: same gradient; the value is -min(r, c) A, verl's is that times log_prob.
    - sapo, geo_mean: `loss_agg_mode` and the global batch are honoured; verl always takes the mean
      over sequences of token means, geo_mean over this micro-batch and its empty sequences alone.
    - geo_mean: a token with A = 0 keeps its ratio; verl sets it to 1.
    - an all-masked micro-batch gives 0; verl's mean of nothing is NaN.
    - metrics: geo_mean counts the tokens whose gradient the clip stops; a token whose
      `rollout_is_weights` is 0 counts as not clipped; dppo's pg_clipfrac_lower counts all r > c.
    """
    fields = _fields(spec)

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if config is None:
            raise ValueError("config: expected verl's ActorConfig, got None")
        mask = response_mask.bool()
        chosen = LossSpec(**{**fields(config), "aggregation": "weighted"})
        old, logp = old_log_prob.float(), log_prob.float()
        if chosen.objective in ("clip", "sapo") and chosen.ratio_level == "token":
            # verl's clamp of the log ratio: its gradient is 0 beyond.
            logp = logp.clamp(old - 20, old + 20)
        a = advantages.float()
        if rollout_is_weights is not None:
            a = a * _policy_weights(chosen, rollout_is_weights.float(), mask)
        cap = config.get("clip_ratio_c", 20.0) if chosen.objective == "dppo" else None
        if cap is not None:
            # r A becomes min(r, cap) A, in value and gradient.
            a = a * (cap / (logp.detach() - old).clamp(max=80.0).exp()).clamp(max=1.0)
        out = policy_objective(
            logp,
            torch.where(mask, a, 0.0),
            chosen,
            old_logprob=torch.where(mask, old, 0.0),
            mask=mask,
            weights=token_weights(mask, loss_agg_mode, **_global(config)),
            denominator=1.0,
            backend=backend,
        )
        return out.loss, _metrics(chosen, out.metrics, logp, old, mask, cap)

    return loss


def _fields(spec: LossSpec | Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """ActorConfig → the fields of the spec."""
    if not isinstance(spec, LossSpec):
        return spec
    if spec.needs_ref or spec.needs_entropy or spec.needs_rollout:
        raise ValueError(
            f"verl adds KL, entropy and rollout correction itself; got kl_coef={spec.kl_coef}, "
            f"entropy_coef={spec.entropy_coef}, correction={spec.correction!r}"
        )
    fixed = {k: v for k, v in spec.to_dict().items() if k != "max_length"}
    return lambda config: fixed


def _policy_weights(spec: LossSpec, weights: Tensor, mask: Tensor) -> Tensor:
    """[B, L]: the factor of A; for gmpo the sequence's geometric mean, as its ratio is one."""
    if spec.objective != "gmpo":
        return weights
    logs = torch.where(mask, (weights + 1e-10).log(), 0.0)
    mean = logs.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean.exp().expand(mask.shape)


def _global(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "global_batch_info", None) or {})


def token_weights(
    mask: Tensor,
    mode: str,
    *,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """fp32 [B, L]: verl's agg_loss as the factor of each kept token's loss.

    N tokens and S sequences with a kept token in the global batch (default: in `mask`), n_b kept
    tokens of a sequence, d = dp_size: token-mean d/N · token-sum d · seq-mean-token-sum d/S ·
    seq-mean-token-sum-norm d/(S loss_scale_factor), default L · seq-mean-token-mean d/(S n_b).
    """
    lengths = mask.sum(1, keepdim=True).double()
    if mode == "token-mean":
        total = _count("batch_num_tokens", batch_num_tokens, lengths.sum(), dp_size)
    elif mode == "token-sum":
        total = torch.ones_like(lengths)
    elif mode in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        total = _count("global_batch_size", global_batch_size, (lengths > 0).sum(), dp_size)
        if mode == "seq-mean-token-mean":
            total = total * lengths.clamp(min=1)
        elif mode == "seq-mean-token-sum-norm":
            total = total * (mask.shape[1] if loss_scale_factor is None else loss_scale_factor)
    else:
        raise ValueError(f"loss_agg_mode={mode!r}: not one of verl's")
    return (dp_size / total).float().expand(mask.shape)


def _count(name: str, given: float | Tensor | None, here: Tensor, dp_size: int) -> Tensor:
    if given is None and dp_size > 1:
        raise ValueError(f"{name} is needed with dp_size={dp_size}")
    total = here if given is None else torch.as_tensor(given, device=here.device)
    return total.double().clamp(min=1)


@torch.no_grad()
def _metrics(
    spec: LossSpec,
    sums: dict[str, Tensor],
    logp: Tensor,
    old: Tensor,
    mask: Tensor,
    cap: float | None,
) -> dict[str, Any]:
    """verl's three numbers, means over this micro-batch's kept tokens, in one wait."""
    delta = torch.where(mask, logp - old, 0.0).double()
    if spec.objective in ("cispo", "dppo"):  # elsewhere logp is clamped already, or never
        delta = delta.clamp(-20, 20)
    low, high, lower = sums["clip_low"], sums["clip_high"], sums["dual_clip"]
    share = low + high
    if spec.objective == "gmpo":
        share, lower = high, low
    elif cap is not None:
        lower = (delta > math.log(cap)).sum().double()
    values = torch.stack([share, -delta.sum(), lower]) / mask.sum().clamp(min=1)
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return dict(zip(names, values.tolist(), strict=True))
