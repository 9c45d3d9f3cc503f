"""One certified row: every backend's errors beside plain torch's, against float64 autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pyrl
from pyrl import LossSpec
from pyrl.certify.batches import Shape, head, numbers
from pyrl.parity import MARGIN

#: Quantity (loss, dhidden, …) → value.
Values = dict[str, Tensor]
Compute = Callable[[str], Values]


@dataclasses.dataclass
class Row:
    """Relative errors of one case, the worst over its shapes."""

    section: str
    name: str
    dtype: torch.dtype
    plain: dict[str, float]
    """Quantity → error of plain torch in the same dtype."""
    errors: dict[str, dict[str, float]]
    """Backend → quantity → error."""
    failures: list[str]
    """What broke the rule, in words."""

    def merge(self, other: Row) -> None:
        """Keeps the worst error of each quantity."""
        for ours, theirs in ((self.plain, other.plain), *(
            (self.errors.setdefault(b, {}), e) for b, e in other.errors.items()
        )):  # fmt: skip
            for name, value in theirs.items():
                ours[name] = max(ours.get(name, 0.0), value)
        self.failures += other.failures


def distance(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in float64 (absolute where truth is 0); inf if not finite."""
    value, truth = value.detach().double().flatten(), truth.detach().double().flatten()
    if value.shape != truth.shape or not bool(value.isfinite().all()):
        return float("inf")
    norm = truth.norm().item()
    return (value - truth).norm().item() / (norm if norm > 0 else 1.0)


def judge(
    section: str, name: str, shape: str, dtype: torch.dtype, backends: list[str],
    oracle: Values, plain: Values, compute: Compute,
) -> Row:  # fmt: skip
    """The row of one case on one shape: error(backend) <= error(plain torch) + margin."""
    base = {q: distance(plain[q], oracle[q]) for q in oracle}
    row = Row(section, name, dtype, base, {}, [])
    for backend in backends:
        values = compute(backend)
        found = row.errors[backend] = {q: distance(values[q], oracle[q]) for q in oracle}
        for quantity, error in found.items():
            allowed = base[quantity] + MARGIN[dtype]
            if not error <= allowed:
                row.failures.append(
                    f"{section} · {name} · {shape} · {dtype} · {backend}: {quantity} is off by "
                    f"{error:.2e}, allowed {allowed:.2e}"
                )
    return row


def objective_row(
    section: str, name: str, spec: LossSpec, shape: Shape, backends: list[str]
) -> Row:
    """`policy_objective`: the loss and its gradients by log-prob and entropy."""
    batch = numbers(shape)
    advantages = batch.pop("advantages")

    def compute(backend: str) -> Values:
        leaves = {k: batch[k].clone().requires_grad_() for k in ("logprob", "entropy")}
        rest = {k: v for k, v in batch.items() if k not in leaves}
        out = pyrl.policy_objective(
            leaves["logprob"], advantages, spec, entropy=leaves["entropy"], backend=backend, **rest
        )
        out.loss.backward()
        return {"loss": out.loss, **_gradients(leaves)}

    oracle = compute("reference")
    return judge(
        section, name, shape.name, torch.float32, backends, oracle, compute("torch"), compute
    )


def linear_row(
    section: str, name: str, spec: LossSpec, shape: Shape, dtype: torch.dtype,
    backends: list[str], bias: bool = True, logits: bool = False,
) -> Row:  # fmt: skip
    """`linear_policy_loss` (or `logits_policy_loss`): the loss and the gradient of every input."""
    tensors, fields = _head_inputs(spec, shape, dtype, bias)
    target, advantages = tensors.pop("target"), fields.pop("advantages")

    def project(leaves: Values) -> Tensor:
        return torch.nn.functional.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))

    if logits:
        tensors = {"logits": project(tensors)}

    def compute(backend: str) -> Values:
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        if logits:
            out = pyrl.logits_policy_loss(
                leaves["logits"], target, advantages, spec, backend=backend, **fields
            )
        else:
            out = pyrl.linear_policy_loss(
                leaves["hidden"], leaves["weight"], target, advantages, spec,
                bias=leaves.get("bias"), backend=backend, **fields,
            )  # fmt: skip
        out.loss.backward()
        return {"loss": out.loss, **_gradients(leaves)}

    def plain() -> Values:
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        z = (leaves["logits"] if logits else project(leaves)).float() * spec.logit_scale
        z = z if spec.softcap is None else spec.softcap * torch.tanh(z / spec.softcap)
        logp = (z / spec.temperature).log_softmax(-1)
        p = logp.exp()
        entropy = -torch.where(p > 0, p * torch.where(p > 0, logp, 0.0), 0.0).sum(-1)
        chosen = logp.gather(-1, target[..., None])[..., 0]
        out = pyrl.policy_objective(
            chosen, advantages, spec, entropy=entropy, backend="torch", **fields
        )
        out.loss.backward()
        return {"loss": out.loss, **_gradients(leaves)}

    return judge(section, name, shape.name, dtype, backends, compute("reference"), plain(), compute)


def _head_inputs(
    spec: LossSpec, shape: Shape, dtype: torch.dtype, bias: bool
) -> tuple[Values, dict[str, Any]]:
    """Head tensors, and fields whose log-probs lie around the head's own."""
    tensors, batch = head(shape, dtype), numbers(shape)
    if not bias and shape.banned == 0:
        tensors.pop("bias")
    with torch.no_grad():
        own = pyrl.linear_logprob(
            tensors["hidden"], tensors["weight"], tensors["target"], bias=tensors.get("bias"),
            temperature=spec.temperature, softcap=spec.softcap, logit_scale=spec.logit_scale,
            backend="torch",
        ).logprob  # fmt: skip
    shift = own - batch.pop("logprob")
    for name in ("old_logprob", "ref_logprob", "rollout_logprob"):
        batch[name] = batch[name] + shift
    batch.pop("entropy")
    return tensors, batch


def _gradients(leaves: Values) -> Values:
    return {
        f"d{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }
