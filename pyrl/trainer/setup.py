"""Everything a run needs before its first step, checked together."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
import transformers

from pyrl.models import Adapters, Policy, load_policy
from pyrl.models.probe import check_policy
from pyrl.ops.backend import select
from pyrl.ops.spec import LossSpec
from pyrl.rollout import Canary, Rollout, SamplingParams, check_options, make_rollout
from pyrl.tasks import Scorer, get_task
from pyrl.trainer.config import Config
from pyrl.trainer.data import EncodedPrompt, PromptStream, derive_seed

#: Re-scored after every sync; any text will do, as long as it never changes.
CANARY = "The quick brown fox jumps over the lazy dog, and nobody was surprised."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop works with."""

    policy: Policy
    reference: Policy | None
    """The initial weights, only for a KL term against them: a frozen copy, or with adapters the
    policy's own model with the adapters off."""
    engine: Rollout
    scorer: Scorer
    stream: PromptStream
    heldout: list[EncodedPrompt]
    spec: LossSpec
    params: SamplingParams
    heldout_params: SamplingParams
    canary: Canary | None

    def close(self) -> None:
        """Ends the engine and the scoring processes."""
        self.engine.close()
        self.scorer.close()


def prepare(config: Config) -> Parts:
    """Loads and checks. ValueError names what is wrong before anything has been computed: a missing
    model folder, an empty data set, a prompt longer than its room, a backend that is absent."""
    check_options(config.rollout.engine, config.rollout.options)
    _settle_torch(config)
    # The run has a progress display of its own.
    transformers.utils.logging.disable_progress_bar()
    device = _device(config.model.device)
    select(config.train.backend, device)
    task = get_task(config.task.name, **config.task.options)
    policy = _load(config, device)
    reference = None
    sampling = config.rollout
    room = policy.max_length - sampling.max_new_tokens
    if room < 1:
        raise ValueError(
            f"rollout.max_new_tokens = {sampling.max_new_tokens} leaves no room for a prompt "
            f"in the model's context of {policy.max_length} tokens"
        )
    try:
        stream = PromptStream(task.prompts("train"), policy.tokenizer, room, config.train.seed)
        # As many as can be drawn at all: a step may need every one of its extra rounds.
        most = sampling.prompts_per_step * (1 + sampling.refill_rounds)
        stream.check(0, config.train.steps * most)
        heldout: list[EncodedPrompt] = []
        if config.eval.prompts:
            split = task.prompts("heldout")
            if len(split) == 0:
                raise ValueError("no held-out prompts to evaluate; eval.prompts = 0 goes without")
            held = PromptStream(split, policy.tokenizer, room, config.train.seed)
            heldout = held.first(config.eval.prompts)
    except ValueError as error:
        raise ValueError(f"task {config.task.name!r}: {error}") from None

    head = policy.head()
    spec = config.loss.spec(
        temperature=sampling.temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        max_length=sampling.max_new_tokens,
    )
    if spec.needs_ref and config.train.reference == "initial":
        if policy.has_adapters:
            reference = policy.initial()
        else:
            reference = _load(config, device)
            reference.model.requires_grad_(False)
    params = SamplingParams(
        n=sampling.n,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=tuple(sorted({*sampling.stop_token_ids, *_end_tokens(policy)})),
    )
    folder = getattr(policy.model, "name_or_path", "") or ""
    engine = make_rollout(
        sampling.engine,
        policy=policy,
        model_path=folder if os.path.isdir(folder) else None,
        **sampling.options,
    )
    text = policy.tokenizer.encode(CANARY, add_special_tokens=False)
    return Parts(
        policy=policy,
        reference=reference,
        engine=engine,
        scorer=Scorer(task, workers=config.task.workers, deadline=config.task.deadline),
        stream=stream,
        heldout=heldout,
        spec=spec,
        params=params,
        heldout_params=dataclasses.replace(
            params,
            n=config.eval.samples,
            temperature=config.eval.temperature or sampling.temperature,
        ),
        canary=Canary(text[:4], text[4:24]) if sampling.canary else None,
    )


def _load(config: Config, device: torch.device) -> Policy:
    settings = config.model
    name = settings.name
    looks_like_path = name.startswith(("/", "./", "../", "~"))
    if looks_like_path and not Path(name).expanduser().is_dir():
        raise ValueError(f"model.name = {name!r}: no such folder")
    if settings.offload_activations and device.type == "cpu":
        raise ValueError(
            "model.offload_activations = true: on a CPU the activations are in host memory "
            "already; it needs model.device = 'cuda' (gradient_checkpointing saves memory here)"
        )
    adapters = None
    if settings.lora_rank:
        adapters = Adapters(
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            targets=tuple(settings.lora_targets),
            quantize=settings.quantize,
            seed=derive_seed(config.train.seed, 0, "adapters"),
        )
    policy = load_policy(
        str(Path(name).expanduser()) if looks_like_path else name,
        dtype=getattr(torch, settings.dtype),
        attention=settings.attention,
        gradient_checkpointing=settings.gradient_checkpointing,
        offload_activations=settings.offload_activations,
        adapters=adapters,
    )
    policy.model.to(device)
    if device.type != "cpu" and policy.max_length >= 300:
        # Other kernels than those that `load_policy` asked on the CPU; several blocks of 128.
        check_policy(policy, name, (100, 200))
    return policy


def _end_tokens(policy: Policy) -> set[int]:
    """What ends a completion, according to the model's generation config and the tokenizer."""
    generation = getattr(policy.model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    ids = set(found if isinstance(found, (list, tuple)) else [found])
    ids.add(policy.tokenizer.eos_token_id)
    return {int(i) for i in ids if i is not None}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"model.device = {name!r}: {error}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"model.device = {name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"model.device = {name!r}: torch sees no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"model.device = {name!r}: torch sees {count} CUDA devices, from cuda:0")
    return device


def _settle_torch(config: Config) -> None:
    """The number of threads decides the order of sums; nothing else on the CPU does."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.train.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Only debugging wants uninitialised memory filled; it costs a pass over every allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
