"""Narrow waist 2: all loss mathematics on `[T]` vectors; knows no logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrl.ops import deterministic
from pyrl.ops.backend import Backend, load, once_differentiable, select
from pyrl.ops.objective import policy_objective_terms
from pyrl.ops.shapes import Layout, check_finite, flat_float, layout, per_token, token_weights
from pyrl.ops.spec import METRICS, OBJECTIVES, PARAMS, LossSpec

#: Backends that differentiate the formula itself instead of returning closed-form gradients.
FORMULA_BACKENDS = ("reference", "torch")


class PolicyLoss(NamedTuple):
    """A loss with its metrics, and the detached log-probs and entropies where logits were given."""

    loss: Tensor
    """fp32 0-d."""
    metrics: dict[str, Tensor]
    """float64 0-d sums and counts (`METRICS`, "sequences"); `reduce_metrics` merges them."""
    logprob: Tensor | None = None
    """fp32, shaped like target, detached."""
    entropy: Tensor | None = None
    """fp32, shaped like target, detached."""


class Fields(NamedTuple):
    """Per-token inputs of the objective: fp32 [T], detached; `keep` bool [T]."""

    old: Tensor | None
    ref: Tensor | None
    rollout: Tensor | None
    advantage: Tensor
    weight: Tensor
    keep: Tensor
    bounds: Tensor | None
    """int64 [B + 1] where the spec couples the tokens of a sequence, else None."""

    def rows(self, index: Tensor | slice) -> Fields:
        """The fields of some tokens, for a spec whose tokens do not depend on each other."""
        assert self.bounds is None
        return Fields._make(None if v is None else v[index] for v in self)

    def double(self) -> Fields:
        """The same fields in float64, for the oracle."""
        return Fields._make(
            v.double() if v is not None and v.is_floating_point() else v for v in self
        )


def policy_objective(
    logprob: Tensor,
    advantages: Tensor,
    spec: LossSpec,
    *,
    entropy: Tensor | None = None,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """sum_t weight_t (correction_t policy_t + kl_coef KL_t - entropy_coef H_t) over kept tokens.

    The terms are written out in `LossSpec`.

    logprob [T] with `cu_seqlens` [B + 1], or [B, L] with `mask`; both give the same loss ·
    advantages shaped like logprob (per token), else [B] (per sequence) · entropy, old_logprob,
    ref_logprob, rollout_logprob like logprob; old None or NaN at t = on-policy there (ratio 1, with
    gradient); ref NaN at t = no KL there; rollout NaN at t = unscored, correction 1 · mask true =
    token carries loss · weights for aggregation="weighted", which alone reads them ·
    denominator: tokens (token_mean), sum of weights (weighted) or sequences of the whole optimizer
    step.

    Differentiable in logprob and entropy. ValueError names a wrong shape, device, missing input,
    or (on the CPU) a non-finite advantage and its position.
    """
    if not logprob.is_floating_point():
        raise ValueError(f"logprob: expected a floating dtype, got {logprob.dtype}")
    where = layout(logprob, mask, cu_seqlens)
    name = select(backend, logprob.device)
    fields = collect(
        where,
        spec,
        advantages,
        old_logprob=old_logprob,
        ref_logprob=ref_logprob,
        rollout_logprob=rollout_logprob,
        weights=weights,
        denominator=denominator,
    )
    if entropy is None and spec.needs_entropy:
        raise ValueError(f"LossSpec.entropy_coef={spec.entropy_coef} needs entropy")
    if entropy is not None:
        flat_float("entropy", entropy, where)
        entropy = entropy.reshape(-1)
    flat = logprob.reshape(-1)
    # Autograd carries the gradient back through these casts to the caller's dtype.
    if name in FORMULA_BACKENDS and flat.device.type != "mps":  # which has no float64
        flat, fields = flat.double(), fields.double()
        entropy = None if entropy is None else entropy.double()
    else:
        flat = flat.float().contiguous()
        entropy = None if entropy is None else entropy.float().contiguous()
    flat, entropy, fields = canonical_tokens(flat, entropy, fields)
    if name in FORMULA_BACKENDS:
        loss, metrics = policy_objective_terms(flat, entropy, *fields, spec)
    else:
        loss, _, _, metrics = _policy_objective(flat, entropy, *fields, spec.to_json(), name)
    return PolicyLoss(loss.float(), named_metrics(metrics.detach(), where))


def collect(
    where: Layout,
    spec: LossSpec,
    advantages: Tensor,
    *,
    old_logprob: Tensor | None,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
    weights: Tensor | None,
    denominator: float | Tensor | None,
) -> Fields:
    """Checks the caller's fields and flattens them; shared by every policy loss."""
    if not isinstance(spec, LossSpec):
        raise ValueError(f"spec: expected a LossSpec, got {type(spec).__name__}")
    if spec.needs_ref and ref_logprob is None:
        raise ValueError(f"LossSpec.kl_coef={spec.kl_coef} needs ref_logprob")
    if spec.needs_rollout and rollout_logprob is None:
        raise ValueError(f"LossSpec.correction={spec.correction!r} needs rollout_logprob")
    if spec.couples_tokens and where.cu_seqlens is None:
        raise ValueError(f"this loss needs the sequences: packed [T] without cu_seqlens ({spec})")
    old = flat_float("old_logprob", old_logprob, where)
    if old is not None:
        check_finite("old_logprob", old, where.keep & ~old.isnan())
    ref = flat_float("ref_logprob", ref_logprob, where)
    if ref is not None:
        check_finite("ref_logprob", ref, where.keep & ~ref.isnan())
    rollout = flat_float("rollout_logprob", rollout_logprob, where)
    if rollout is not None:
        check_finite("rollout_logprob", rollout, where.keep & ~rollout.isnan())
    return Fields(
        old,
        ref,
        rollout,
        per_token("advantages", advantages, where),
        token_weights(spec, where, weights, denominator),
        where.keep,
        where.cu_seqlens if spec.couples_tokens else None,
    )


