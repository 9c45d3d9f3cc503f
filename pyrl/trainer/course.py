"""What changes in the course of a run: its stage, the budget, the credit and the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pyrl.algorithms import Budget, Credit, CriticCredit, ResetRule
from pyrl.trainer.config import Config, OptimizerConfig, Stage
from pyrl.trainer.optimizer import MasterAdamW
from pyrl.trainer.setting import Setting, make_budget, make_credit
from pyrl.trainer.setup import Parts


@dataclasses.dataclass
class Course:
    """The parts that have a state beside the weights; made anew where a stage begins."""

    config: Config
    parts: Parts
    stage: int
    setting: Setting
    budget: Budget
    credit: Credit
    rule: ResetRule
    """When the reference becomes the policy."""

    @classmethod
    def begin(cls, config: Config, parts: Parts, step: int) -> Course:
        """As it is at the beginning of the stage of `step`."""
        critic = None
        if parts.critic is not None:
            settings = config.optimizer.model_dump() | {"lr": config.critic.lr}
            critic = CriticCredit(
                parts.critic,
                MasterAdamW(parts.critic, OptimizerConfig(**settings)),
                **config.critic.model_dump() | {"value_clip": config.critic.value_clip or None},
                reward_map=config.advantage.reward_map,
            )
        stage = config.stage(step)
        now = config.at(step)
        return cls(
            config,
            parts,
            stage,
            parts.settings[stage],
            make_budget(now, parts.prompts.key),
            make_credit(now, parts.policy.device, critic),
            ResetRule(
                patience=config.reset.patience,
                min_delta=config.reset.min_delta,
                drop_tol=config.reset.drop_tol,
                every=config.reset.every,
                kl_spike=config.reset.kl_spike,
            ),
        )

    def facts(self) -> dict[str, str]:
        """For the headline of a run: what makes its algorithm."""
        config = self.config
        found = {"advantages": ", ".join([config.advantage.method, *config.advantage.filter])}
        if config.rollout.refill_rounds:
            found["advantages"] += f", up to {config.rollout.refill_rounds} rounds of refilling"
        if config.budget.kind != "uniform":
            found["budget"] = f"{config.budget.kind}, norms of {config.budget.gradient} gradients"
        if config.reset.active:
            rules = {"every": "{} steps", "patience": "{} evaluations without a gain",
                     "drop_tol": "a fall of {}", "kl_spike": "{} times the median KL"}  # fmt: skip
            on = [text.format(value) for key, text in rules.items()
                  if (value := getattr(config.reset, key))]  # fmt: skip
            found["resets"] = f"after {' or '.join(on)}"
        if config.stages:
            names = [stage.name or str(i + 1) for i, stage in enumerate(config.stages)]
            found["stages"] = ", ".join(names)
        return found

    def enter(self, step: int) -> Stage | None:
        """Goes on to the stage of `step`; returns it where it begins there."""
        begins = self.config.begins_stage(step)
        if begins is not None and self.stage != self.config.stage(step):
            before, now = self.setting.config, self.config.at(step)
            self.stage = self.config.stage(step)
            self.setting = self.parts.settings[self.stage]
            if not now.shares_budget(before):  # else a shard goes on
                self.budget = make_budget(now, self.parts.prompts.key)
            self.credit = make_credit(now, self.parts.policy.device, self.credit)
        return begins

    def reason_to_reset(self, step: int, validation: float | None, kl: float | None) -> str | None:
        """Why the reference is due, or None. validation: blended held-out reward, if evaluated."""
        if not self.config.reset.active:
            return None
        return self.rule.observe(step, validation=validation, kl=kl)

    def state_dict(self, resets: int) -> dict[str, Any]:
        """For a checkpoint; the reference only where it is no longer the initial one."""
        reference = self.parts.reference
        return {
            "stage": self.stage,
            "budget": self.budget.state_dict(),
            "credit": self.credit.state_dict(),
            "rule": self.rule.state_dict(),
            "reference": reference.state_dict() if reference is not None and resets else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave. The budget of a stage before goes on as in `enter`."""
        before = self.parts.settings[state["stage"]].config
        if before.shares_budget(self.setting.config):
            self.budget.load_state_dict(state["budget"])
        self.credit.load_state_dict(state["credit"])
        self.rule.load_state_dict(state["rule"])
        if state["reference"] is not None and self.parts.reference is not None:
            self.parts.reference.load_state_dict(state["reference"])
