"""TRL: GRPOTrainer's own `_compute_loss` over log-probs that we hand it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from pyrl import LossSpec
from pyrl.certify.peers.base import (
    Batch,
    Case,
    L,
    Result,
    batch,
    mix,
    objective,
    options,
    result,
    rows_of,
    weight_of,
)
from pyrl.certify.rule import leaves_of


@dataclasses.dataclass(frozen=True)
class Setting:
    """TRL's options and the preset that states the same loss; Liger takes most of them too."""

    name: str
    theirs: dict[str, Any]
    preset: str
    changes: dict[str, Any]

    @property
    def spec(self) -> LossSpec:
        """Our loss."""
        return LossSpec.preset(self.preset, **self.changes)

    @property
    def ours(self) -> str:
        """The preset and what is changed in it."""
        return ", ".join(filter(None, [self.preset, options(self.changes)]))


def _set(name: str, preset: str, theirs: dict[str, Any], **changes: Any) -> Setting:
    return Setting(name, theirs, preset, changes)


_SEQUENCE = {"importance_sampling_level": "sequence"}
_CLIP = {"clip_low": 0.2, "clip_high": 0.2}
_KL = {"kl_coef": 0.1, "kl_ratio_weighted": True}
_BIAS = {"beta": 0.1, "use_bias_correction_kl": True}

#: What TRL and Liger both offer, in TRL's names.
COMMON = (
    _set("grpo", "grpo", {"loss_type": "grpo"}),
    _set("bnpo", "bnpo", {"loss_type": "bnpo"}),
    _set("dr_grpo", "dr_grpo", {"loss_type": "dr_grpo"}, max_length=L),
    _set("dapo, clip-higher", "dapo", {"loss_type": "dapo", "epsilon_high": 0.28}),
    _set("two-sided clipping", "grpo", {"loss_type": "grpo", "delta": 1.3}, delta=1.3),
    _set("cispo", "cispo", {"loss_type": "cispo", "epsilon_high": 1.2}, cispo_high=1.2),
    _set("sapo", "sapo", {"loss_type": "sapo"}),
    _set("vespo", "vespo", {"loss_type": "vespo"}),
    _set("gspo", "gspo", {"loss_type": "grpo", **_SEQUENCE}, **_CLIP),
    _set("luspo", "luspo", {"loss_type": "luspo", **_SEQUENCE}),
    _set("KL k3", "grpo", {"loss_type": "grpo", "beta": 0.1}, kl_coef=0.1),
    _set("KL k3 times ratio", "grpo", {"loss_type": "grpo", **_BIAS}, **_KL),
    _set("KL k3 times sequence ratio", "gspo", {"loss_type": "grpo", **_BIAS, **_SEQUENCE},
         **_KL, **_CLIP),
    _set("truncated importance sampling", "dapo", {"loss_type": "dapo", "correction": True},
         correction="tis", clip_high=0.2),
    _set("vespo, corrected", "vespo", {"loss_type": "vespo", "correction": True},
         correction="tis"),
)  # fmt: skip
_OWN = (
    _set("luspo, KL k3", "luspo", {"loss_type": "luspo", "beta": 0.1, **_SEQUENCE}, kl_coef=0.1),
    _set("off-policy sequence mask", "grpo",
         {"loss_type": "grpo", "off_policy_mask_threshold": 0.05}, off_policy_threshold=0.05),
    _set("entropy bonus", "bnpo", {"loss_type": "bnpo", "entropy_coef": 0.02}, entropy_coef=0.02),
)  # fmt: skip


