"""`LigerFusedLinearGRPOLoss`: constructor and call of Liger 0.8's class, over the fused loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pyrl.integrations._grpo import LOSS_TYPES, VESPO_CORRECTION, grpo_spec, vespo_rollout
from pyrl.losses import linear_policy_loss
from pyrl.ops.linear_logprob import linear_logprob

#: Options that say nothing about the formula of a token's loss.
_NOT_IN_SPEC = ("compiled", "use_ref_model", "chunk_size", "max_completion_length")


class LigerFusedLinearGRPOLoss(nn.Module):
    """loss, metrics = linear_policy_loss(...) under the names of Liger's options.

    Equal to Liger's loss and gradients in every option, with these exceptions, where Liger's own
    value depends on padding or on rounding:

    - `luspo` is (1/B) sum over kept t of l_t. Liger multiplies an unmasked [B, L] loss by the
      sequence's length and divides by L unless l is [B, 1]: the same at sequence level without KL
      and without per-token `vllm_is_ratio`; elsewhere padding enters Liger's loss.
    - `vespo` sums log `vllm_is_ratio` over kept tokens; Liger sums padding too.
    - bf16, f16: dweight is accumulated in fp32 over all tokens; Liger rounds every sequence's part
      to the weight's dtype and adds in it.

    `compiled` and `chunk_size` change no result and are not used: there is nothing left to compile,
    and the kernels choose their chunks. The attribute `backend` is `linear_policy_loss`'s.

    ValueError for an option Liger refuses (sequence level with cispo, sapo or vespo; dr_grpo
    without `max_completion_length`; a value out of range), at construction.
    """

    beta: float
    loss_type: str

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        options: dict[str, Any] = {
            k: v for k, v in locals().items() if k not in ("self", "__class__")
        }
        super().__init__()
        if importance_sampling_level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(
                f"importance_sampling_level='sequence' is not defined for loss_type={loss_type!r}: "
                "expected 'token'"
            )
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_length")
        for name, value in options.items():
            setattr(self, name, value)
        used = {k: v for k, v in options.items() if k not in _NOT_IN_SPEC}
        # Without a reference the KL is that of the policy from itself: 0, with zero gradient.
        used["beta"] = beta if use_ref_model else 0.0
        aggregation = LOSS_TYPES[loss_type][1] if loss_type in LOSS_TYPES else None
        if aggregation == "constant":
            used["max_length"] = max_completion_length
        self.spec = grpo_spec(**used, aggregation=aggregation)
        self.backend: str | None = None

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """loss (0-d); metrics: the mean KL where `beta` is not 0, and the share of clipped tokens.

        _input [B, L, D] · lin_weight [V, D] · selected_token_ids [B, L], already aligned ·
        attention_mask [B, L] of 0 and 1 · advantages [B] · bias [V] · ref_per_token_logps,
        old_per_token_logps [B, L], old None = on-policy · instead of the former ref_input
        [B, L, D], ref_weight [V, D], ref_bias [V] · vllm_is_ratio [B, L] or [B, 1] multiplies the
        policy term · num_items_in_batch: kept tokens of the whole step, for dapo, cispo, vespo.
        """
        mask = attention_mask.bool()
        if mask.dim() != 2 or advantages.shape != mask.shape[:1]:
            raise ValueError(
                f"attention_mask {list(mask.shape)}, advantages {list(advantages.shape)}: "
                "expected [B, L] and [B]"
            )
        head: dict[str, Any] = {
            "temperature": self.spec.temperature,
            "mask": mask,
            "backend": self.backend,
        }
        ref, spec, rollout, old = None, self.spec, None, old_per_token_logps
        if self.spec.needs_ref:
            ref = ref_per_token_logps
            if ref is None:
                if ref_input is None or ref_weight is None:
                    raise ValueError(
                        f"beta={self.spec.kl_coef} with use_ref_model needs ref_per_token_logps, "
                        "or ref_input and ref_weight"
                    )
                with torch.no_grad():
                    ref = linear_logprob(
                        ref_input, ref_weight, selected_token_ids, bias=ref_bias, **head
                    ).logprob
        signal = advantages[:, None].expand(mask.shape)
        if vllm_is_ratio is not None:
            if vllm_is_ratio.shape not in (mask.shape, (mask.shape[0], 1)):
                raise ValueError(
                    f"vllm_is_ratio {list(vllm_is_ratio.shape)}: expected {list(mask.shape)} "
                    f"or {[mask.shape[0], 1]}"
                )
            if spec.objective == "vespo":
                if old is None:
                    with torch.no_grad():
                        old = linear_logprob(
                            _input, lin_weight, selected_token_ids, bias=bias, **head
                        ).logprob
                spec = dataclasses.replace(spec, **VESPO_CORRECTION)
                rollout = vespo_rollout(old, vllm_is_ratio, mask)
            else:
                # The other policy terms scale with the advantage: w l(A) = l(w A) for w >= 0.
                signal = signal * vllm_is_ratio.to(signal.dtype)
        out = linear_policy_loss(
            _input,
            lin_weight,
            selected_token_ids,
            signal,
            spec,
            bias=bias,
            old_logprob=old,
            ref_logprob=ref,
            rollout_logprob=rollout,
            mask=mask,
            denominator=self._denominator(mask, num_items_in_batch),
            backend=self.backend,
        )
        assert out.logprob is not None
        return out.loss, self._metrics(out.logprob, old, ref, advantages, mask)

    def _denominator(self, mask: Tensor, items: float | Tensor | None) -> Tensor | None:
        """Tokens of the step per process for dapo, cispo and vespo; else the batch's own count."""
        if self.loss_type not in ("dapo", "cispo", "vespo"):
            return None
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        ranks = torch.distributed.get_world_size() if parallel else 1
        if items is None:
            total = mask.sum().float()
            if parallel:
                torch.distributed.all_reduce(total)
        else:
            total = torch.as_tensor(items, dtype=torch.float32, device=mask.device)
        return total / ranks

    @torch.no_grad()
    def _metrics(
        self,
        logprob: Tensor,
        old: Tensor | None,
        ref: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, ...]:
        """Liger's metrics, means over the kept tokens."""
        spec, tokens = self.spec, mask.sum().clamp(min=1)
        delta = torch.zeros_like(logprob)
        if old is not None:
            delta = torch.where(mask, logprob - old.float(), 0.0)
        if spec.ratio_level == "sequence":
            delta = delta.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ratio, a = delta.exp(), advantages[:, None]
        clipped = torch.zeros_like(ratio, dtype=torch.bool)
        if spec.objective == "clip":
            clipped = (ratio < 1 - spec.clip_low) & (a < 0)
            clipped = clipped | ((ratio > 1 + spec.clip_high) & (a > 0))
        elif spec.objective == "cispo":
            clipped = (ratio > spec.cispo_high) & (a > 0)
        share = (clipped & mask).sum() / tokens
        if self.beta == 0:
            return (share,)
        if ref is None:
            return torch.zeros_like(share), share
        d = torch.where(mask, ref.float() - logprob, 0.0)
        kl = d.exp() - d - 1
        if spec.kl_ratio_weighted:
            kl = kl * ratio
        return torch.where(mask, kl, 0.0).sum() / tokens, share
