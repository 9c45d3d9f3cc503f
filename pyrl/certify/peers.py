"""What installed peers compute on the same inputs, beside our float64 oracle."""

from __future__ import annotations

import dataclasses
import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import pyrl
from pyrl import LossSpec
from pyrl.certify.batches import Shape, head, numbers
from pyrl.certify.measure import distance

#: fp32 formulas evaluated in another order: what two right implementations may differ by.
AGREES = 1e-4
#: Prefix masks, every completion with a token: what both peers are written for.
SHAPE = Shape(name="peers", lengths=(7, 3, 12, 5), kept=1.0, padded=True)
B, L = len(SHAPE.lengths), max(SHAPE.lengths)


@dataclasses.dataclass
class Comparison:
    """One peer on one case."""

    peer: str
    case: str
    loss: float = 0.0
    gradient: float = 0.0
    verdict: str = "agrees"
    ran: bool = True
    failures: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Case:
    """A peer's settings and the spec that states the same loss.

    `differs` says how the peer's loss is another one than its name promises; `spec` is then the
    formula that the peer really uses.
    """

    name: str
    settings: dict[str, Any]
    spec: LossSpec
    differs: str = ""


def _case(name: str, preset: str, settings: dict[str, Any], differs: str = "", **spec: Any) -> Case:
    return Case(name, settings, LossSpec.preset(preset, **spec), differs)


_SEQUENCE = {"importance_sampling_level": "sequence"}
_CLIP = {"clip_low": 0.2, "clip_high": 0.2}

#: What TRL and Liger both offer, in TRL's names.
COMMON = (
    _case("grpo", "grpo", {"loss_type": "grpo"}),
    _case("bnpo", "bnpo", {"loss_type": "bnpo"}),
    _case("dr_grpo", "dr_grpo", {"loss_type": "dr_grpo"}, max_length=L),
    _case("dapo, clip-higher", "dapo", {"loss_type": "dapo", "epsilon_high": 0.28}),
    _case("two-sided clipping (delta)", "grpo", {"loss_type": "grpo", "delta": 1.3}, delta=1.3),
    _case("cispo", "cispo", {"loss_type": "cispo", "epsilon_high": 1.2}, cispo_high=1.2),
    _case("sapo", "sapo", {"loss_type": "sapo"}),
    _case("vespo", "vespo", {"loss_type": "vespo"}),
    _case("gspo", "gspo", {"loss_type": "grpo", **_SEQUENCE}, **_CLIP),
    _case("luspo", "luspo", {"loss_type": "luspo", **_SEQUENCE}),
    _case("KL k3", "grpo", {"loss_type": "grpo", "beta": 0.1}, kl_coef=0.1),
    _case(
        "KL k3 times ratio",
        "grpo",
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
        kl_coef=0.1,
        kl_ratio_weighted=True,
    ),
    _case(
        "KL k3 times sequence ratio",
        "gspo",
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True, **_SEQUENCE},
        kl_coef=0.1,
        kl_ratio_weighted=True,
        **_CLIP,
    ),
    _case(
        "truncated importance sampling",
        "dapo",
        {"loss_type": "dapo", "correction": True},
        correction="tis",
        clip_high=0.2,
    ),
    _case(
        "vespo, corrected", "vespo", {"loss_type": "vespo", "correction": True}, correction="tis"
    ),
)
TRL = (
    *COMMON,
    _case(
        "off-policy sequence mask",
        "grpo",
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
        off_policy_threshold=0.05,
    ),
    _case("entropy bonus", "bnpo", {"loss_type": "bnpo", "entropy_coef": 0.02}, entropy_coef=0.02),
)


def compare() -> list[Comparison]:
    """Every peer that is installed, and a row that says why for the others."""
    found = []
    for name, package, cases, run in (
        ("TRL", "trl", TRL, _trl),
        ("Liger-Kernel", "liger-kernel", COMMON, _liger),
    ):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            found.append(Comparison(name, "all", ran=False, verdict="not installed"))
            continue
        found += [_judge(f"{name} {version}", case, run) for case in cases]
    return [*found, *_verl()]


def _judge(
    peer: str, case: Case, run: Callable[[Case], tuple[list[Tensor], list[Tensor]]]
) -> Comparison:
    theirs, ours = run(case)
    errors = [distance(a, b) for a, b in zip(theirs, ours, strict=True)]
    row = Comparison(peer, case.name, errors[0], max(errors[1:]), case.differs or "agrees")
    if not max(errors) <= AGREES:
        row.verdict = f"**{'is not the formula named' if case.differs else 'differs'}**"
        row.failures.append(f"{peer} · {case.name}: off by {max(errors):.2e}, allowed {AGREES:.0e}")
    return row