def cases() -> Iterator[Case]:
    """Every setting, an all-masked batch, and where TRL's loss is another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the version of a vLLM that nothing here calls
        trainer = importlib.import_module("trl").GRPOTrainer
    run = functools.partial(_run, trainer)
    given = batch()
    for s in (*COMMON, *_OWN):
        yield Case(
            name=s.name, theirs=options(s.theirs), ours=s.ours,
            run=functools.partial(run, given, s.theirs, s.spec),
            oracle=functools.partial(objective, given, s.spec),
        )  # fmt: skip
    empty = given | {"mask": torch.zeros_like(given["mask"])}
    grpo, bnpo = {"loss_type": "grpo"}, {"loss_type": "bnpo"}
    yield Case(
        name="all masked", theirs="loss_type=grpo", ours="grpo",
        run=lambda: run(empty, grpo), oracle=lambda: objective(empty, LossSpec.preset("grpo")),
    )  # fmt: skip
    dirty = batch(behind=torch.nan)
    yield Case(
        name="NaN behind the mask", theirs="loss_type=grpo", ours="grpo",
        run=lambda: run(dirty, grpo), oracle=lambda: objective(dirty, LossSpec.preset("grpo")),
        differs="NaN: their mask multiplies (0 · NaN); ours selects, so what a masked token holds "
        "does not matter",
    )  # fmt: skip

    bonus = LossSpec.preset("grpo", entropy_coef=0.02)
    alone = LossSpec(objective="reinforce", entropy_coef=0.02)
    quiet = given | {"advantages": torch.zeros_like(given["advantages"])}
    yield Case(
        name="entropy bonus under grpo", theirs="loss_type=grpo, entropy_coef=0.02",
        ours="grpo, entropy_coef=0.02",
        run=lambda: run(given, {**grpo, "entropy_coef": 0.02}),
        oracle=lambda: objective(given, bonus),
        formula=lambda: mix([objective(given, LossSpec.preset("grpo")), objective(quiet, alone)],
                            1, 1),
        differs="theirs is a mean over the tokens of the micro-batch whatever the loss_type; ours "
        "is aggregated as the policy term is, so coefficient and gradient do not depend on how "
        "sequences are batched",
    )  # fmt: skip
    halves = [rows_of(given, slice(0, 2)), rows_of(given, slice(2, None))]
    spec = LossSpec.preset("bnpo")
    total = float(given["mask"].sum())

    def stacked(parts: list[Result], factor: float = 1.0) -> Result:
        loss = factor * torch.stack([p[0] for p in parts]).sum()
        return [loss, *(factor * torch.cat(g) for g in zip(*(p[1:] for p in parts), strict=True))]

    yield Case(
        name="bnpo in 2 micro-batches of 10 and 17 tokens",
        theirs="loss_type=bnpo, gradient_accumulation_steps=2", ours="bnpo, denominator=27",
        run=lambda: stacked([run(half, {**bnpo, "steps": 2}) for half in halves]),
        oracle=lambda: stacked([objective(half, spec, denominator=total) for half in halves]),
        formula=lambda: stacked([objective(half, spec) for half in halves], 0.5),
        differs="theirs is the mean of the two token means: a token weighs more where its "
        "micro-batch has fewer; ours divides by the step's tokens, so any split gives one gradient",
    )  # fmt: skip


def _run(trainer: Any, given: Batch, settings: dict[str, Any], spec: LossSpec | None = None
         ) -> Result:  # fmt: skip
    leaves = leaves_of({k: given[k] for k in ("logprob", "entropy")})
    mask, settings = given["mask"].long(), dict(settings)
    corrected, steps = settings.pop("correction", False), settings.pop("steps", 1)
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x, sync_gradients=True, device=mask.device,
    )  # fmt: skip
    values = {
        "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2,
        "epsilon_high": 0.2, "beta": 0.0, "top_entropy_quantile": 1.0, "entropy_coef": 0.0,
        "off_policy_mask_threshold": None, "max_completion_length": L,
        "vllm_importance_sampling_correction": corrected, "use_vllm": corrected,
        "current_gradient_accumulation_steps": steps, "aux_loss_enabled": False,
        "use_adaptive_entropy": False, "accelerator": accelerator, "use_liger_kernel": False,
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list)},
    } | settings  # fmt: skip
    values["_entropy_bonus_enabled"] = values["entropy_coef"] != 0
    values["args"] = SimpleNamespace(
        delta=settings.get("delta"), steps_per_generation=steps,
        use_bias_correction_kl=settings.get("use_bias_correction_kl", False),
        sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
    )  # fmt: skip
    stand_in = SimpleNamespace(
        **values,
        get_off_policy_mask=trainer.get_off_policy_mask,
        get_gamma_weights=trainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            leaves["logprob"], leaves["entropy"], None
        ),
    )  # fmt: skip
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1],
        "completion_ids": mask, "completion_mask": mask,
        "advantages": given["advantages"], "num_items_in_batch": mask.sum(),
        "old_per_token_logps": given["old_logprob"],
        "ref_per_token_logps": given["ref_logprob"],
        "sampling_per_token_logps": given["rollout_logprob"],
    }  # fmt: skip
    if corrected and spec is not None:
        inputs["importance_sampling_ratio"] = weight_of(given, spec)
    loss = trainer._compute_loss(stand_in, None, inputs)
    loss.backward()
    return result(loss, leaves)
