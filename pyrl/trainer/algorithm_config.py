"""The tables of a recipe that make one algorithm of another: `[budget]`, `[reward]`, `[critic]`,
`[preference]`, `[reset]` and the `[[stages]]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pyrl.trainer.loss_config import Section


class BudgetConfig(Section):
    """How many completions each prompt gets."""

    kind: Literal["uniform", "gvm", "online"] = "uniform"
    """uniform: rollout.n each; gvm: n_i by the gradient's variance, estimated on a pilot of every
    shard of prompts (arXiv 2505.02391); online: the same from what training itself sampled of the
    prompt before, without a pilot."""
    alpha: PositiveFloat = 1e-3
    """n_i is in proportion to G/sqrt(p + alpha/p^(beta-1)): regularises prompts that are hardly
    ever solved."""
    beta: float = Field(default=2.0, ge=2)
    """Exponent of that regularisation."""
    minimum: PositiveInt | None = None
    """A prompt gets at least so many completions, or (gvm) none; none = 2 where advantages compare
    the completions of a group, else 1."""
    maximum: PositiveInt | None = None
    """Completions of one prompt at most; none = as many as its share of the shard."""
    gradient: Literal["lm_head", "embed", "all"] = "lm_head"
    """Parameters whose gradient's norm is G: the head (a forward suffices), the input embedding, or
    all that is trained."""
    accept: float = 1.0
    """Reward from which a completion is accepted."""
    pilot_samples: PositiveInt = 8
    """gvm: completions of each prompt in the pilot."""
    steps: PositiveInt = 9
    """gvm: steps that one pilot serves; their prompts are the shard. A run whose steps are no
    multiple of it pays for a pilot that it does not use up."""
    count_pilot: bool = True
    """gvm: the pilot's completions are taken out of the shard's rollout.n a prompt, which must be
    more than pilot_samples; otherwise they come on top."""
    drop_easy: float | None = Field(default=None, gt=0, le=1)
    """gvm: prompts with a greater accept rate get nothing."""
    drop_hard: float | None = Field(default=None, ge=0)
    """gvm: prompts of which fewer than this many of rollout.n completions would be accepted get
    nothing."""
    group_size: NonNegativeInt = 0
    """0: one group of n_i; k: groups of k, the last with what is left over."""
    prompt_weight: Literal["none", "inverse_np", "inverse_accepted"] = "none"
    """Weight of a prompt's advantages: 1, 1/(n_i p_i) or 1/(its accepted completions), with mean 1
    over the step."""


class RewardConfig(Section):
    """Terms added to the task's reward; filters and reported rewards do not see them."""

    overlong_buffer: NonNegativeInt = 0
    """DAPO's soft punishment falls from 0 to -overlong_penalty over the last so many tokens before
    max_new_tokens; 0 = none."""
    overlong_penalty: NonNegativeFloat = 1.0
    """Its greatest amount."""
    cosine_low: float = 0.0
    """ProRL's length term at max_new_tokens: low + (high-low)/2 (1 + cos(pi length/max))."""
    cosine_high: float = 0.0
    """ProRL's length term at length 0."""
    cosine_on: NonNegativeInt = 0
    """Steps for which the length term is on; 0 = never."""
    cosine_off: NonNegativeInt = 0
    """Steps for which it is then off, and so on in turn."""
    nontermination_penalty: NonNegativeFloat = 0.0
    """Taken from the reward of a completion that max_new_tokens cut off."""


class CriticConfig(Section):
    """PPO's critic, with advantage.method = "gae": a copy of the model with a value head."""

    lr: PositiveFloat = 1e-5
    """Learning rate, shaped by the optimizer's warm-up and schedule."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """GAE's lambda."""
    value_clip: PositiveFloat | None = 0.5
    """Bound on a value's distance from its old one in the loss; none = unbounded."""
    whiten: bool = True
    """Advantages to mean 0 and standard deviation 1 over the step's tokens."""


class PreferenceConfig(Section):
    """Iterative DPO, with advantage.method = "pairs"."""

    beta: PositiveFloat = 0.1
    """Weight of the log-ratio to the reference in a pair's margin."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs taken to be the wrong way round."""


class ResetConfig(Section):
    """When the KL term's reference becomes the current policy (ProRL, arXiv 2505.24864)."""

    every: NonNegativeInt = 0
    """Steps between resets; 0 = not by time."""
    patience: NonNegativeInt = 0
    """Evaluations in a row without an improvement of min_delta; 0 = not by stalling."""
    min_delta: NonNegativeFloat = 0.0
    """What counts as an improvement of the validation."""
    drop_tol: PositiveFloat | None = None
    """Fall of the validation below its best that calls for a reset; none = not by falling."""
    kl_spike: float | None = Field(default=None, gt=1)
    """Multiple of the median KL since the last reset that calls for one; none = not by KL."""
    optimizer: bool = True
    """Whether AdamW's moments start anew too."""
    blend: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Weights of the domains' held-out rewards in the validation; none given: equal ones."""

    @property
    def active(self) -> bool:
        """Whether anything can call for a reset."""
        return bool(self.every or self.kl_spike) or self.needs_validation

    @property
    def needs_validation(self) -> bool:
        """Whether it looks at evaluations during training."""
        return bool(self.patience) or self.drop_tol is not None


#: Section -> its keys that a stage may change: what the model, its memory and the identity of the
#: data depend on stays.
STAGED: dict[str, tuple[str, ...] | None] = {
    "rollout": (
        "prompts_per_step",
        "n",
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "refill_rounds",
    ),
    "loss": None,  # all
    "advantage": ("filter", "filter_mode", "unbiased", "eps", "reward_map"),
    "reward": None,
    "budget": None,
    "optimizer": ("lr", "warmup_steps", "max_grad_norm"),
    "train": ("updates_per_step", "passes", "mask_truncated", "tokens_per_row"),
    "task": ("mix",),
}


class Stage(Section):
    """A stretch of a run with settings of its own; what it does not name is the recipe's."""

    name: str = ""
    """For the log."""
    steps: PositiveInt
    """Its length; the last stage goes on to the end of the run."""
    reset: bool = False
    """Begin with a reset of the reference (and of the optimizer, as `reset.optimizer` says)."""
    # The sections of STAGED, checked as a whole recipe once they are put in.
    rollout: dict[str, Any] = Field(default_factory=dict)
    loss: dict[str, Any] = Field(default_factory=dict)
    advantage: dict[str, Any] = Field(default_factory=dict)
    reward: dict[str, Any] = Field(default_factory=dict)
    budget: dict[str, Any] = Field(default_factory=dict)
    optimizer: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    task: dict[str, Any] = Field(default_factory=dict)

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """Section -> the keys it changes."""
        return {name: value for name in STAGED if (value := getattr(self, name))}

    @pydantic.model_validator(mode="after")
    def _changes_what_can_change(self) -> Stage:
        for section, values in self.changes.items():
            allowed = STAGED[section]
            for key in values:
                if allowed is not None and key not in allowed:
                    raise ValueError(f"{section}.{key}: a stage may change {', '.join(allowed)} of "
                                     f"[{section}]")  # fmt: skip
        return self


def merged(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with the leaves of `over` put in."""
    found = dict(tree)
    for key, value in over.items():
        old = found.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        found[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return found
