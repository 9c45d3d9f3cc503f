"""Losses: `LossSpec` and its presets, the policy losses, merging of metrics."""

from pyrl.losses.linear import linear_policy_loss
from pyrl.losses.logits import logits_policy_loss
from pyrl.losses.metrics import reduce_metrics
from pyrl.ops.policy_objective import PolicyLoss, policy_objective
from pyrl.ops.spec import PRESETS, LossSpec

__all__ = [
    "PRESETS",
    "LossSpec",
    "PolicyLoss",
    "linear_policy_loss",
    "logits_policy_loss",
    "policy_objective",
    "reduce_metrics",
]
