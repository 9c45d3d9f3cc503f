"""What a step goes by: the recipe as its stage has it, and the parts made from that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

from pyrl.algorithms import (
    GVM,
    Budget,
    Credit,
    GroupCredit,
    Online,
    PairCredit,
    RewardTerms,
    Uniform,
)
from pyrl.models.policy import Head
from pyrl.ops.spec import LossSpec
from pyrl.rollout import SamplingParams
from pyrl.trainer.config import Config


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of one stage; without stages, of the run."""

    config: Config
    spec: LossSpec
    params: SamplingParams
    terms: RewardTerms


def make_setting(config: Config, head: Head, stop_token_ids: tuple[int, ...]) -> Setting:
    """`config` is that of a stage; `head` and the stop tokens are the model's."""
    sampling = config.rollout
    spec = config.loss.spec(
        temperature=sampling.temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        max_length=sampling.max_new_tokens,
    )
    params = SamplingParams(
        n=sampling.n,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=stop_token_ids,
    )
    return Setting(config, spec, params, RewardTerms(**config.reward.model_dump()))


def make_budget(config: Config, key: Callable[[tuple[str, int]], Hashable]) -> Budget:
    """The stage's budget, from its beginning. `key` tells places of the same prompt."""
    prompts, n = config.rollout.prompts_per_step, config.rollout.n
    settings = config.budget.model_dump(exclude={"kind", "gradient", "accept"})
    if settings["minimum"] is None:
        settings["minimum"] = 2 if config.has_group_baseline else 1
    if config.budget.kind == "uniform":
        return Uniform(prompts, n)
    if config.budget.kind == "gvm":
        return GVM(prompts, n, **settings)
    for name in ("pilot_samples", "steps", "count_pilot", "drop_easy", "drop_hard"):
        del settings[name]
    return Online(prompts, n, key=key, **settings)


def make_credit(config: Config, device: object, critic: Credit | None) -> Credit:
    """From rewards to advantages, as `advantage.method` says; the critic's is made once a run."""
    if config.advantage.method == "gae":
        assert critic is not None
        return critic
    if config.advantage.method == "pairs":
        return PairCredit(
            **config.preference.model_dump(), mask_truncated=config.train.mask_truncated
        )
    return GroupCredit(
        **config.advantage.model_dump(), device=str(device), backend=config.train.backend
    )
