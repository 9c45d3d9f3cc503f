"""Rows of the policy losses: what is measured, what is true, and what plain torch makes of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

import pyrl
from pyrl import LossSpec
from pyrl.certify.batches import Shape, head, laid_out, numbers, pad, support_masks, support_of
from pyrl.certify.rule import Row, Sample, Values, gradients, judge, leaves_of
from pyrl.ops import reference
from pyrl.ops.objective import policy_objective_terms
from pyrl.ops.policy_objective import collect
from pyrl.ops.shapes import layout

#: What `policy_objective` takes besides log-prob, entropy and advantages, per token.
FIELDS = ("old_logprob", "ref_logprob", "rollout_logprob", "weights")
RANK, LORA_SCALE, PADDING = 3, 0.7, 13
#: What a batch must keep to (see `_Inputs.condition`), and how many seeds are tried.
CANCELS, JUMPS, SEEDS = 20.0, 2e-3, 40
#: How far the rounding of logits may move a log-prob.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 0.03, torch.float16: 0.004}


def objective_row(
    section: str, case: str, spec: LossSpec, shape: Shape, backends: Sequence[str], option: str = ""
) -> Row:
    """`policy_objective`: the loss and its gradients by log-prob and entropy."""
    batch = numbers(shape)
    tensors = {k: batch.pop(k) for k in ("logprob", "entropy")}

    def compute(backend: str) -> Values:
        leaves = leaves_of(laid_out(tensors, shape))
        fields = laid_out(batch, shape)
        advantages = fields.pop("advantages")
        out = pyrl.policy_objective(
            leaves["logprob"], advantages, spec, entropy=leaves["entropy"], backend=backend,
            **fields,
        )  # fmt: skip
        out.loss.backward()
        return {"loss": out.loss, **gradients(leaves)}

    def formula(dtype: torch.dtype) -> Values:
        leaves = leaves_of(tensors, dtype)
        loss = _objective(leaves["logprob"], leaves["entropy"], spec, batch)
        loss.backward()
        return _unpacked({"loss": loss, **gradients(leaves)}, shape)

    row = Row(section=section, case=case, option=option, shape=shape.name, dtype=torch.float32,
              plain=None)  # fmt: skip
    sample = Sample(formula(torch.float64), formula(torch.float32), compute)
    return judge(row, backends, [sample])


def linear_row(
    section: str, case: str, spec: LossSpec, shape: Shape, dtype: torch.dtype,
    backends: Sequence[str], option: str = "", *, head_options: Collection[str] = ("bias",),
    logits: bool = False, batches: int = 1,
) -> Row:  # fmt: skip
    """`linear_policy_loss` (or `logits_policy_loss`): the loss and the gradient of every input.

    With several `batches`, errors are root mean squares over them.
    """
    chosen = _well_conditioned(
        batches, lambda seed: _Inputs(spec, shape, dtype, head_options, logits, seed)
    )
    row = Row(section=section, case=case, option=option, shape=shape.name, dtype=dtype, plain=None)
    return judge(row, backends, [Sample(x.truth, x.plain, x.compute) for x in chosen])


def _well_conditioned(count: int, make: Callable[[int], _Inputs]) -> list[_Inputs]:
    """The inputs of the first `count` seeds that measure arithmetic; see `_Inputs.condition`.

    The least bad of the first SEEDS make up for what is missing.
    """
    scored: list[tuple[float, int, _Inputs]] = []
    for seed in range(SEEDS):
        inputs = make(seed)
        scored.append((max(1.0, inputs.condition()), seed, inputs))
        if sum(score <= 1.0 for score, _, _ in scored) == count:
            break
    return [inputs for _, _, inputs in sorted(scored, key=lambda s: s[:2])[:count]]


class _Inputs:
    """Head tensors and fields whose log-probs lie around the head's own, packed.

    head_options: "bias", "lora" (a and b of rank 3), "padded vocabulary" (rows of the weight behind
    it), "temperature per token", "reference head" (ref_hidden and ref_weight, no ref_logprob),
    "in place" (logits: the gradient takes their memory).
    """

    def __init__(
        self, spec: LossSpec, shape: Shape, dtype: torch.dtype, options: Collection[str],
        logits: bool, seed: int,
    ) -> None:  # fmt: skip
        self.spec, self.shape, self.dtype, self.options = spec, shape, dtype, options
        self.leaves, self.batch = head(shape, dtype, seed), numbers(shape, seed)
        self.target = self.leaves.pop("target")
        if "bias" not in options and not shape.banned:
            del self.leaves["bias"]
        g = torch.Generator().manual_seed(5)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g).to(self.target.device)

        if "lora" in options:
            self.leaves["a"] = (normal(RANK, shape.width) / 2).to(dtype)
            self.leaves["b"] = (normal(shape.vocabulary, RANK) / 2).to(dtype)
        self.vocabulary = shape.vocabulary - ("padded vocabulary" in options) * PADDING
        self.target = self.target % self.vocabulary
        self.temperature = torch.full((shape.tokens,), spec.temperature, device=self.target.device)
        if "temperature per token" in options:
            self.temperature = 0.5 + normal(shape.tokens).abs()
        self.masks = support_masks(shape, self.target)
        self.ref: Values = {}
        with torch.no_grad():
            if logits:
                self.leaves = {"logits": self._project(self.leaves)}
            elif "reference head" in options:
                self.ref = {
                    "hidden": (self.leaves["hidden"] + 0.1 * normal(shape.tokens, shape.width)),
                    "weight": self.leaves["weight"] + 0.02 * normal(shape.vocabulary, shape.width),
                }
                self.ref = {k: v.to(dtype) for k, v in self.ref.items()}
            shift = self.exact(leaves_of(self.leaves, torch.float64))[0] - self.batch.pop("logprob")
        for name in FIELDS[:3]:
            self.batch[name] = (self.batch[name] + shift).float()
        del self.batch["entropy"]

    def condition(self) -> float:
        """At most 1 where the batch measures arithmetic, by the oracle alone.

        The loss must not be a difference of far larger terms, sum |logp dL/dlogp| <= CANCELS |L|:
        rounding log-probs once to fp32 costs 6e-8 times that. And no token may lie so near an edge
        of the objective that the rounding of half-precision logits alone decides its gradient.
        """
        leaves = leaves_of(self.leaves, torch.float64)
        logprob, entropy = (v.detach() for v in self.exact(leaves))
        fields = self.fields(leaves)

        def gradient(shift: float) -> tuple[Tensor, Tensor]:
            leaf = (logprob + shift).requires_grad_()
            loss = _objective(leaf, entropy, self.spec, fields)
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]

        loss, here = gradient(0.0)
        if loss == 0:
            return 0.0
        cancels = ((logprob * here).abs().sum() / loss.abs()).item() / CANCELS
        if (reach := ROUNDING[self.dtype]) == 0:
            return cancels
        # Equal steps change a smooth gradient about equally; an edge is within one of them.
        steps = torch.stack([gradient(reach * k / 2)[1] for k in (-2, -1, 0, 1, 2)]).diff(dim=0)
        jump = (steps.amax(0) - steps.amin(0)).max() / here.abs().max()
        return max(cancels, jump.item() / JUMPS)

    def compute(self, backend: str) -> Values:
        """What is measured."""
        leaves = leaves_of(laid_out(self.leaves, self.shape))
        return _backward(self.loss(leaves, backend), leaves, self.loss_scale)

    @functools.cached_property
    def truth(self) -> Values:
        """float64 autograd of the oracle."""
        leaves = leaves_of(self.leaves, torch.float64)
        loss = _objective(*self.exact(leaves), self.spec, self.fields(leaves))
        return _unpacked(_backward(loss, leaves), self.shape)

    @property
    def plain(self) -> Values:
        """Plain torch in the inputs' dtype."""
        leaves = leaves_of(self.leaves)
        loss = _objective(*self.naive(leaves), self.spec, self.fields(leaves))
        return _unpacked(_backward(loss, leaves, self.loss_scale), self.shape)

    @property
    def loss_scale(self) -> float:
        """A power of two that brings f16 gradients near 256, as a gradient scaler finds it."""
        found = (g for name, g in self.truth.items() if name != "loss" and g.numel())
        largest = max((g.abs().max().item() for g in found), default=0.0)
        if self.dtype != torch.float16 or largest == 0:
            return 1.0
        return 2.0 ** min(100, math.floor(math.log2(256 / largest)))

    def loss(self, leaves: Values, backend: str) -> Tensor:
        """The measured call."""
        shape, spec = self.shape, self.spec
        fields = laid_out({k: v for k, v in self.batch.items() if k != "weights"}, shape)
        per_token = laid_out({"target": self.target, "weights": self.batch["weights"]}, shape)
        advantages = fields.pop("advantages")
        common: dict[str, Any] = {
            **fields, "weights": per_token["weights"], "backend": backend,
            "support": None if self.masks is None else support_of(shape, self.masks),
        }  # fmt: skip
        if "temperature per token" in self.options:
            common["temperature"] = self.temperature
        if "logits" in leaves:
            in_place = "in place" in self.options
            z = leaves["logits"] * 1 if in_place else leaves["logits"]  # not a leaf
            return pyrl.logits_policy_loss(
                z, per_token["target"], advantages, spec, inplace_backward=in_place, **common
            ).loss
        if "lora" in self.options:
            common["lora"] = pyrl.LoRA(leaves["a"], leaves["b"], LORA_SCALE)
        if "padded vocabulary" in self.options:
            common["vocab_size"] = self.vocabulary
        if self.ref:
            del common["ref_logprob"]
            common |= {"ref_hidden": self.ref["hidden"], "ref_weight": self.ref["weight"]}
        return pyrl.linear_policy_loss(
            leaves["hidden"], leaves["weight"], per_token["target"], advantages, spec,
            bias=leaves.get("bias"), **common,
        ).loss  # fmt: skip

    def fields(self, leaves: Values) -> dict[str, Tensor]:
        """The fields of the objective; the reference's log-prob by the head where it has one."""
        if not self.ref:
            return self.batch
        double = leaves["hidden"].dtype == torch.float64
        with torch.no_grad():
            given = {k: v.to(leaves["hidden"].dtype) for k, v in self.ref.items()}
            given |= {"bias": leaves["bias"].detach()} if "bias" in leaves else {}
            ref = (self.exact(given) if double else self.naive(given))[0]
        return self.batch | {"ref_logprob": ref}

    def exact(self, leaves: Values) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy of the oracle in float64."""
        support = (None, None) if self.masks is None else pyrl.Support.from_masks(self.masks)
        rest = (
            self.temperature.double().reciprocal(), self.spec.softcap or 0.0, self.spec.logit_scale,
            self.batch["mask"], *support,
        )  # fmt: skip
        if "logits" in leaves:
            return reference.logits_logprob(leaves["logits"], self.target, *rest)[:2]
        weight = leaves["weight"]
        if "a" in leaves:
            weight = weight + LORA_SCALE * leaves["b"] @ leaves["a"]
        bias = leaves["bias"][: self.vocabulary] if "bias" in leaves else None
        return reference.linear_logprob(
            leaves["hidden"], weight[: self.vocabulary], self.target, bias, *rest
        )[:2]

    def naive(self, leaves: Values) -> tuple[Tensor, Tensor]:
        """What one writes in torch: all logits in the inputs' dtype, fp32 log_softmax, autograd."""
        spec = self.spec
        z = (leaves["logits"] if "logits" in leaves else self._project(leaves)).float()
        z = z * spec.logit_scale
        z = z if spec.softcap is None else spec.softcap * torch.tanh(z / spec.softcap)
        z = z / self.temperature[:, None]
        if self.masks is not None:
            z = z.masked_fill(~self.masks, -torch.inf)
        logp = z.log_softmax(-1)
        p = logp.exp()
        entropy = -torch.where(p > 0, p * torch.where(p > 0, logp, 0.0), 0.0).sum(-1)
        return logp.gather(-1, self.target[:, None])[:, 0], entropy

    def _project(self, leaves: Values) -> Tensor:
        x, v, linear = leaves["hidden"], self.vocabulary, torch.nn.functional.linear
        z = linear(x, leaves["weight"][:v], leaves["bias"][:v] if "bias" in leaves else None)
        if "a" not in leaves:
            return z
        return z + LORA_SCALE * linear(linear(x, leaves["a"]), leaves["b"][:v])  # as peft does


def _objective(
    logprob: Tensor, entropy: Tensor, spec: LossSpec, batch: dict[str, Tensor]
) -> Tensor:
    """The loss of the objective's formula in the dtype of log-prob: float64 is the oracle."""
    where = layout(logprob, batch["mask"], batch["cu_seqlens"])
    given = {name: batch[name] for name in FIELDS}
    fields = collect(where, spec, batch["advantages"], denominator=None, **given)
    if logprob.dtype == torch.float64:
        fields = fields.double()
    return policy_objective_terms(logprob, entropy, *fields, spec)[0]


def _backward(loss: Tensor, leaves: Values, scale: float = 1.0) -> Values:
    """The loss and its gradients by the leaves, formed at `scale` times the loss."""
    (loss * scale).backward()
    found = {name: g.double() / scale for name, g in gradients(leaves).items()}
    return {"loss": loss.detach(), **found}


def _unpacked(values: Values, shape: Shape) -> Values:
    """Packed gradients in the layout of the shape: padding has none."""
    per_token = ("dlogprob", "dentropy", "dhidden", "dlogits")
    if not shape.padded:
        return values
    return {k: pad(v, shape, 0.0) if k in per_token else v for k, v in values.items()}
