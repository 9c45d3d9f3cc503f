"""Sampling: one `Rollout` protocol, an engine inside the trainer and vLLM behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .canary import Canary, CanaryError
from .options import TAKEN, check_names
from .protocol import Completion, Rollout, RolloutError, SamplingParams

__all__ = [
    "ENGINES",
    "Canary",
    "CanaryError",
    "Completion",
    "Rollout",
    "RolloutError",
    "SamplingParams",
    "check_options",
    "make_rollout",
]

ENGINES = ("transformers", "vllm")


def check_options(engine: str, options: Mapping[str, Any]) -> None:
    """ValueError for an unknown engine, and for the first of `options` that it does not have,
    naming those that it has. Nothing is loaded; names that the vLLM engine passes on to vLLM are
    checked when it is made.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: expected one of {', '.join(ENGINES)}")
    for name in TAKEN:
        if name in options:
            raise ValueError(f"rollout engine {engine!r}: {name!r} is no option")
    if engine == "transformers":
        from .transformers_engine import TransformersEngine

        check_names(engine, options, TransformersEngine)


def make_rollout(
    engine: str = "transformers",
    *,
    policy: Any = None,
    model_path: str | None = None,
    **options: Any,
) -> Rollout:
    """The engine named `engine`; further options go to its constructor.

    transformers: samples from `policy` itself (no copy); without a policy, from its own copy of
    `model_path`, in the option `dtype`. vllm: loads `model_path`, or `policy` written to a
    temporary folder, and follows by `sync`. Raises ValueError for an unknown engine or option or
    neither policy nor path, RolloutError when vLLM is absent.
    """
    own_copy = engine == "transformers" and policy is None
    load = {"dtype": options.pop("dtype")} if own_copy and "dtype" in options else {}
    check_options(engine, options)
    if policy is None and model_path is None:
        raise ValueError("make_rollout: give a policy or a model_path")
    if engine == "transformers":
        from .transformers_engine import TransformersEngine

        if policy is not None:
            return TransformersEngine(policy, **options)
        assert model_path is not None
        from pyrl.models import load_policy

        return TransformersEngine(load_policy(model_path, **load), shares_weights=False, **options)
    from .vllm_engine import VLLMEngine

    return VLLMEngine.from_policy(policy, model_path, **options)
