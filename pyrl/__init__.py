"""pyrl: fused losses and a lean trainer for reinforcement learning of language models."""

from typing import TYPE_CHECKING, Any

from pyrl.losses import PRESETS, LossSpec, PolicyLoss, linear_policy_loss, reduce_metrics
from pyrl.ops.backend import BackendUnavailableError, backends
from pyrl.ops.group_advantage import Advantages, group_advantage
from pyrl.ops.linear_logprob import LogProb, linear_logprob
from pyrl.ops.policy_objective import policy_objective

if TYPE_CHECKING:
    from pyrl.models import Policy, load_policy
    from pyrl.packing import PackedBatch, Sample, pack

__version__ = "0.1.0"

#: Imported on first use: a drop-in loss should not cost an import of transformers.
_LAZY = {
    "PackedBatch": "pyrl.packing",
    "Policy": "pyrl.models",
    "Sample": "pyrl.packing",
    "load_policy": "pyrl.models",
    "pack": "pyrl.packing",
}

__all__ = [
    "PRESETS",
    "Advantages",
    "BackendUnavailableError",
    "LogProb",
    "LossSpec",
    "PackedBatch",
    "Policy",
    "PolicyLoss",
    "Sample",
    "backends",
    "group_advantage",
    "linear_logprob",
    "linear_policy_loss",
    "load_policy",
    "pack",
    "policy_objective",
    "reduce_metrics",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pyrl' has no attribute {name!r}")
