"""Dynamic sampling with refill (DAPO, arXiv 2503.14476; ProRL): what it gives and what it costs."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrl.repro.claim import Arm, Chart, Claim, Line, Result, Table, rounded
from pyrl.repro.policies import Policies, Recipe, Streams, advantages, update
from pyrl.repro.statistics import number, t_interval

PLAIN, REFILL = "every group", "dynamic sampling"
GRPO = Recipe(name="GRPO", method="grpo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A table of prompts whose log-odds of a right answer start at spread N(0, 1)."""

    prompts: int = 512
    actions: int = 8
    spread: float = 4.0
    batch: int = 32
    samples: int = 8
    draws: int = 10
    """Most batches of prompts that a step may draw."""
    steps: int = 300
    lr: float = 1.0


class Traces(NamedTuple):
    """A point a step, [steps][S]; accuracy and sampled also have the state after the last."""

    signal: list[Tensor]
    """Share of the update's samples whose advantage is not 0."""
    accuracy: list[Tensor]
    """Exact, mean over all prompts."""
    sampled: list[Tensor]
    """Completions sampled so far."""


def start(setting: Setting, streams: Streams) -> Policies:
    """Action 0 is right; the log-odds of it are spread N(0, 1), the others near even."""
    s, p = len(streams.each), setting.prompts
    logits = streams.normal(p, setting.actions) / 2
    correct = torch.zeros(s, p, setting.actions, dtype=torch.bool)
    correct[..., 0] = True
    odds = setting.spread * streams.normal(p)
    logits[..., 0] = odds + logits[..., 1:].logsumexp(-1)
    return Policies(None, logits, correct)


