"""pyrl: fused losses and a lean trainer for reinforcement learning of language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrl.algorithms.allocate import allocate_budget
    from pyrl.losses import (
        PRESETS,
        LossSpec,
        PolicyLoss,
        linear_policy_loss,
        logits_policy_loss,
        reduce_metrics,
    )
    from pyrl.losses.parallel import vocab_parallel_policy_loss
    from pyrl.losses.preference import preference_loss
    from pyrl.losses.value import value_loss
    from pyrl.models import Policy, load_policy
    from pyrl.ops.backend import BackendUnavailableError, backends
    from pyrl.ops.gae import GAE, gae
    from pyrl.ops.group_advantage import Advantages, group_advantage
    from pyrl.ops.kl_reward import kl_penalty, rewards_with_kl
    from pyrl.ops.linear_logprob import LogProb, linear_logprob
    from pyrl.ops.logits_logprob import logits_logprob
    from pyrl.ops.lora import LinearHead, LoRA, linear_head
    from pyrl.ops.parallel import vocab_parallel_logprob
    from pyrl.ops.policy_objective import policy_objective
    from pyrl.ops.sharded import full_weight
    from pyrl.ops.support import Support
    from pyrl.packing import PackedBatch, Sample, pack

__version__ = "0.1.0"

#: Imported on first use: the command line and the scoring processes start without torch, and a
#: drop-in loss does not cost an import of transformers.
_HOME = {
    "GAE": "pyrl.ops.gae",
    "PRESETS": "pyrl.losses",
    "Advantages": "pyrl.ops.group_advantage",
    "BackendUnavailableError": "pyrl.ops.backend",
    "LinearHead": "pyrl.ops.lora",
    "LoRA": "pyrl.ops.lora",
    "LogProb": "pyrl.ops.linear_logprob",
    "LossSpec": "pyrl.losses",
    "PackedBatch": "pyrl.packing",
    "Policy": "pyrl.models",
    "PolicyLoss": "pyrl.losses",
    "Sample": "pyrl.packing",
    "Support": "pyrl.ops.support",
    "allocate_budget": "pyrl.algorithms.allocate",
    "backends": "pyrl.ops.backend",
    "full_weight": "pyrl.ops.sharded",
    "gae": "pyrl.ops.gae",
    "group_advantage": "pyrl.ops.group_advantage",
    "kl_penalty": "pyrl.ops.kl_reward",
    "linear_head": "pyrl.ops.lora",
    "linear_logprob": "pyrl.ops.linear_logprob",
    "linear_policy_loss": "pyrl.losses",
    "load_policy": "pyrl.models",
    "logits_logprob": "pyrl.ops.logits_logprob",
    "logits_policy_loss": "pyrl.losses",
    "pack": "pyrl.packing",
    "policy_objective": "pyrl.ops.policy_objective",
    "preference_loss": "pyrl.losses.preference",
    "reduce_metrics": "pyrl.losses",
    "rewards_with_kl": "pyrl.ops.kl_reward",
    "value_loss": "pyrl.losses.value",
    "vocab_parallel_logprob": "pyrl.ops.parallel",
    "vocab_parallel_policy_loss": "pyrl.losses.parallel",
}

__all__ = [
    "GAE",
    "PRESETS",
    "Advantages",
    "BackendUnavailableError",
    "LinearHead",
    "LoRA",
    "LogProb",
    "LossSpec",
    "PackedBatch",
    "Policy",
    "PolicyLoss",
    "Sample",
    "Support",
    "allocate_budget",
    "backends",
    "full_weight",
    "gae",
    "group_advantage",
    "kl_penalty",
    "linear_head",
    "linear_logprob",
    "linear_policy_loss",
    "load_policy",
    "logits_logprob",
    "logits_policy_loss",
    "pack",
    "policy_objective",
    "preference_loss",
    "reduce_metrics",
    "rewards_with_kl",
    "value_loss",
    "vocab_parallel_logprob",
    "vocab_parallel_policy_loss",
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
