"""Sampling: one `Rollout` protocol, an engine inside the trainer and vLLM behind it."""

from __future__ import annotations

from typing import Any

from .canary import Canary, CanaryError
from .protocol import Completion, Rollout, RolloutError, SamplingParams

__all__ = [
    "ENGINES",
    "Canary",
    "CanaryError",
    "Completion",
    "Rollout",
    "RolloutError",
    "SamplingParams",
    "make_rollout",
]

ENGINES = ("transformers", "vllm")


def make_rollout(
    engine: str = "transformers",
    *,
    policy: Any = None,
    model_path: str | None = None,
    **options: Any,
) -> Rollout:
    """The engine named `engine`; further options go to its constructor.

    transformers: samples from `policy` itself (no copy); without a policy, from its own copy of
    `model_path`. vllm: loads `model_path`, or `policy` written to a temporary folder, and follows
    by `sync`. Raises ValueError for an unknown engine or neither policy nor path, RolloutError
    when vLLM is absent.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: expected one of {', '.join(ENGINES)}")
    if policy is None and model_path is None:
        raise ValueError("make_rollout: give a policy or a model_path")
    if engine == "transformers":
        from .transformers_engine import TransformersEngine

        if policy is not None:
            return TransformersEngine(policy, **options)
        assert model_path is not None
        from pyrl.models import load_policy

        load = {key: options.pop(key) for key in ("dtype", "device") if key in options}
        return TransformersEngine(load_policy(model_path, **load), shares_weights=False, **options)
    from .vllm_engine import VLLMEngine

    return VLLMEngine.from_policy(policy, model_path, **options)
