"""Reference resets (ProRL, arXiv 2507.12507): the ceiling of a KL penalty, and lifting it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrl.losses import LossSpec, linear_policy_loss
from pyrl.ops.group_advantage import group_advantage
from pyrl.repro.claim import Arm, Chart, Claim, Line, Result, rounded
from pyrl.repro.tiny import DIGIT, OPERATION, OPERATIONS, VOCABULARY, tiny_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Prompts, the penalty, and steps under one reference."""

    prompts: int = 4
    samples: int = 64
    beta: float = 0.5
    start: float = 0.05
    """Accuracy that the random policy starts at, or just above: so the right tokens are chosen."""
    phase: int = 150
    references: int = 4
    lr: float = 2e-3
    every: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
    """An arm: its advantages, and whether the reference is reset after each phase."""

    name: str
    method: str = "rloo"
    reset: bool = False


FIXED = Path(name="fixed reference")
RESET = Path(name="reset reference", reset=True)
SCALED = Path(name="fixed reference, advantages / std", method="grpo")


class Trace(NamedTuple):
    """Of one seed: exact accuracies and divergences, means over the prompts."""

    steps: list[int]
    accuracy: list[float]
    kl: list[float]
    ends: list[Tensor]
    """Accuracy [P] after each phase."""
    after_reset: list[float]
    """KL(π ‖ reference) right after each reset, from a forward pass of the new reference."""
    start: Tensor
    """Accuracy [P] at the start."""


def oracle(start: Tensor, gap: float, beta: float, references: int) -> Tensor:
    """Accuracy of the maximiser of E[r] - β KL after k references: logit p_0 + k Δ / β.

    π* ∝ π_ref exp(r / β) multiplies the odds of the right tokens by exp(Δ / β); each maximiser is
    the next reference.
    """
    return (start.double().logit() + references * gap / beta).sigmoid()


