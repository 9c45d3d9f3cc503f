"""logits -> loss -> dloss/dlogits while each row is at hand, all of it in the forward."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pyrl.losses.linear import gradient_scale
from pyrl.ops.backend import OneReadBackend, load, once_differentiable
from pyrl.ops.linear_logprob import check_targets
from pyrl.ops.logits_logprob import matrix
from pyrl.ops.policy_objective import Fields, canonical_tokens, closed_form
from pyrl.ops.spec import METRICS, LossSpec


class Tokens(NamedTuple):
    """What is known of every row beside its logits, [T]: `Fields` without bounds, and"""

    target: Tensor
    inv_temperature: Tensor
    old: Tensor | None
    ref: Tensor | None
    rollout: Tensor | None
    advantage: Tensor
    weight: Tensor
    keep: Tensor


def one_read_loss(
    logits: Tensor,
    target: Tensor,
    inv_temperature: Tensor,
    fields: Fields,
    spec: LossSpec,
    backend: str,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (0-d), logprob [T], entropy [T], metrics of logits [..., V]; T tokens, none coupled.

    The gradient is formed now, in the memory of the logits with `inplace` (under torch.compile in
    a new tensor all the same), and handed over by the first backward; a second raises RuntimeError.
    """
    assert fields.bounds is None
    arguments = (logits, *Tokens(target, inv_temperature, *fields[:6]), spec.to_json(), backend)
    if inplace and not torch.compiler.is_compiling():
        return cast("tuple[Tensor, Tensor, Tensor, Tensor]", _Overwrite.apply(*arguments))
    loss, logprob, entropy, metrics, *_ = _one_read(*arguments)
    return loss, logprob, entropy, metrics


def _rows(logits: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """`matrix`, without an index where the rows are those of a contiguous tensor in order."""
    if logits.is_contiguous():
        return logits.view(-1, logits.shape[-1]), None
    return matrix(logits)


def _form_(
    dlogits: Tensor, logits: Tensor | None, tokens: Tokens, spec: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dlogits <- s dloss/dlogits, of the logits that dlogits itself holds if none are given; loss,
    logprob, entropy, metrics, s."""
    check_targets(tokens.target, tokens.keep, dlogits.shape[-1])
    loss_spec = LossSpec.from_json(spec)
    kernels = cast(OneReadBackend, closed_form(backend, loss_spec))
    found = _rows(dlogits if logits is None else logits)
    if found is None:
        assert logits is not None  # in place it was refused
        found = _rows(logits.contiguous())
    assert found is not None
    z, rows = found
    params, scale_up = loss_spec.params(), gradient_scale(tokens.weight, dlogits.dtype)
    logprob, entropy, _ = kernels.logits_policy_grad_(
        z if logits is None else dlogits.view(-1, dlogits.shape[-1]),
        tokens.target,
        tokens.inv_temperature,
        loss_spec.logit_scale,
        loss_spec.softcap or 0.0,
        tokens.old,
        tokens.ref,
        tokens.rollout,
        tokens.advantage,
        tokens.weight * scale_up,
        tokens.keep,
        params,
        rows=rows,
        source=None if logits is None else z,
    )
    # The loss and its metrics in one reduction over all tokens.
    logp, ent, fields = canonical_tokens(logprob, entropy, Fields(*tokens[2:], None))
    loss, _, _, metrics = kernels.objective_terms(logp, ent, *fields, params)
    return loss, logprob, entropy, metrics, scale_up


def _scale_(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """gradient *= factor; with a factor of 1, as after loss.backward(), it is not even read."""
    found = _rows(gradient)
    assert found is not None
    cast(OneReadBackend, load(backend)).logits_scale_(found[0], factor, rows=found[1])


_SECOND = (
    "logits_policy_loss with gradient_in_forward=True: backward ran a second time; its gradient "
    "was formed in the forward and handed over in the first"
)


class _Overwrite(torch.autograd.Function):
    """The gradient where the logits were."""

    @staticmethod
    def forward(ctx, logits, *rest):
        *tokens, spec, ctx.backend = rest
        gradient = logits.detach()
        formed = _form_(gradient, None, Tokens(*tokens), spec, ctx.backend)
        loss, logprob, entropy, metrics, ctx.scale = formed
        # Whoever saved the logits for a backward of their own hears of it there.
        torch.autograd.graph.increment_version(gradient)
        ctx.gradient, ctx.version = gradient, gradient._version
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logprob, entropy, metrics)
        return loss, logprob, entropy, metrics

    @staticmethod
    def backward(ctx, g, *_):
        if g is None:  # downstream wants no gradient of the loss
            return (None,) * 11
        once_differentiable("logits_policy_loss")
        if ctx.gradient is None:
            raise RuntimeError(_SECOND)
        if ctx.gradient._version != ctx.version:
            raise RuntimeError(
                "logits_policy_loss with inplace_backward=True, gradient_in_forward=True: the "
                "memory of the logits holds their gradient since the call, and was written after it"
            )
        gradient, ctx.gradient = ctx.gradient, None
        _scale_(gradient, g / ctx.scale, ctx.backend)
        return gradient, *([None] * 10)


@torch.library.custom_op("pyrl::logits_policy_loss", mutates_args=())
def _one_read(
    logits: Tensor,
    target: Tensor,
    inv_temperature: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    rollout: Tensor | None,
    advantage: Tensor,
    token_weight: Tensor,
    keep: Tensor,
    spec: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, logprob [T], entropy [T], metrics, s, and s dloss/dlogits in a new tensor."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    tokens = Tokens(target, inv_temperature, old, ref, rollout, advantage, token_weight, keep)
    return *_form_(dlogits, logits, tokens, spec, backend), dlogits


@_one_read.register_fake
def _(logits, target, *rest):
    vector = logits.new_empty(target.shape, dtype=torch.float32)
    metrics = logits.new_empty(len(METRICS), dtype=torch.float64)
    zero_dim = vector.new_empty(())
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return zero_dim, vector, torch.empty_like(vector), metrics, torch.empty_like(zero_dim), dlogits


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)  # zeros of the logits' size for an output nobody uses
    ctx.save_for_backward(output[4], output[5])
    ctx.backend, ctx.done = inputs[-1], False


def _backward(ctx, g, *_):
    if g is None:
        return (None,) * 11
    once_differentiable("logits_policy_loss")
    if ctx.done:
        raise RuntimeError(_SECOND)
    scale, gradient = (v.detach() for v in ctx.saved_tensors)
    factor = g / scale
    # A traced graph must not write what its forward saved, and traces tensors of another class.
    if torch.compiler.is_compiling() or type(gradient) is not Tensor:
        gradient = (gradient.float() * factor).to(gradient.dtype)
    else:
        ctx.done = True
        _scale_(gradient, factor, ctx.backend)
    return gradient, *([None] * 10)


_one_read.register_autograd(_backward, setup_context=_setup)
