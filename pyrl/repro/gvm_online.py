"""Budgets while a policy learns: uniform, GVM with its pilots counted, and ours without a pilot."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pyrl.algorithms import GVM, Budget, Online, PilotResult, Place, Uniform
from pyrl.repro.claim import Arm, Chart, Claim, Line, Result, Table, rounded
from pyrl.repro.statistics import t_interval

QUANTITY = "accuracy, mean over samples"
#: Completions are counted at the ends of shards, where all arms have drawn as many.
SHARD, PILOT = 3, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """As in the variance miniature: logits N(0, 1), and 2 N(0, 1), one a prompt, on its correct
    actions. A step visits every prompt once."""

    prompts: int = 64
    actions: int = 32
    correct: int = 4
    samples: int = 8
    steps: int = 60
    lr: float = 0.3


def budget(arm: str, setting: Setting) -> Budget:
    """The product's budget of an arm; every one spends `samples` a prompt on average."""
    if arm == "uniform":
        return Uniform(setting.prompts, setting.samples)
    if arm == "GVM, pilots counted":
        return GVM(setting.prompts, setting.samples, pilot_samples=PILOT, steps=SHARD)
    return Online(setting.prompts, setting.samples, key=lambda p: p[1] % setting.prompts)


ARMS = ("uniform", "GVM, pilots counted", "online (ours, no pilot)")


class _World:
    """A table of policies that answers pilots and learns from draws."""

    def __init__(self, setting: Setting, seed: int, arm: str) -> None:
        start = np.random.default_rng(seed)
        self.setting, self.position, self.drawn = setting, 0, 0
        self.logits = start.normal(size=(setting.prompts, setting.actions))
        self.logits[:, : setting.correct] += 2 * start.normal(size=(setting.prompts, 1))
        self.rng = np.random.default_rng([seed, ARMS.index(arm)])

    def policy(self, prompt: int) -> np.ndarray:
        shifted = np.exp(self.logits[prompt] - self.logits[prompt].max())
        return shifted / shifted.sum()

    def accuracy(self) -> float:
        every = [self.policy(i)[: self.setting.correct].sum() for i in range(len(self.logits))]
        return float(np.mean(every))

    def take(self, count: int) -> list[Place]:
        first, self.position = self.position, self.position + count
        return [("", first + i) for i in range(count)]

    def sample(self, place: Place, count: int) -> tuple[PilotResult, np.ndarray]:
        """How `count` samples went, and the mean of ∇ log π over the accepted ones [A]."""
        policy = self.policy(place[1] % self.setting.prompts)
        self.drawn += count
        tries = self.rng.choice(len(policy), size=count, p=policy)
        accepted = tries[tries < self.setting.correct]
        gradients = np.eye(len(policy))[accepted] - policy
        if not len(accepted):
            return PilotResult(0, count, 0.0), np.zeros(len(policy))
        norm = float(np.linalg.norm(gradients, axis=1).mean())
        return PilotResult(len(accepted), count, norm), gradients.mean(0)

    def pilot(self, places: list[Place], count: int) -> list[PilotResult]:
        return [self.sample(place, count)[0] for place in places]


def learn(setting: Setting, arm: str, seed: int) -> tuple[list[int], list[float]]:
    """Samples drawn and exact accuracy, at the start and after every shard. An update is
    logits_i += lr mean over the accepted samples of prompt i of ∇ log π: RAFT with 1/|D_i|."""
    world, plan = _World(setting, seed, arm), budget(arm, setting)
    drawn, accuracy = [0], [world.accuracy()]
    for step in range(1, setting.steps + 1):
        draws = plan.plan(step, world.take, world.pilot)
        found = {draw.place: world.sample(draw.place, draw.count) for draw in draws}
        for place, (_, gradient) in found.items():
            world.logits[place[1] % setting.prompts] += setting.lr * gradient
        plan.observe({place: result for place, (result, _) in found.items()})
        if step % SHARD == 0:
            drawn.append(world.drawn)
            accuracy.append(world.accuracy())
    return drawn, accuracy


def online(seeds: int, quick: bool) -> Result:
    """Accuracy against samples under each budget."""
    usual = Setting(prompts=8, steps=6) if quick else Setting()
    runs = {arm: [learn(usual, arm, seed) for seed in range(seeds)] for arm in ARMS}
    result = Result(
        name="gvm-online",
        title="Budgets while the policy learns, pilots counted",
        paper="arXiv 2505.02391; the budget without a pilot is ours",
        published="GVM's curves are against steps and leave the pilots out; 2-4 times fewer steps "
        "to the same reward. Nothing is published of a budget that takes its estimates from "
        "training's own samples.",
        regime=f"{usual.prompts} prompts x {usual.actions} actions, {usual.correct} of them "
        f"correct, tabular softmax policies as in the variance miniature; {usual.steps} steps over "
        f"all prompts with N = {usual.samples} samples a prompt on average, RAFT's update with "
        f"weight 1/|D_i| and a step size of {usual.lr:g}. GVM re-estimates every {SHARD} steps "
        f"with {PILOT} pilot samples a prompt and step, which come out of its N; `Online` spends "
        "all of N on training. Both are the budgets that `pyrl train` uses.",
        figure="Exact accuracy over all prompts after every third step, where all arms have drawn "
        "as many samples; its mean over those points.",
        caveats=[
            "Prompts share no parameters, so a prompt without samples learns nothing: this favours "
            "spreading samples. In a language model prompts help each other.",
            "Every prompt comes back in every step. Where prompts rarely come back, the budget "
            "without a pilot is the uniform one.",
            "Whatever it shows is one toy's; no claim is judged.",
        ],
    )
    for arm, found in runs.items():
        means = [float(np.mean(accuracy)) for _, accuracy in found]
        result.arms.append(Arm(QUANTITY, arm, rounded(means)))
    result.claims = [Claim(QUANTITY, arm, "reported", ARMS[0]) for arm in ARMS[1:]]
    lines = [
        Line(arm, rounded(found[0][0]), [rounded(accuracy) for _, accuracy in found])
        for arm, found in runs.items()
    ]
    result.charts = [
        Chart("Accuracy", "exact accuracy", "samples drawn, pilots included", lines),
        Chart("Mean of it", "mean accuracy over the samples", quantity=QUANTITY),
    ]
    if not quick:
        result.tables = [_others(usual, seeds)]
    return result


#: What the description leaves open.
OTHERS: dict[str, dict[str, Any]] = {
    "step size .1": {"lr": 0.1},
    "step size 1": {"lr": 1.0},
    "16 samples a prompt": {"samples": 16},
}


def _others(usual: Setting, seeds: int) -> Table:
    rows = []
    for name, change in OTHERS.items():
        setting = dataclasses.replace(usual, **change)
        means = [
            t_interval([float(np.mean(learn(setting, arm, s)[1])) for s in range(seeds)]).mean
            for arm in ARMS
        ]
        rows.append([name, *(f"{mean:.3f}" for mean in means)])
    return Table("The same under other choices: mean accuracy", ["changed", *ARMS], rows)
