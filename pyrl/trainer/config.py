"""What a run is made of: one pydantic section per part, every field with its docstring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pydantic
import tomli_w
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.fields import FieldInfo

from pyrl.algorithms.pairs import LOSS as PAIR_LOSS
from pyrl.algorithms.shaping import RewardTerms
from pyrl.trainer.algorithm_config import (
    BudgetConfig,
    CriticConfig,
    PreferenceConfig,
    ResetConfig,
    RewardConfig,
    Stage,
    merged,
)
from pyrl.trainer.loss_config import LossConfig, Section
from pyrl.trainer.sampling_config import ModelConfig, RolloutConfig, TaskConfig, flatten

#: Loss presets that name an algorithm with advantages of its own, and `advantage.method` for them
#: where none is given.
PRESET_METHODS = {
    "raft": "positive",
    "raft++": "positive",
    "dr_grpo": "mean",
    "rloo": "rloo",
    "ppo": "gae",
}

#: Keys that may differ between a run and its resumption: they change no number of a step.
FREE_ON_RESUME = (
    "train.steps",
    "train.threads",
    "train.preflight",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.save_model",
    "task.workers",
    "task.deadline",
    "tracking",
)


class AdvantageConfig(Section):
    """From rewards to advantages, group by group."""

    method: Literal[
        "grpo",
        "mean",
        "rloo",
        "positive",
        "raw",
        "batch_std",
        "whiten",
        "whiten_baseline",
        "correct",
        "scaled",
        "gae",
        "pairs",
    ] = "grpo"
    """grpo (r-mean)/(std+eps); mean r-mean; rloo r-mean of the others; positive 1[r=max]; raw r;
    correct 1[r>0]; batch_std (r-mean)/(std of the batch+eps); whiten: by the batch's mean and std;
    scaled r/(std+eps); whiten_baseline: r-mean of the group, whitened; gae: a critic's, a value a
    token (PPO); pairs: best against worst of the group (iterative DPO). Where it is not given,
    `loss.preset` decides: raft and raft++ positive, dr_grpo mean, rloo rloo, ppo gae, all others
    grpo."""
    filter: list[Literal["drop_all_correct", "drop_all_wrong", "drop_zero_std"]] = Field(
        default_factory=list
    )
    """Groups that give no advantage: every r > 0, every r <= 0, all r equal."""
    filter_mode: Literal["zero", "drop"] = "zero"
    """zero: filtered tokens stay in the denominators; drop: they leave the batch."""
    unbiased: bool = True
    """Standard deviation with ddof=1."""
    eps: NonNegativeFloat = 1e-6
    """Added to the standard deviation."""
    reward_map: Literal["identity", "signed"] = "identity"
    """signed: 2r-1, which turns rewards in {0, 1} into {-1, 1} before the advantages."""


class OptimizerConfig(Section):
    """AdamW over fp32 masters."""

    lr: NonNegativeFloat = 1e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment, each in [0, 1)."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay of matrices; never of norms and biases."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly to its peak."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up; cosine and linear end at `final_lr_share` of the peak."""
    final_lr_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak that cosine and linear end at."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 = never."""

    @pydantic.field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("expected two numbers in [0, 1)")
        return value


