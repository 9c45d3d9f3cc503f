"""`Critic` and `CriticCredit`: values of tokens, and the advantages that PPO makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pyrl.algorithms.credit import Credit, DivergedError, with_advantages
from pyrl.algorithms.experience import Group, RewardMap
from pyrl.losses.value import value_loss
from pyrl.ops.gae import gae
from pyrl.packing import PackedBatch

if TYPE_CHECKING:
    from pyrl.models import Policy  # its module imports transformers

_MAX = float(torch.finfo(torch.float32).max)


class Critic(nn.Module):
    """V_t = w . h_t + b, with h_t the hidden state [D] that predicts target token t.

    The backbone is that of `policy`, which the critic trains and so has to itself; its head is not
    used. w [D] and b [1] are fp32 and start at 0: V = 0. The parameters here are the backbone's and
    these two.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.backbone = policy.model.base_model
        self._policy = policy
        width, device = policy.head().weight.shape[1], policy.device
        self.weight = nn.Parameter(torch.zeros(width, device=device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))

    def values(self, row: PackedBatch) -> Tensor:
        """fp32 [R] of one row; what stands outside the loss mask is no token's value."""
        hidden = self._policy.hidden(row.tokens, row.positions, row.plan)
        return row.at_targets(hidden).float() @ self.weight + self.bias


class CriticOptimizer(Protocol):
    """Updates the critic's parameters from their gradients, and frees those."""

    def step(self, lr: float) -> float:
        """Returns the norm of the gradient."""

    def state_dict(self) -> dict[str, Any]:
        """The parameters (masters) and moments."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores both, and the critic's parameters with them."""


class _Targets(NamedTuple):
    """What a row's values are fitted to, and what they were; [R]."""

    returns: Tensor
    values: Tensor