def train(setting: Setting, path: Path, seed: int) -> Trace:
    """One arm: on-policy Reinforce on the first token, r in {0, 1}, with k2 KL in the loss."""
    model = tiny_policy(seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = _prompts(setting.prompts, generator)
    right = _right(model, prompts, setting.start, generator)
    spec = LossSpec(objective="reinforce", kl="k2", kl_coef=setting.beta)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr)
    head = model.get_output_embeddings().weight
    groups = torch.arange(setting.prompts).repeat_interleave(setting.samples)
    reference = copy.deepcopy(model)
    frozen = _hidden(reference, prompts).detach()
    trace = Trace([], [], [], [], [], _accuracy(model, prompts, right))
    for step in range(setting.phase * setting.references):
        if step and step % setting.phase == 0:
            trace.ends.append(_accuracy(model, prompts, right))
            if path.reset:
                reference.load_state_dict(model.state_dict())
                frozen = _hidden(reference, prompts).detach()
                trace.after_reset.append(_kl(model, reference, prompts))
        if step % setting.every == 0:
            _note(trace, step, model, reference, prompts, right)
        hidden = _hidden(model, prompts)
        with torch.no_grad():
            chances = (hidden @ head.T).softmax(-1)
            tokens = torch.multinomial(chances, setting.samples, True, generator=generator)
            rewards = right.gather(1, tokens).float().reshape(-1)
        # linear_policy_loss reads a row of hidden states a sample: here a prompt's last position.
        loss = linear_policy_loss(
            hidden[groups, None],
            head,
            tokens.reshape(-1, 1),
            group_advantage(rewards, groups, method=path.method).advantages,
            spec,
            ref_hidden=frozen[groups, None],
            ref_weight=reference.get_output_embeddings().weight.detach(),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trace.ends.append(_accuracy(model, prompts, right))
    _note(trace, setting.phase * setting.references, model, reference, prompts, right)
    return trace


def _prompts(count: int, generator: torch.Generator) -> Tensor:
    """Different prompts [P, 3]: an operation and two digits, which here mean nothing."""
    numbers = torch.randperm(100 * len(OPERATIONS), generator=generator)[:count]
    operation, a, b = numbers // 100, numbers // 10 % 10, numbers % 10
    return torch.stack([OPERATION + operation, DIGIT + a, DIGIT + b], 1)


def _hidden(model: Any, prompts: Tensor) -> Tensor:
    return model.model(input_ids=prompts, use_cache=False).last_hidden_state[:, -1]


def _logprob(model: Any, prompts: Tensor) -> Tensor:
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        return (_hidden(model, prompts) @ head.T).double().log_softmax(-1)


def _right(model: Any, prompts: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """bool [P, V]: random tokens of each prompt, until together as probable as `share`."""
    chances = _logprob(model, prompts).exp()
    order = torch.stack([torch.randperm(VOCABULARY, generator=generator) for _ in prompts])
    # A token likelier than half the share could overshoot it by far: those are passed over.
    small = torch.where(chances < share / 2, chances, 0.0).gather(1, order)
    chosen = (small.cumsum(1) - small < share) & (small > 0)
    return torch.zeros_like(chances, dtype=torch.bool).scatter_(1, order, chosen)


def _accuracy(model: Any, prompts: Tensor, right: Tensor) -> Tensor:
    return (_logprob(model, prompts).exp() * right).sum(-1)


def _kl(model: Any, reference: Any, prompts: Tensor) -> float:
    now, then = _logprob(model, prompts), _logprob(reference, prompts)
    return float((now.exp() * (now - then)).sum(-1).mean())


def _note(
    trace: Trace, step: int, model: Any, reference: Any, prompts: Tensor, right: Tensor
) -> None:
    trace.steps.append(step)
    trace.accuracy.append(float(_accuracy(model, prompts, right).mean()))
    trace.kl.append(_kl(model, reference, prompts))


def kl_reset(seeds: int, quick: bool) -> Result:
    """Accuracy against steps beside the oracle's, with and without resets."""
    setting = Setting(phase=6, references=2, every=2) if quick else Setting()
    found = {
        path.name: [train(setting, path, seed) for seed in range(seeds)]
        for path in (FIXED, RESET, SCALED)
    }
    k, beta = setting.references, setting.beta
    ends = [f"after {i + 1} reference{'s' if i else ''}" for i in range(k)]
    result = Result(
        name="kl-reset",
        title="Resetting the reference policy",
        paper="arXiv 2507.12507, 2505.24864 (ProRL)",
        published="With a KL penalty training stalls; replacing the reference by the current "
        "policy lets it improve again, over thousands of steps. Not in the papers, but what such "
        "a ceiling is for binary rewards of gap Δ: the maximiser of E[r] − β KL has logit p* = "
        "logit p_ref + Δ/β, and after k references logit p_0 + kΔ/β.",
        regime="Random two-layer Llama, D = 32, vocabulary 320; the first token after each of "
        f"{setting.prompts} prompts is the answer, random tokens of together just over "
        f"{setting.start:g} probability are right (reward 1, else 0). Reinforce with "
        f"leave-one-out baselines, {setting.samples} samples a prompt, one update a step by "
        f"`linear_policy_loss`, Adam at {setting.lr:g}; β = {beta:g}, far above ProRL's 1e-4, so "
        f"that the ceiling is near; {k} phases of {setting.phase} steps, the reference reset (or "
        "not) between them, the optimizer's state kept. The KL term is k2 in the loss: on policy "
        "its gradient is the reverse KL's in expectation; k3's is not, and k1's in the loss is 0. "
        "The reference runs as a model of its own (`ref_hidden`, `ref_weight`).",
        figure="Exact probability of a right token, mean over the prompts.",
        caveats=[
            "The β is exaggerated: at ProRL's 1e-4 the closed form's ceiling lies at an accuracy "
            "of 1 to machine precision. That resets help there is not explained by this ceiling, "
            "and not shown here.",
            "Resets at fixed steps; ProRL resets on a stall.",
            "The gradient of an accuracy p is p(1 − p): under the last reference, at .99, the "
            "steps of a phase do not reach the oracle.",
            "Advantages divided by the group's standard deviation (GRPO's) follow another optimum; "
            "the third arm shows how far. A baseline of the group's mean, the sample itself "
            "included, would shrink Δ by (n − 1)/n.",
        ],
    )
    final = "final accuracy"
    for name, traces in found.items():
        result.arms.append(Arm(final, name, rounded([float(t.ends[-1].mean()) for t in traces])))
    for i, end in enumerate(ends):
        values = [float(t.ends[i].mean()) for t in found[RESET.name]]
        result.arms.append(Arm("accuracy, reset reference", end, rounded(values)))
    gap = "distance from the oracle, logits"
    for name, count in ((FIXED.name, 1), (RESET.name, k), (SCALED.name, 1)):
        values = [_distance(setting, t, count) for t in found[name]]
        result.arms.append(Arm(gap, name, rounded(values)))
    resets = [max((abs(v) for v in t.after_reset), default=0.0) for t in found[RESET.name]]
    result.arms.append(Arm("KL to the reference, nats", "right after a reset, largest", resets))
    before = [_before_resets(setting, t) for t in found[RESET.name]]
    result.arms.append(Arm("KL to the reference, nats", "before a reset, mean", rounded(before)))
    result.claims = [Claim(final, RESET.name, "above", FIXED.name)]
    result.claims += [
        Claim("accuracy, reset reference", after, "above", earlier)
        for earlier, after in itertools.pairwise(ends)
    ]
    result.claims += [Claim(gap, name, "reported", 0.0) for name in (FIXED.name, RESET.name)]
    result.claims.append(Claim(gap, SCALED.name, "reported", 0.0, "no oracle of its own"))
    starts = torch.stack([t.start for t in found[FIXED.name]])
    steps = [float(step) for step in found[FIXED.name][0].steps]
    lines = [
        Line(name, steps, [rounded(t.accuracy, 4) for t in traces])
        for name, traces in found.items()
    ]
    for i in range(1, k + 1):
        level = float(oracle(starts, 1.0, beta, i).mean())
        name = f"oracle, {i} reference{'s' if i > 1 else ''}"
        lines.append(Line(name, [0.0, steps[-1]], [rounded([level, level], 4)], reference=True))
    kls = [
        Line(name, steps, [rounded(t.kl, 4) for t in found[name]])
        for name in (FIXED.name, RESET.name)
    ]
    note = f"β = {beta:g}, Δ = 1"
    result.charts = [
        Chart(
            "Accuracy", "exact accuracy, log-odds scale", "step", lines, note=note, scale="logit"
        ),
        Chart("KL to the reference", "nats", "step", kls, note="0 right after each reset"),
    ]
    return result


def _distance(setting: Setting, trace: Trace, references: int) -> float:
    target = oracle(trace.start, 1.0, setting.beta, references)
    return float((trace.ends[-1].double().logit() - target.logit()).mean())


def _before_resets(setting: Setting, trace: Trace) -> float:
    last = setting.phase - setting.every
    wanted = [last + i * setting.phase for i in range(setting.references - 1)]
    values = [kl for step, kl in zip(trace.steps, trace.kl, strict=True) if step in wanted]
    return sum(values) / max(1, len(values))