def canonical_tokens(
    logprob: Tensor, entropy: Tensor | None, fields: Fields
) -> tuple[Tensor, Tensor | None, Fields]:
    """In deterministic mode the kept tokens alone, in an order that depends only on what they hold,
    where tokens are coupled by whole sequences; else everything as it is."""
    if not deterministic.enabled():
        return logprob, entropy, fields
    held = (logprob, entropy, *fields[:5])
    if fields.bounds is None:
        index = deterministic.canonical(fields.keep.nonzero()[:, 0], *held)
        bounds = None
    else:
        index, bounds = deterministic.canonical_sequences(fields.keep, fields.bounds, *held)
    fields = fields._replace(bounds=None).rows(index)._replace(bounds=bounds)
    return logprob[index], None if entropy is None else entropy[index], fields


def closed_form(backend: str, spec: LossSpec) -> Backend:
    """The backend's kernels; NotImplementedError if the spec's objective is not among them."""
    kernels = load(backend)
    count = kernels.objectives()
    if spec.params()[PARAMS.index("objective")] >= count:
        raise NotImplementedError(
            f"backend={backend!r} has no objective {spec.objective!r}, only "
            f"{list(OBJECTIVES[:count])}; {' and '.join(FORMULA_BACKENDS)} have every one"
        )
    return kernels


def named_metrics(metrics: Tensor, where: Layout) -> dict[str, Tensor]:
    """The metrics vector by name, and the number of sequences with a kept token if known."""
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    if where.cu_seqlens is not None:
        running = torch.cat([where.keep.new_zeros(1).double(), where.keep.double().cumsum(0)])
        named["sequences"] = (running[where.cu_seqlens].diff() > 0).sum().double()
    return named


@torch.library.custom_op("pyrl::policy_objective", mutates_args=())
def _policy_objective(
    logprob: Tensor,
    entropy: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    keep: Tensor,
    bounds: Tensor | None,
    spec: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, dloss/dlogprob, dloss/dentropy, metrics: one pass gives the loss and its gradient."""
    loss_spec = LossSpec.from_json(spec)
    return closed_form(backend, loss_spec).objective_terms(
        logprob, entropy, old, ref, rollout, advantage, weight, keep, bounds, loss_spec.params()
    )


@_policy_objective.register_fake
def _(logprob, entropy, old, ref, rollout, advantage, weight, keep, bounds, spec, backend):
    metrics = logprob.new_empty(len(METRICS), dtype=torch.float64)
    return logprob.new_empty(()), torch.empty_like(logprob), torch.empty_like(logprob), metrics


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.has_entropy = inputs[1] is not None
    ctx.save_for_backward(output[1], output[2])


def _backward(ctx, g, *_):
    once_differentiable("policy_objective")
    c, h = ctx.saved_tensors
    # Selecting keeps 0 * inf out of tokens that have no gradient.
    dlogprob = torch.where(c != 0, c * g, 0.0)
    dentropy = torch.where(h != 0, h * g, 0.0) if ctx.has_entropy else None
    return dlogprob, dentropy, *([None] * 9)


_policy_objective.register_autograd(_backward, setup_context=_setup)