class CriticCredit(Credit):
    """A = gae(r, V), r_t = map(reward) + bonus at a completion's last kept token, 0 elsewhere; with
    `whiten`, (A - mean) / (std + 1e-8) over all kept tokens of the step (unbiased; of one token
    0 and 1). The critic then descends the mean over the minibatch's kept tokens of

        0.5 max((V - R)^2, (clamp(V, V_old - value_clip, V_old + value_clip) - R)^2), R = A + V_old

    after each update of the policy, with `lr` * lr_scale; A here is from before the whitening, and
    V_old the values at the start of the step. value_clip None: (V - R)^2 / 2. A truncated
    completion counts as ended. Lost attempts are left out; `Group.weight` is not used.

    backend: of `gae`. Sources: PPO arXiv 1707.06347, GAE 1506.02438, the settings (gamma = lam = 1,
    clip 0.5) 2504.11343.
    """

    dense = True

    def __init__(
        self,
        critic: Critic,
        optimizer: CriticOptimizer,
        *,
        lr: float,
        gamma: float = 1.0,
        lam: float = 1.0,
        value_clip: float | None = 0.5,
        whiten: bool = True,
        reward_map: RewardMap = "identity",
        backend: str | None = None,
    ) -> None:
        for name, value in (("gamma", gamma), ("lam", lam)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}: expected a number in [0, 1]")
        if value_clip is not None and not 0 < value_clip < math.inf:
            raise ValueError(f"value_clip={value_clip!r}: expected a finite number > 0, or None")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr={lr!r}: expected a finite number > 0")
        self.critic, self.optimizer, self.lr = critic, optimizer, lr
        self.gamma, self.lam, self.backend = gamma, lam, backend
        self.value_clip, self.whiten, self.reward_map = value_clip, whiten, reward_map
        self._targets: dict[PackedBatch, _Targets] = {}  # by the row object that `begin` returned
        self._losses: list[dict[str, Tensor]] = []
        self._norms: list[float] = []
        self._explained = math.nan

    def assign(self, groups: Sequence[Group]) -> dict[str, float]:
        """advantage = map(reward) + bonus, which so reaches its row; lost attempts are not kept."""
        for group in groups:
            for attempt in group.attempts:
                total = attempt.total(self.reward_map)
                attempt.keep = abs(total) <= _MAX  # NaN is not
                attempt.advantage = total if attempt.keep else 0.0
        return {}

    @torch.no_grad()
    def begin(self, parts: list[list[PackedBatch]]) -> list[list[PackedBatch]]:
        """The rows with advantages, whitened over all `parts`; remembers returns and values.

        DivergedError where a value is not finite.
        """
        self._targets = {}
        rows = [row for part in parts for row in part]
        found = []
        for row in rows:
            values = self.critic.values(row)
            if not values[row.loss_mask].isfinite().all():
                raise DivergedError("the critic's values are not finite: lower critic.lr")
            advantages, returns = gae(
                _last_kept(row), values, gamma=self.gamma, lam=self.lam,
                mask=row.loss_mask, cu_seqlens=row.cu_seqlens, backend=self.backend,
            )  # fmt: skip
            found.append((advantages, _Targets(returns, values)))
        self._explained = _explained_variance(rows, [targets for _, targets in found])
        mean, std = 0.0, 1.0
        if self.whiten:
            mean, std = _moments(_kept(rows, [advantages for advantages, _ in found]))
        new = []
        for row, (advantages, targets) in zip(rows, found, strict=True):
            if self.whiten:
                advantages = (advantages.double() - mean) / (std + 1e-8)
            new.append(with_advantages(row, advantages))
            self._targets[new[-1]] = targets
        rest = iter(new)
        return [[next(rest) for _ in part] for part in parts]

    def learn(self, rows: list[PackedBatch], lr_scale: float = 1.0) -> None:
        """One step of the critic's optimizer on the rows, which `begin` returned.

        ValueError for another row.
        """
        for i, row in enumerate(rows):
            if row not in self._targets:
                raise ValueError(f"row {i} is not one of those that `begin` returned")
        if not rows:
            return
        tokens = torch.stack([row.loss_mask.sum() for row in rows]).sum()
        for row in rows:
            returns, old = self._targets[row]
            out = value_loss(
                self.critic.values(row),
                returns,
                old_values=None if self.value_clip is None else old,
                clip=self.value_clip,
                mask=row.loss_mask,
                cu_seqlens=row.cu_seqlens,
                denominator=tokens,
                backend="torch",
            )
            out.loss.backward()
            self._losses.append(out.metrics)
            del out
        self._norms.append(self.optimizer.step(self.lr * lr_scale))

    def metrics(self) -> dict[str, float]:
        """Means over the step's updates of value_loss and critic_grad_norm, over their tokens of
        value_clip_share (where the clipped square is the greater); explained_variance
        1 - var(R - V) / var(R) of the values at the start. NaN where there is nothing."""

        def total(name: str) -> float:
            return float(sum(float(m[name]) for m in self._losses))

        updates, tokens = len(self._norms), total("tokens")
        result = {
            "value_loss": total("value_loss") / updates if updates else math.nan,
            "value_clip_share": total("clipped") / tokens if tokens else math.nan,
            "explained_variance": self._explained,
            "critic_grad_norm": sum(self._norms) / updates if updates else math.nan,
        }
        self._targets, self._losses, self._norms = {}, [], []
        self._explained = math.nan
        return result

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, whose masters hold the critic's weights; between steps."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bit-exact restoration, of the critic's weights too."""
        self.optimizer.load_state_dict(state)


def _last_kept(row: PackedBatch) -> Tensor:
    """The row's advantages [R] at the last kept token of each sample, 0 elsewhere."""
    count = row.loss_mask.cumsum(0)
    ends = (row.bounds[1:] - 1).repeat_interleave(row.bounds.diff()).to(count.device)
    last = row.loss_mask & (count == count[ends])
    return row.advantages.where(last, 0.0)


def _kept(rows: list[PackedBatch], values: list[Tensor]) -> Tensor:
    """Those inside the loss masks, end to end, as float64 on the host."""
    inside = [v[row.loss_mask].double().cpu() for row, v in zip(rows, values, strict=True)]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *inside])


def _moments(values: Tensor) -> tuple[float, float]:
    """Mean and unbiased standard deviation: of equal numbers exactly 0, of fewer than two 0 and 1,
    as in `group_advantage`."""
    if values.numel() < 2:
        return 0.0, 1.0
    if bool((values == values[0]).all()):
        return float(values[0]), 0.0
    return float(values.mean()), float(values.std())


def _explained_variance(rows: list[PackedBatch], found: list[_Targets]) -> float:
    returns = _kept(rows, [t.returns for t in found])
    error = _kept(rows, [t.returns - t.values for t in found])
    spread = _moments(returns)[1]
    if returns.numel() < 2 or spread == 0:
        return math.nan
    return 1 - (_moments(error)[1] / spread) ** 2
