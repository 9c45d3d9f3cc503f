"""Certificate rows of `group_advantage`: no gradient, one value per sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import pyrl
from pyrl.certify.measure import Row, Values, judge
from pyrl.ops.group_advantage import METHODS
from pyrl.parity import DEVICE

#: Reward batches: name → (rewards [n], group ids [n]).
GROUPS = ("ragged", "one sample", "all equal", "large mean", "NaN rewards")


def _batch(name: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    ids = torch.tensor([7, 7, 7, -2, 5, 5, 5, 5, 7, 5])
    rewards = torch.randn(10, generator=g)
    if name == "one sample":
        ids = torch.arange(10)
    elif name == "all equal":
        rewards = torch.full((10,), 0.3)
    elif name == "large mean":
        rewards = rewards + 1e4  # fp32 keeps three digits of the spread: sums must not lose them
    elif name == "NaN rewards":
        rewards[::3] = torch.nan
    return rewards.to(DEVICE), ids.to(DEVICE)


def rows(columns: list[str], quick: bool) -> Iterator[Row]:
    """Every method on every batch."""
    for method in METHODS:
        for name in GROUPS:
            rewards, ids = _batch(name)

            def compute(
                backend: str, r: Tensor = rewards, i: Tensor = ids, m: str = method
            ) -> Values:
                return {
                    "advantages": pyrl.group_advantage(r, i, method=m, backend=backend).advantages
                }

            yield judge(
                "group_advantage", method, name, torch.float32, columns,
                compute("reference"), compute("torch"), compute,
            )  # fmt: skip