def _oracle(case: Case, batch: dict[str, Tensor], leaves: dict[str, Tensor]) -> list[Tensor]:
    """Loss and gradients of our oracle for the batch; leaves: logprob+entropy or hidden+weight."""
    leaves = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    fields = {k: batch[k] for k in ("old_logprob", "ref_logprob", "rollout_logprob", "mask")}
    if "logprob" in leaves:
        out = pyrl.policy_objective(
            leaves["logprob"], batch["advantages"], case.spec, entropy=leaves["entropy"],
            backend="reference", **fields,
        )  # fmt: skip
    else:
        out = pyrl.linear_policy_loss(
            leaves["hidden"], leaves["weight"], batch["target"], batch["advantages"], case.spec,
            backend="reference", **fields,
        )  # fmt: skip
    out.loss.backward()
    return [out.loss, *_gradients(leaves)]


def _gradients(leaves: dict[str, Tensor]) -> Iterator[Tensor]:
    for leaf in leaves.values():
        yield torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _correction(batch: dict[str, Tensor], spec: LossSpec) -> Tensor:
    """The ratio that TRL's generation step prepares: 1 outside the mask."""
    ratio = torch.where(batch["mask"], batch["old_logprob"] - batch["rollout_logprob"], 0.0).exp()
    return ratio.clamp(spec.correction_low, spec.correction_high)


def _trl(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """GRPOTrainer's own `_compute_loss` over log-probs that we hand it."""
    trainer_class = importlib.import_module("trl").GRPOTrainer
    batch = numbers(SHAPE)
    leaves = {k: batch[k].clone().requires_grad_() for k in ("logprob", "entropy")}
    mask, settings = batch["mask"].long(), dict(case.settings)
    corrected = settings.pop("correction", False)
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x, sync_gradients=True, device=mask.device,
    )  # fmt: skip
    values = {
        "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2,
        "epsilon_high": 0.2, "beta": 0.0, "top_entropy_quantile": 1.0, "entropy_coef": 0.0,
        "off_policy_mask_threshold": None, "max_completion_length": L,
        "vllm_importance_sampling_correction": corrected, "use_vllm": corrected,
        "current_gradient_accumulation_steps": 1, "aux_loss_enabled": False,
        "use_adaptive_entropy": False, "accelerator": accelerator, "use_liger_kernel": False,
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list)},
    } | settings  # fmt: skip
    values["_entropy_bonus_enabled"] = values["entropy_coef"] != 0
    values["args"] = SimpleNamespace(
        delta=settings.get("delta"), steps_per_generation=1,
        use_bias_correction_kl=settings.get("use_bias_correction_kl", False),
        sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
    )  # fmt: skip
    trainer = SimpleNamespace(
        **values,
        get_off_policy_mask=trainer_class.get_off_policy_mask,
        get_gamma_weights=trainer_class.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            leaves["logprob"], leaves["entropy"], None
        ),
    )  # fmt: skip
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1],
        "completion_ids": mask, "completion_mask": mask,
        "advantages": batch["advantages"], "num_items_in_batch": mask.sum(),
        "old_per_token_logps": batch["old_logprob"],
        "ref_per_token_logps": batch["ref_logprob"],
        "sampling_per_token_logps": batch["rollout_logprob"],
    }  # fmt: skip
    if corrected:
        inputs["importance_sampling_ratio"] = _correction(batch, case.spec)
    loss = trainer_class._compute_loss(trainer, None, inputs)
    loss.backward()
    return [loss, *_gradients(leaves)], _oracle(
        case, batch, {k: batch[k] for k in ("logprob", "entropy")}
    )


def _liger(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """`LigerFusedLinearGRPOLoss` on hidden states and head."""
    chunked = importlib.import_module("liger_kernel.chunked_loss")
    batch, tensors = numbers(SHAPE), head(SHAPE, torch.float32)
    with torch.no_grad():
        own = pyrl.linear_logprob(
            tensors["hidden"], tensors["weight"], tensors["target"], backend="reference"
        ).logprob
    shift = own - batch["logprob"]
    for name in ("old_logprob", "ref_logprob", "rollout_logprob"):
        batch[name] = batch[name] + shift
    batch["target"] = tensors["target"]
    leaves = {k: tensors[k].clone().requires_grad_() for k in ("hidden", "weight")}
    settings = {"beta": 0.0, "max_completion_length": L, **case.settings}
    corrected = settings.pop("correction", False)
    module = chunked.LigerFusedLinearGRPOLoss(compiled=False, use_ref_model=True, **settings)
    loss, _ = module(
        leaves["hidden"], leaves["weight"], batch["target"], batch["mask"].long(),
        batch["advantages"], ref_per_token_logps=batch["ref_logprob"],
        old_per_token_logps=batch["old_logprob"],
        vllm_is_ratio=_correction(batch, case.spec) if corrected else None,
        num_items_in_batch=batch["mask"].sum(),
    )  # fmt: skip
    loss.backward()
    return [loss, *_gradients(leaves)], _oracle(
        case, batch, {k: tensors[k] for k in ("hidden", "weight")}
    )


def _verl() -> list[Comparison]:
    return []
