"""`patch_grpo()`: TRL 1.16's GRPOTrainer takes its loss from `linear_policy_loss`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from pyrl.integrations._grpo import VESPO_CORRECTION, grpo_spec, vespo_rollout
from pyrl.integrations._trl_head import add_head
from pyrl.losses import LossSpec, PolicyLoss, linear_policy_loss, policy_objective
from pyrl.ops.backend import NAMES

#: A GRPOTrainer. The patch reads attributes that its annotated types leave out.
Trainer = Any

_PLAIN_INIT = GRPOTrainer.__init__

#: Methods that the integration replaces: a subclass with its own would have it ignored.
_REPLACED = ("_compute_loss", "_get_per_token_logps_and_entropies", "get_gamma_weights")

#: Model inputs that TRL's scoring takes from a batch.
_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def patch_grpo(*, backend: str | None = None) -> Callable[[], None]:
    """Every GRPOTrainer built from now on takes its loss, and all its log-probs, from pyrl.

    The loss, its gradients and the logged metrics equal TRL's own for every `loss_type`,
    `importance_sampling_level`, KL, vLLM correction, masking and entropy option. One pass over the
    vocabulary gives loss and gradients (6 N D V flops, kept completion tokens only) where a token's
    loss needs no other token; sequence level, vespo, `off_policy_mask_threshold`,
    `top_entropy_quantile` and the entropy bonus need every log-prob first and run the two waists
    one after the other (8 N D V).

    Returns a function that undoes the patch; trainers built before or after keep what they have.
    NotImplementedError for another TRL than 1.16; building a trainer then raises it for each option
    `check` names. `backend` is that of `linear_policy_loss`.
    """
    if not trl.__version__.startswith("1.16."):
        raise NotImplementedError(f"patch_grpo: written for TRL 1.16, found {trl.__version__}")
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend={backend!r}: expected one of {sorted(NAMES)}")

    @functools.wraps(_PLAIN_INIT)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain = grpo_trainer.add_fused_lm_head
        grpo_trainer.add_fused_lm_head = functools.partial(add_head, backend=backend)
        try:
            _PLAIN_INIT(self, *args, **kwargs)
        finally:
            grpo_trainer.add_fused_lm_head = plain
        check(self)
        self._compute_loss = functools.partial(compute_loss, self, backend=backend)

    def undo() -> None:
        patched.__init__ = _PLAIN_INIT

    patched: Any = GRPOTrainer
    patched.__init__ = init
    return undo


def check(trainer: Trainer) -> None:
    """NotImplementedError (or ValueError, for a value out of range) naming the trainer's option
    that has no equal here."""
    for name in _REPLACED:
        if getattr(type(trainer), name) is not getattr(GRPOTrainer, name):
            raise NotImplementedError(
                f"patch_grpo: {type(trainer).__name__} overrides GRPOTrainer.{name}, which the "
                "patch replaces"
            )
    args = trainer.args
    if args.fp16:
        raise NotImplementedError(
            "patch_grpo: fp16=True; gradients are formed in the forward, before the loss scale"
        )
    if args.torch_compile:
        raise NotImplementedError("patch_grpo: torch_compile=True is not tested; leave it off")
    if trainer.is_deepspeed_enabled and args.deepspeed_plugin.zero_stage == 3:
        raise NotImplementedError(
            "patch_grpo: deepspeed ZeRO-3, whose head is gone in the backward; use FSDP2"
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise NotImplementedError("patch_grpo: fsdp version 1; use version 2")
    spec = build_spec(trainer)
    if spec.objective == "vespo" and _corrects(trainer):
        low = trainer.vllm_importance_sampling_clip_min
        high = trainer.vllm_importance_sampling_clip_max
        if (low is not None and low > 1) or (high is not None and high < 1):
            raise NotImplementedError(
                f"patch_grpo: vllm_importance_sampling_clip_min={low}, clip_max={high} with "
                "loss_type='vespo': bounds that exclude 1 give padding a weight"
            )


def build_spec(trainer: Trainer) -> LossSpec:
    """The trainer's options as a spec; `weighted` by `token_weights`, TRL's normalisers."""
    args, level = trainer.args, trainer.importance_sampling_level
    if trainer.loss_type == "vespo" and level == "sequence":
        # The level then enters the bias-corrected KL only.
        if trainer.beta != 0 and args.use_bias_correction_kl:
            raise NotImplementedError(
                "patch_grpo: use_bias_correction_kl with loss_type='vespo' and "
                "importance_sampling_level='sequence'"
            )
        level = "token"
    return grpo_spec(
        loss_type=trainer.loss_type,
        importance_sampling_level=level,
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=args.delta,
        beta=trainer.beta,
        use_bias_correction_kl=args.use_bias_correction_kl,
        sapo_temperature_pos=args.sapo_temperature_pos,
        sapo_temperature_neg=args.sapo_temperature_neg,
        vespo_k_pos=args.vespo_k_pos,
        vespo_lambda_pos=args.vespo_lambda_pos,
        vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=args.vespo_lambda_neg,
        temperature=trainer.temperature,
        aggregation="weighted",
    )


def _corrects(trainer: Trainer) -> bool:
    return trainer.use_vllm and trainer.vllm_importance_sampling_correction


def fuses(trainer: Trainer, spec: LossSpec) -> bool:
    """Whether a token's gradient is known from its own log-prob, so that one pass is enough."""
    return not (
        spec.couples_tokens
        or trainer.off_policy_mask_threshold is not None
        or trainer.top_entropy_quantile < 1.0
        or trainer._entropy_bonus_enabled
    )


def token_weights(trainer: Trainer, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """fp32 [B, L]: what TRL multiplies the loss of each kept token by, with n_b kept tokens in a
    completion and `a` micro-batches in an optimizer step (1 in evaluation).

    grpo, sapo 1/(a B n_b) · bnpo 1/(a sum n_b) · dr_grpo 1/(a B max_completion_length) ·
    luspo 1/(a B) · dapo, cispo, vespo: processes / tokens of the generation batch, scaled to one
    optimizer step.
    """
    training, b = trainer.model.training, mask.shape[0]
    steps = trainer.current_gradient_accumulation_steps if training else 1.0
    lengths, kind = mask.sum(1, keepdim=True).clamp(min=1).double(), trainer.loss_type
    if kind in ("grpo", "sapo"):
        total = lengths * b
    elif kind == "bnpo":
        total = mask.sum().clamp(min=1).double()
    elif kind == "dr_grpo":
        total = torch.full_like(lengths, b * trainer.max_completion_length)
    elif kind == "luspo":
        total = torch.full_like(lengths, b)
    else:
        total = inputs["num_items_in_batch"].clamp(min=1).double().to(mask.device)
        total = total / trainer.accelerator.num_processes
        if training:
            total = total / trainer.args.steps_per_generation
    return (1 / (total * steps)).float().expand(mask.shape)


def compute_loss(
    trainer: Trainer, model: Any, inputs: dict[str, Any], *, backend: str | None = None
) -> Tensor:
    """GRPOTrainer._compute_loss: the loss with its graph from pyrl, the log entries from TRL."""
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    spec, batch = build_spec(trainer), dict(inputs)
    batch["mask"] = mask.bool()
    if fuses(trainer, spec):
        loss, logps, entropies, aux = _fused(trainer, model, batch, spec, backend)
    else:
        logps, entropies, aux = _score(trainer, model, batch)
        loss = _composed(trainer, batch, spec, logps, entropies, backend)
    if trainer.aux_loss_enabled:
        assert aux is not None
        training = trainer.model.training
        steps = trainer.current_gradient_accumulation_steps if training else 1.0
        loss = loss + trainer.router_aux_loss_coef * aux / steps
    _bookkeep(trainer, model, inputs, batch["mask"], logps, entropies, aux)
    return loss


def _score(trainer: Trainer, model: Any, batch: dict[str, Any]) -> tuple[Any, Any, Any]:
    """logps [B, L], entropies [B, L], aux_loss through TRL's own preparation of model inputs."""
    return trainer._get_per_token_logps_and_entropies(
        model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_ids"].size(1),
        compute_entropy=True,
        compute_aux_loss=trainer.aux_loss_enabled,
        **{name: batch.get(name) for name in _MODEL_INPUTS},
    )


def _signal(trainer: Trainer, batch: dict[str, Any]) -> Tensor:
    """[B, L]: advantages, times the given vLLM correction: w l(A) = l(w A) for w >= 0, vespo's
    own weight apart."""
    advantages = batch["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    if _corrects(trainer) and trainer.loss_type != "vespo":
        advantages = advantages * batch["importance_sampling_ratio"]
    return advantages.expand(batch["mask"].shape)


def _fields(trainer: Trainer, batch: dict[str, Any], backend: str | None) -> dict[str, Any]:
    """The keyword arguments that `linear_policy_loss` and `policy_objective` share."""
    return {
        "old_logprob": batch.get("old_per_token_logps"),
        "ref_logprob": batch["ref_per_token_logps"] if trainer.beta != 0 else None,
        "mask": batch["mask"],
        "weights": token_weights(trainer, batch, batch["mask"]),
        "denominator": 1.0,
        "backend": backend,
    }


def _fused(
    trainer: Trainer, model: Any, batch: dict[str, Any], spec: LossSpec, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """loss, logps, entropies, aux_loss; the loss is formed where the head is, inside the model."""
    signal, fields = _signal(trainer, batch), _fields(trainer, batch, backend)
    target = batch["completion_ids"]
    out: FusedCausalLMOutput | None = None

    def policy_loss(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, head: dict[str, Any]
    ) -> PolicyLoss:
        return linear_policy_loss(
            hidden[:, -target.shape[1] :],
            weight,
            target,
            signal,
            dataclasses.replace(spec, **head),
            bias=bias,
            **fields,
        )

    def forward(**kwargs: Any) -> FusedCausalLMOutput:
        nonlocal out
        out = model(**kwargs, policy_loss=policy_loss)
        return out

    logps, entropies, aux = _score(trainer, forward, batch)
    assert out is not None and out.loss is not None
    return out.loss, logps, entropies, aux


def _composed(
    trainer: Trainer,
    batch: dict[str, Any],
    spec: LossSpec,
    logps: Tensor,
    entropies: Tensor,
    backend: str | None,
) -> Tensor:
    """policy_objective over differentiable logps and entropies [B, L], and TRL's entropy bonus."""
    mask, signal, fields = batch["mask"], _signal(trainer, batch), _fields(trainer, batch, backend)
    given = fields["old_logprob"]
    old = logps.detach() if given is None else given
    if trainer.off_policy_mask_threshold is not None:
        signal = signal * trainer.get_off_policy_mask(
            advantages=signal,
            per_token_logps=logps,
            sampling_per_token_logps=batch.get("sampling_per_token_logps", old),
            mask=mask.float(),
            off_policy_threshold=trainer.off_policy_mask_threshold,
        )
    acting = mask
    if trainer.top_entropy_quantile < 1.0:
        quantile = 1 - trainer.top_entropy_quantile
        acting = trainer.get_high_entropy_mask(entropies.detach(), mask, quantile)
        signal = torch.where(acting, signal, 0.0)
    if spec.objective == "vespo" and _corrects(trainer):
        spec = dataclasses.replace(spec, **VESPO_CORRECTION)
        fields["old_logprob"] = old
        fields["rollout_logprob"] = vespo_rollout(old, batch["importance_sampling_ratio"], mask)
    loss = policy_objective(logps, signal, spec, **fields).loss
    if trainer._entropy_bonus_enabled:
        training = trainer.model.training
        steps = trainer.current_gradient_accumulation_steps if training else 1.0
        mean = torch.where(acting, entropies, 0.0).sum() / acting.sum().clamp(min=1)
        active = (
            not trainer.use_adaptive_entropy
            or trainer._last_world_entropy <= trainer.args.entropy_target
        )
        if active:
            loss = loss - trainer.entropy_coef * mean / steps
    return loss


@torch.no_grad()
def _bookkeep(
    trainer: Trainer,
    model: Any,
    inputs: dict[str, Any],
    mask: Tensor,
    logps: Tensor,
    entropies: Tensor,
    aux: Tensor | None,
) -> None:
    """TRL's own _compute_loss on known log-probs [B, L], for what it logs and for its adaptive
    entropy coefficient; its value is dropped."""
    # A masked token has no log-prob of ours; the old one makes its ratio 1, not perhaps infinite.
    old = inputs.get("old_per_token_logps")
    logps = torch.where(mask, logps.detach(), 0.0 if old is None else old)
    known = (logps, entropies.detach(), None if aux is None else aux.detach())
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: known
    try:
        GRPOTrainer._compute_loss(trainer, model, inputs)
    finally:
        del trainer._get_per_token_logps_and_entropies
