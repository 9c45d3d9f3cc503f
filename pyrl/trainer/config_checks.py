"""What a recipe's sections must have in common, and what is allowed and may surprise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyrl.algorithms.advantages import JUDGES
from pyrl.algorithms.pairs import LOSS as PAIR_LOSS
from pyrl.algorithms.shaping import RewardTerms
from pyrl.trainer.algorithm_config import Stage

if TYPE_CHECKING:
    from pyrl.trainer.config import Config

#: Advantage methods that subtract the mean of their group.
GROUP_BASELINE = ("grpo", "mean", "rloo", "batch_std", "whiten_baseline")


def check_parts(config: Config) -> None:
    """ValueError for settings that contradict each other or would do nothing."""
    loss, n = config.loss.spec(max_length=config.rollout.max_new_tokens), config.rollout.n
    if config.advantage.method == "pairs":
        dpo = {name: getattr(loss, name) for name in PAIR_LOSS} == PAIR_LOSS
        if not dpo or loss.kl_coef or loss.entropy_coef:
            given = {name: getattr(loss, name) for name in PAIR_LOSS}
            raise ValueError(
                f"advantage.method = 'pairs' (iterative DPO) is computed through [loss] "
                f"{PAIR_LOSS}, with no KL or entropy term; its own settings are in "
                f"[preference]. Here: {given}, kl_coef {loss.kl_coef:g}, entropy_coef "
                f"{loss.entropy_coef:g}"
            )
        if n < 2:
            raise ValueError(f"advantage.method = 'pairs' needs rollout.n >= 2, got {n}")
    if config.advantage.method in ("gae", "pairs") and config.advantage.filter:
        raise ValueError(f"advantage.filter = {config.advantage.filter}: "
                         f"advantage.method = {config.advantage.method!r} has none")  # fmt: skip
    method = config.advantage.method
    try:
        terms = RewardTerms(**config.reward.model_dump())
        terms.terms(0, "stop", max_new_tokens=config.rollout.max_new_tokens, step=1)
    except ValueError as error:
        raise ValueError(f"reward.{error}") from None
    if terms != RewardTerms() and method in JUDGES:
        raise ValueError(f"[reward]: advantage.method = {method!r} only says which completions "
                         "are accepted, and would not see its terms")  # fmt: skip
    for key in ("unbiased", "eps") if method in ("gae", "pairs") else ():
        if getattr(config.advantage, key) != type(config.advantage).model_fields[key].default:
            raise ValueError(f"advantage.{key}: advantage.method = {method!r} has none")
    budget = config.budget
    for name, needed, used in (
        ("critic", 'advantage.method = "gae"', method == "gae"),
        ("preference", 'advantage.method = "pairs"', method == "pairs"),
        ("budget", 'budget.kind = "gvm" or "online"', budget.kind != "uniform"),
    ):
        section = getattr(config, name)
        for key, field in type(section).model_fields.items():
            value = getattr(section, key)
            if not used and value != field.get_default(call_default_factory=True):
                raise ValueError(f"{name}.{key} = {value!r} does nothing without {needed}")
    if budget.prompt_weight != "none" and method in ("gae", "pairs"):
        raise ValueError(f"budget.prompt_weight = {budget.prompt_weight!r} does nothing with "
                         f"advantage.method = {method!r}")  # fmt: skip
    if budget.group_size == 1 and config.has_group_baseline:
        raise ValueError(f"budget.group_size = 1: advantage.method = {method!r} compares the "
                         "completions of a group, and needs two")  # fmt: skip
    if budget.kind != "uniform" and config.rollout.refill_rounds:
        raise ValueError(
            f"budget.kind = {budget.kind!r} decides about a step's prompts: "
            f"rollout.refill_rounds = {config.rollout.refill_rounds} would replace them"
        )
    if budget.kind == "gvm" and budget.count_pilot and budget.pilot_samples >= n:
        raise ValueError(
            f"budget.pilot_samples = {budget.pilot_samples} leaves nothing of rollout.n = {n}: "
            "sample fewer in the pilot, or set budget.count_pilot = false"
        )
    if config.reset.active and config.train.reference == "step":
        raise ValueError("reset: train.reference = 'step' is the current policy already")
    if config.reset.needs_validation and not (config.eval.every and config.eval.prompts):
        raise ValueError("reset.patience and reset.drop_tol look at evaluations during training"
                         ": set eval.every and eval.prompts")  # fmt: skip
    if config.reset.blend and not any(config.reset.blend.values()):
        raise ValueError(f"reset.blend = {config.reset.blend}: every weight is 0")
    if 0 < config.eval.prompts < len(config.task.mix):
        raise ValueError(f"eval.prompts = {config.eval.prompts}: expected at least one for each of "
                         f"the {len(config.task.mix)} domains of task.mix, or 0")  # fmt: skip
    for domain in config.reset.blend:
        if domain not in config.task.mix:
            raise ValueError(f"reset.blend.{domain}: the domains are {list(config.task.mix)}")


def check_stage(config: Config, where: str, stage: Stage) -> None:
    """ValueError for a change that a stage of this recipe cannot make."""
    for domain, part in stage.task.get("mix", {}).items():
        keys = list(part) if isinstance(part, dict) else [part]
        if domain not in config.task.mix or keys != ["weight"]:
            raise ValueError(f"{where}: task.mix.{domain}: a stage may change the weight of "
                             f"{list(config.task.mix)}, got {keys}")  # fmt: skip
    implied = config.method_of(stage.loss["preset"]) if "preset" in stage.loss else None
    if implied not in (None, config.advantage.method):
        raise ValueError(
            f"{where}: loss.preset = {stage.loss['preset']!r} goes with advantage.method = "
            f"{implied!r}, and a run has one method, here {config.advantage.method!r}"
        )
    if stage.reset and config.train.reference == "step":
        raise ValueError(f"{where}: reset = true with train.reference = 'step', which is the "
                         "current policy already")  # fmt: skip


def warnings(config: Config) -> list[str]:
    """What is allowed and may surprise."""
    found = []
    if config.rollout.n == 1 and config.advantage.method in GROUP_BASELINE:
        found.append(
            f"rollout.n = 1 with advantage.method = {config.advantage.method!r}: a group of one "
            "has no baseline (rloo: no advantage at all); use n >= 2 or method = 'raw'"
        )
    if config.rollout.top_p < 1 or config.rollout.top_k > 0:
        found.append(
            "rollout.top_p/top_k truncate the sampling distribution; the training log-probs "
            "are those of the whole vocabulary, so every gradient is slightly off-policy"
        )
    centred = config.advantage.method in GROUP_BASELINE and config.rollout.n > 1
    if centred and config.train.updates_per_step * config.train.passes == 1:
        found.append(
            "the loss will read about 0: on-policy the ratio is 1 and a group's advantages sum "
            "to 0. Its gradient is not 0; reward and gradient norm tell how training goes"
        )
    resets = config.reset.active or any(stage.reset for stage in config.stages)
    if resets and not config.needs_ref:
        found.append("resets without a KL term (loss.kl_coef = 0): there is no reference, so "
                     "a reset only starts the optimizer anew")  # fmt: skip
    planned = sum(stage.steps for stage in config.stages)
    if config.stages and 0 < config.train.steps != planned:
        found.append(f"train.steps = {config.train.steps}, and the stages add up to {planned}: "
                     + ("the last one goes on" if config.train.steps > planned
                        else "the run ends before they do"))  # fmt: skip
    for first, steps in config.stretches():
        budget = config.at(first).budget
        if budget.kind == "gvm" and steps % budget.steps:
            found.append(
                f"budget.steps = {budget.steps} does not divide the {steps} steps from step {first}"
                " on: the last pilot is not used up"
            )
    if config.rollout.refill_rounds and config.advantage.method == "raw":
        found.append("rollout.refill_rounds replaces groups that advantage.method = 'raw' uses")
    return found
