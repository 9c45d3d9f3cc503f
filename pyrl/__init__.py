"""pyrl: fused losses and a lean trainer for reinforcement learning of language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrl.losses import PRESETS, LossSpec, PolicyLoss, linear_policy_loss, reduce_metrics
    from pyrl.losses.preference import preference_loss
    from pyrl.losses.value import value_loss
    from pyrl.models import Policy, load_policy
    from pyrl.ops.backend import BackendUnavailableError, backends
    from pyrl.ops.gae import GAE, gae
    from pyrl.ops.group_advantage import Advantages, group_advantage
    from pyrl.ops.kl_reward import kl_penalty, rewards_with_kl
    from pyrl.ops.linear_logprob import LogProb, linear_logprob
    from pyrl.ops.policy_objective import policy_objective
    from pyrl.packing import PackedBatch, Sample, pack

__version__ = "0.1.0"

#: Imported on first use: the command line and the scoring processes start without torch, and a
#: drop-in loss does not cost an import of transformers.
_HOME = {
    "GAE": "pyrl.ops.gae",
    "PRESETS": "pyrl.losses",
    "Advantages": "pyrl.ops.group_advantage",
    "BackendUnavailableError": "pyrl.ops.backend",
    "LogProb": "pyrl.ops.linear_logprob",
    "LossSpec": "pyrl.losses",
    "PackedBatch": "pyrl.packing",
    "Policy": "pyrl.models",
    "PolicyLoss": "pyrl.losses",
    "Sample": "pyrl.packing",
    "backends": "pyrl.ops.backend",
    "gae": "pyrl.ops.gae",
    "group_advantage": "pyrl.ops.group_advantage",
    "kl_penalty": "pyrl.ops.kl_reward",
    "linear_logprob": "pyrl.ops.linear_logprob",
    "linear_policy_loss": "pyrl.losses",
    "load_policy": "pyrl.models",
    "pack": "pyrl.packing",
    "policy_objective": "pyrl.ops.policy_objective",
    "preference_loss": "pyrl.losses.preference",
    "reduce_metrics": "pyrl.losses",
    "rewards_with_kl": "pyrl.ops.kl_reward",
    "value_loss": "pyrl.losses.value",
}

__all__ = [
    "GAE",
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
    "gae",
    "group_advantage",
    "kl_penalty",
    "linear_logprob",
    "linear_policy_loss",
    "load_policy",
    "pack",
    "policy_objective",
    "preference_loss",
    "reduce_metrics",
    "rewards_with_kl",
    "value_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pyrl' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