def select(mixed: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Which groups [S, batch] of those in order of drawing [S, draws * batch] an update takes, and
    how many draws of `batch` groups [S] it took.

    The first `batch` mixed groups; after the last draw groups without signal fill what is missing.
    """
    order = torch.argsort((~mixed).to(torch.int8), dim=1, stable=True)[:, :batch]
    last = torch.where(mixed.gather(1, order), order, mixed.shape[1] - 1).max(1).values
    return order, last // batch + 1


def simulate(setting: Setting, refill: bool, seeds: int) -> Traces:
    """GRPO, one on-policy update a step; both arms see the same prompts in the same order."""
    streams = Streams(seeds)
    policies = start(setting, streams)
    optimizer = torch.optim.SGD([policies.weight], lr=setting.lr)
    traces = Traces([], [policies.accuracy().mean(1)], [torch.zeros(seeds)])
    for _ in range(setting.steps):
        count = setting.batch * setting.draws
        prompts = streams.choice(setting.prompts, count)
        actions, old, rewards = policies.sample(prompts, streams.uniform(count, setting.samples))
        mixed = (rewards != rewards[..., :1]).any(-1)
        if refill:
            chosen, draws = select(mixed, setting.batch)
        else:
            chosen = torch.arange(setting.batch).expand(seeds, -1)
            draws = torch.ones(seeds, dtype=torch.int64)
        each = chosen[..., None].expand(-1, -1, setting.samples)
        advantage = advantages(rewards.gather(1, each), GRPO)
        batch = (prompts.gather(1, chosen), actions.gather(1, each), old.gather(1, each), advantage)
        # The sum over groups: a table's rows do not meet, and lr is a prompt's step either way.
        update(policies, optimizer, batch, GRPO.spec, samples=setting.samples)
        traces.signal.append((advantage != 0).float().mean((1, 2)))
        traces.accuracy.append(policies.accuracy().mean(1))
        traces.sampled.append(traces.sampled[-1] + draws * setting.batch * setting.samples)
    return traces


def at_equal_samples(traces: Traces, budget: float, points: int = 50) -> np.ndarray:
    """Accuracy [S, points] at evenly spread numbers of sampled completions up to `budget`."""
    x = np.linspace(0, budget, points)
    sampled, accuracy = torch.stack(traces.sampled, 1), torch.stack(traces.accuracy, 1)
    rows = zip(sampled.double().numpy(), accuracy.double().numpy(), strict=True)
    return np.stack([np.interp(x, used, reached) for used, reached in rows])


OTHERS: dict[str, dict] = {
    "spread 2": {"spread": 2.0},
    "spread 8": {"spread": 8.0},
    "16 samples a prompt": {"samples": 16},
    "step size 0.3": {"lr": 0.3},
}
SHARE, UPDATES, SAMPLES = (
    "share of samples with a gradient",
    "accuracy, mean over updates",
    "accuracy, mean over sampled completions",
)


def figures(found: dict[str, Traces]) -> dict[tuple[str, str], list[float]]:
    """(quantity, arm) → a value a seed; the sample budget is what the cheapest arm had used."""
    budget = min(float(traces.sampled[-1].min()) for traces in found.values())
    values = {}
    for name, traces in found.items():
        values[SHARE, name] = torch.stack(traces.signal).mean(0).tolist()
        values[UPDATES, name] = torch.stack(traces.accuracy).mean(0).tolist()
        values[SAMPLES, name] = at_equal_samples(traces, budget).mean(1).tolist()
        values["completions sampled an update", name] = (
            traces.sampled[-1] / len(traces.signal)
        ).tolist()
    return values


def dynamic_sampling(seeds: int, quick: bool) -> Result:
    """Both arms by updates and by sampled completions."""
    usual = Setting(prompts=64, batch=4, steps=4) if quick else Setting()
    found = {name: simulate(usual, name == REFILL, seeds) for name in (PLAIN, REFILL)}
    result = Result(
        name="dynamic-sampling",
        title="Dynamic sampling with refill",
        paper="arXiv 2503.14476 (DAPO), 2505.24864 (ProRL)",
        published="Prompts whose samples are all right or all wrong give no gradient, and their "
        "share grows; leaving them out and sampling others until the batch is full keeps every "
        "sample of it informative, and reaches the same accuracy in fewer steps (DAPO: 50 on "
        "AIME 2024 against 42 without). The extra sampling is said not to cost much time, as long "
        "completions decide that.",
        regime=f"Tabular policies: {usual.prompts} prompts, {usual.actions} actions, one right, "
        f"log-odds of it {usual.spread:g}·N(0, 1), so that many prompts are at 0 or 1; GRPO "
        f"advantages, {usual.batch} prompts x {usual.samples} samples an update, one on-policy "
        f"update a step, SGD, step size {usual.lr:g} a prompt, {usual.steps} steps. With dynamic "
        f"sampling a step draws prompts {usual.batch} at a time until {usual.batch} groups are "
        f"mixed, at most {usual.draws} times; mixed groups beyond a full batch are thrown away, "
        "all-equal ones fill what is missing after the last draw. Every sampled completion counts.",
        figure="Means over the updates, and over equal numbers of sampled completions (up to what "
        "the arm without refill used).",
        caveats=[
            "A full batch of mixed groups is what the method arranges: the first claim is close "
            "to true by construction, except where the pool runs out of mixed prompts.",
            "Prompts of a table do not help each other. An update on more mixed groups is then "
            "simply more learning, and the samples spent on unmixed ones are the price: by samples "
            "little can be gained. A model that generalises may gain or lose more.",
            "Time is not measured: whether extra samples cost time depends on the engine.",
        ],
    )
    values = figures(found)
    result.arms = [Arm(*key, rounded(each)) for key, each in values.items()]
    result.claims = [
        Claim(SHARE, REFILL, "above", PLAIN),
        Claim(UPDATES, REFILL, "above", PLAIN),
        Claim(SAMPLES, REFILL, "reported", PLAIN),
    ]
    every = max(1, usual.steps // 50)
    steps = [float(step) for step in range(0, usual.steps + 1, every)]
    budget = min(float(traces.sampled[-1].min()) for traces in found.values())
    result.charts = [
        Chart("Samples with a gradient", "share of the update's samples", "update", [
            Line(name, steps[:len(t.signal[::every])], _rows(t.signal[::every]))
            for name, t in found.items()
        ], scale="zero"),
        Chart("Accuracy by updates", "exact accuracy, all prompts", "update", [
            Line(name, steps, _rows(t.accuracy[::every])) for name, t in found.items()
        ]),
        Chart("Accuracy by samples", "exact accuracy, all prompts", "sampled completions", [
            Line(name, rounded(np.linspace(0, budget, 50)),
                 [rounded(row, 4) for row in at_equal_samples(t, budget)])
            for name, t in found.items()
        ]),
    ]  # fmt: skip
    quantities = list(dict.fromkeys(quantity for quantity, _ in values))
    rows = []
    for name, change in {} if quick else OTHERS.items():
        setting = dataclasses.replace(usual, **change)
        other = figures({arm: simulate(setting, arm == REFILL, seeds) for arm in (PLAIN, REFILL)})
        mean = {key: t_interval(each).mean for key, each in other.items()}
        cells = [f"{number(mean[q, PLAIN])} / {number(mean[q, REFILL])}" for q in quantities]
        rows.append([name, *cells])
    if rows:
        title = f"The same under other choices: {PLAIN} / {REFILL}"
        result.tables = [Table(title, ["changed", *quantities], rows)]
    return result


def _rows(curve: list[Tensor]) -> list[list[float]]:
    return [rounded(row, 4) for row in torch.stack(curve, 1).tolist()]