class TrainSection(Section):
    """The loop."""

    steps: NonNegativeInt = 100
    """Steps: one batch sampled each."""
    updates_per_step: PositiveInt = 1
    """Optimizer updates of a step: its batch is split into that many minibatches."""
    passes: PositiveInt = 1
    """How often a step's batch is gone through."""
    tokens_per_row: PositiveInt = 2048
    """Token budget of a micro-batch; changes speed and memory, never the gradient. A longer sample
    widens it."""
    packing: Literal["shared", "plain", "off"] = "shared"
    """shared: what several samples of a micro-batch begin with is computed once; plain: samples end
    to end; off: every sample is a micro-batch. Speed and memory change, never the gradient. Where
    it is not given, an attention that cannot share has plain."""
    preflight: Literal["auto", "on", "off"] = "auto"
    """Run the largest micro-batch there can be before the first step, so that what does not fit
    into memory fails at once; auto: on a GPU."""
    mask_truncated: bool = False
    """Completions cut off by max_new_tokens carry no loss and count in no denominator."""
    reference: Literal["initial", "step"] = "initial"
    """What a KL term is taken against: a frozen copy of the initial weights, or only the
    log-probs at the start of the step (no second model)."""
    seed: NonNegativeInt = 0
    """Every random draw is a function of this, the step and the purpose."""
    threads: NonNegativeInt = 0
    """CPU threads of torch; 0 leaves torch's choice. Bit-equal resumption needs the same number."""
    backend: str | None = None
    """Implementation of the fused ops; none = the best one for the device."""
    checkpoint_every: NonNegativeInt = 10
    """Steps between checkpoints; 0 = only at Ctrl-C and at the end."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    save_model: bool = True
    """Write the final model as a Hugging Face folder."""


class EvalConfig(Section):
    """Held-out prompts, scored before and after training."""

    prompts: NonNegativeInt = 64
    """Held-out prompts (at most what the task has); 0 = no evaluation."""
    samples: PositiveInt = 4
    """Completions of each."""
    every: NonNegativeInt = 0
    """Steps between evaluations during training; 0 = only before and after."""
    temperature: PositiveFloat | None = None
    """Sampling temperature; none = the rollout's."""
    success: float = 1.0
    """Least reward of a completion that counts as a success in pass@k."""


