"""Small policies whose expected accuracy is exact, many seeds at once, trained by pyrl's own
advantages and objective. S seeds, P prompts, F features, A actions, B prompts a step, n samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrl.losses import LossSpec, policy_objective
from pyrl.ops.group_advantage import group_advantage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """An algorithm, as a recipe of the trainer would have it."""

    name: str
    method: str
    filter: tuple[str, ...] = ()
    spec: LossSpec = dataclasses.field(default_factory=LossSpec)


class Policies:
    """S softmax policies of one action: logits[s, p] = features[s, p] @ weight[s].

    features [S, P, F] or None (tabular: a row of logits a prompt) · weight [S, F, A], or
    [S, P, A] · correct bool [S, P, A]: reward +1, every other action -1.
    """

    def __init__(self, features: Tensor | None, weight: Tensor, correct: Tensor) -> None:
        self.features = features
        self.weight = weight.clone().requires_grad_()
        self.correct = correct

    def logits(self, prompts: Tensor | None = None) -> Tensor:
        """[S, B, A] of prompts [S, B]; of all prompts without."""
        table = self.weight if self.features is None else self.features
        if prompts is not None:
            table = table.gather(1, prompts[..., None].expand(-1, -1, table.shape[-1]))
        return table if self.features is None else table @ self.weight

    def accuracy(self) -> Tensor:
        """Exact probability of a correct action [S, P]."""
        with torch.no_grad():
            return (self.logits().softmax(-1) * self.correct).sum(-1)

    def entropy(self) -> Tensor:
        """Exact entropy in nats [S, P]."""
        with torch.no_grad():
            logprob = self.logits().log_softmax(-1)
            return -(logprob.exp() * logprob).sum(-1)

    def sample(self, prompts: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, their log-probs and rewards ±1, each [S, B, n], of uniform numbers [S, B, n].

        Drawn by the inverse of the cumulated probabilities: arms that are given the same numbers
        differ by what they do, not by luck.
        """
        with torch.no_grad():
            logprob = self.logits(prompts).log_softmax(-1)
            edges = logprob.double().exp().cumsum(-1)
            actions = torch.searchsorted(edges / edges[..., -1:], uniform.double(), right=True)
            actions = actions.clamp(max=logprob.shape[-1] - 1)
            right = self.correct.gather(
                1, prompts[..., None].expand(-1, -1, logprob.shape[-1])
            ).gather(2, actions)
            return actions, logprob.gather(2, actions), 2.0 * right.float() - 1.0


def advantages(rewards: Tensor, recipe: Recipe) -> Tensor:
    """[S, B, n] of rewards [S, B, n], each prompt of each seed a group."""
    offsets = torch.arange(0, rewards.numel() + 1, rewards.shape[-1])
    found = group_advantage(
        rewards.reshape(-1), group_offsets=offsets, method=recipe.method, filter=recipe.filter
    )
    return found.advantages.reshape(rewards.shape)


def update(
    policies: Policies,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    spec: LossSpec,
    *,
    samples: float | None = None,
) -> None:
    """One optimizer update of every seed by policy_objective over (prompts [S, B], actions, old
    log-probs, advantages [S, B, n]); a seed's loss is the sum over its samples / `samples` (their
    number)."""
    prompts, actions, old, advantage = batch
    logprob = policies.logits(prompts).log_softmax(-1).gather(2, actions)
    each = actions[0].numel() if samples is None else samples
    loss = policy_objective(
        logprob.reshape(-1, 1),  # a completion of one token
        advantage.reshape(-1),
        spec,
        old_logprob=old.reshape(-1, 1),
        denominator=float(each),  # seeds share no parameter: each sees the mean over its own
    ).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Streams:
    """Random numbers of each seed from a generator of its own: a seed's draws are the same however
    many seeds run beside it."""

    def __init__(self, seeds: int, salt: int = 0) -> None:
        self.each = [torch.Generator().manual_seed(1000 * salt + s) for s in range(seeds)]

    def uniform(self, *shape: int) -> Tensor:
        """[S, *shape] in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.each])

    def normal(self, *shape: int) -> Tensor:
        """[S, *shape] standard normal."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.each])

    def choice(self, total: int, count: int) -> Tensor:
        """[S, count] different whole numbers below `total`."""
        return torch.stack([torch.randperm(total, generator=g)[:count] for g in self.each])


def mean_over(points: Sequence[Tensor]) -> list[float]:
    """Mean of a curve [points][S] for each seed: its area over its length."""
    return torch.stack(list(points)).double().mean(0).tolist()