class TrackingConfig(Section):
    """What is kept of a run."""

    sinks: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Where metrics go, beside metrics.jsonl."""
    folder: str = "runs"
    """Where run folders are made when no `--run` is given."""
    samples_per_step: NonNegativeInt = 4
    """Completions a step that are kept in samples.jsonl."""


#: Advantage methods that subtract the mean of their group.
_GROUP_BASELINE = ("grpo", "mean", "rloo", "batch_std", "whiten_baseline")


class Config(Section):
    """A training run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)
    preference: PreferenceConfig = Field(default_factory=PreferenceConfig)
    reset: ResetConfig = Field(default_factory=ResetConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    stages: list[Stage] = Field(default_factory=list)
    """What changes in the course of the run; a [[stages]] table each."""
    _staged: list[Config] = pydantic.PrivateAttr(default_factory=list)

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Config:
        if "method" not in self.advantage.model_fields_set:
            method = PRESET_METHODS.get(self.loss.preset, "grpo")
            self.advantage = self.advantage.model_copy(update={"method": method})
        if self.model.attention != "pyrl_tree" and self.train.packing == "shared":
            if "packing" in self.train.model_fields_set:
                raise ValueError(
                    f"train.packing = 'shared' needs model.attention = 'pyrl_tree', "
                    f"not {self.model.attention!r}"
                )
            self.train = self.train.model_copy(update={"packing": "plain"})
        completions = self.rollout.prompts_per_step * self.rollout.n
        if self.train.updates_per_step > completions:
            raise ValueError(
                f"train.updates_per_step = {self.train.updates_per_step}: expected at most "
                f"rollout.prompts_per_step * rollout.n = {completions}"
            )
        self._parts_fit()
        self._make_stages()
        return self

    def _parts_fit(self) -> None:
        loss, n = self.loss.spec(max_length=self.rollout.max_new_tokens), self.rollout.n
        if self.advantage.method == "pairs":
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
        if self.advantage.method in ("gae", "pairs") and self.advantage.filter:
            raise ValueError(f"advantage.filter = {self.advantage.filter}: "
                             f"advantage.method = {self.advantage.method!r} has none")  # fmt: skip
        terms = RewardTerms(**self.reward.model_dump())
        terms.terms(0, "stop", max_new_tokens=self.rollout.max_new_tokens, step=1)
        budget = self.budget
        if budget.kind != "uniform" and self.rollout.refill_rounds:
            raise ValueError(
                f"budget.kind = {budget.kind!r} decides about a step's prompts: "
                f"rollout.refill_rounds = {self.rollout.refill_rounds} would replace them"
            )
        if budget.kind == "gvm" and budget.count_pilot and budget.pilot_samples >= n:
            raise ValueError(
                f"budget.pilot_samples = {budget.pilot_samples} leaves nothing of rollout.n = {n}: "
                "sample fewer in the pilot, or set budget.count_pilot = false"
            )
        if self.reset.active and self.train.reference == "step":
            raise ValueError("reset: train.reference = 'step' is the current policy already")
        if self.reset.needs_validation and not (self.eval.every and self.eval.prompts):
            raise ValueError("reset.patience and reset.drop_tol look at evaluations during training"
                             ": set eval.every")  # fmt: skip
        for domain in self.reset.blend:
            if domain not in self.task.mix:
                raise ValueError(f"reset.blend.{domain}: the domains are {list(self.task.mix)}")

    def _make_stages(self) -> None:
        if self.stages and "steps" not in self.train.model_fields_set:
            steps = sum(stage.steps for stage in self.stages)
            self.train = self.train.model_copy(update={"steps": steps})
            self.train.model_fields_set.add("steps")
        base = self.model_dump(mode="json", exclude={"stages"}, exclude_none=True)
        for i, stage in enumerate(self.stages):
            try:
                self._staged.append(type(self).model_validate(merged(base, stage.changes)))
            except pydantic.ValidationError as error:
                first = error.errors()[0]
                key = ".".join(map(str, first["loc"]))
                message = first["msg"].removeprefix("Value error, ")
                shown = f"{key} = {first['input']!r}: " if key.count(".") else ""
                raise ValueError(f"stages[{i}]: {shown}{message}") from None

    @property
    def has_group_baseline(self) -> bool:
        """Whether a completion is compared with the others of its group, if there are any."""
        return self.rollout.n > 1 and self.advantage.method in (*_GROUP_BASELINE, "scaled", "pairs")

    def stage(self, step: int) -> int:
        """Which of `stages` the step (1, 2, ...) is in; -1 without stages."""
        end = 0
        for i, stage in enumerate(self.stages):
            end += stage.steps
            if step <= end:
                return i
        return len(self.stages) - 1

    def at(self, step: int) -> Config:
        """The recipe as it is in the step: with what its stage changes."""
        return self._staged[self.stage(step)] if self.stages else self

    def begins_stage(self, step: int) -> Stage | None:
        """The stage whose first step this is."""
        i = self.stage(step)
        first = 1 + sum(stage.steps for stage in self.stages[:i])
        return self.stages[i] if self.stages and step == first else None

    @property
    def needs_ref(self) -> bool:
        """Whether any step compares with a reference."""
        specs = [c.loss.spec(max_length=1) for c in (self, *self._staged)]
        return self.advantage.method == "pairs" or any(spec.needs_ref for spec in specs)

    def warnings(self) -> list[str]:
        """What is allowed and may surprise."""
        found = []
        if self.rollout.n == 1 and self.advantage.method in _GROUP_BASELINE:
            found.append(
                f"rollout.n = 1 with advantage.method = {self.advantage.method!r}: a group of one "
                "has no baseline (rloo: no advantage at all); use n >= 2 or method = 'raw'"
            )
        if self.rollout.top_p < 1 or self.rollout.top_k > 0:
            found.append(
                "rollout.top_p/top_k truncate the sampling distribution; the training log-probs "
                "are those of the whole vocabulary, so every gradient is slightly off-policy"
            )
        centred = self.advantage.method in _GROUP_BASELINE and self.rollout.n > 1
        if centred and self.train.updates_per_step * self.train.passes == 1:
            found.append(
                "the loss will read about 0: on-policy the ratio is 1 and a group's advantages sum "
                "to 0. Its gradient is not 0; reward and gradient norm tell how training goes"
            )
        if self.rollout.refill_rounds and self.advantage.method == "raw":
            found.append("rollout.refill_rounds replaces groups that advantage.method = 'raw' uses")
        return found

    def to_toml(self) -> str:
        """The resolved recipe: what `load` reads back to an equal Config (None = key left out)."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def identity(self) -> dict[str, Any]:
        """Dotted key -> value of all that decides a run's numbers (see FREE_ON_RESUME)."""
        flat = dict(flatten(self.model_dump(mode="json")))
        free = [k for k in flat if k in FREE_ON_RESUME or k.split(".")[0] in FREE_ON_RESUME]
        if self.optimizer.schedule != "constant":
            free.remove("train.steps")  # the learning rate depends on it
        return {k: v for k, v in flat.items() if k not in free}


def flags() -> Iterator[tuple[str, FieldInfo]]:
    """("section.key", field) for every value of a Config, in the order of a recipe."""
    for section, info in Config.model_fields.items():
        if section == "stages":  # a list of tables: no flag could hold one
            continue
        assert isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        for key, field in info.annotation.model_fields.items():
            yield f"{section}.{key}", field
