"""Everything a run needs before its first step, checked together."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from pyrl.algorithms import Critic
from pyrl.models import Adapters, AdapterSnapshot, FrozenCopy, Policy, Reference, load_policy
from pyrl.models.probe import check_policy
from pyrl.ops.backend import select
from pyrl.rollout import Canary, Rollout, SamplingParams, check_options, make_rollout
from pyrl.tasks import Mixture, Scorer, Split, Task, get_task
from pyrl.trainer.config import Config
from pyrl.trainer.data import EncodedPrompt, Prompts, PromptStream, derive_seed
from pyrl.trainer.setting import Setting, make_budget, make_setting

#: Re-scored after every sync; any text will do, as long as it never changes.
CANARY = "The quick brown fox jumps over the lazy dog, and nobody was surprised."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop works with."""

    policy: Policy
    reference: Reference | None
    """At first the initial weights, only where something is compared with them: a frozen copy, or
    with adapters the policy's own model with other adapters or none."""
    critic: Critic | None
    engine: Rollout
    scorer: Scorer
    prompts: Prompts
    heldout: list[EncodedPrompt]
    settings: dict[int, Setting]
    """By stage; without stages, -1."""
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
    task = _task(config)
    stages = {i: config.at(step) for i, step in _first_steps(config)}
    for i, stage in stages.items():
        try:
            make_budget(stage, hash)  # only checks its settings
        except ValueError as error:
            raise ValueError(f"{f'stages[{i}]: ' if i >= 0 else ''}budget.{error}") from None
    policy = _load(config, device)
    prompts, heldout = _prompts(config, list(stages.values()), task, policy)
    reference: Reference | None = None
    if config.needs_ref and config.train.reference == "initial":
        reference = (
            AdapterSnapshot(policy) if policy.has_adapters else FrozenCopy(_load(config, device))
        )
    critic = None
    if config.advantage.method == "gae":
        critic = Critic(_load(config, device, adapters=False))
    stop = tuple(sorted({*config.rollout.stop_token_ids, *_end_tokens(policy)}))
    settings = {i: make_setting(c, policy.head(), stop) for i, c in stages.items()}
    base = make_setting(config, policy.head(), stop)
    folder = getattr(policy.model, "name_or_path", "") or ""
    engine = make_rollout(
        config.rollout.engine,
        policy=policy,
        model_path=folder if os.path.isdir(folder) else None,
        **config.rollout.options,
    )
    text = policy.tokenizer.encode(CANARY, add_special_tokens=False)
    return Parts(
        policy=policy,
        reference=reference,
        critic=critic,
        engine=engine,
        scorer=Scorer(task, workers=config.task.workers, deadline=config.task.deadline),
        prompts=prompts,
        heldout=heldout,
        settings=settings,
        heldout_params=dataclasses.replace(
            base.params,
            n=config.eval.samples,
            temperature=config.eval.temperature or config.rollout.temperature,
        ),
        canary=Canary(text[:4], text[4:24]) if config.rollout.canary else None,
    )


def _first_steps(config: Config) -> list[tuple[int, int]]:
    """(stage, its first step) of those that the run comes to; (-1, 1) without stages."""
    if not config.stages:
        return [(-1, 1)]
    lengths = [stage.steps for stage in config.stages]
    firsts = [(i, 1 + sum(lengths[:i])) for i in range(len(lengths))]
    return [(i, step) for i, step in firsts if i == 0 or step <= config.train.steps]


def _task(config: Config) -> Task:
    settings = config.task
    if not settings.mix:
        return get_task(settings.name, **settings.options)
    return Mixture(
        {d: get_task(part.task or d, **part.options) for d, part in settings.mix.items()},
        {d: part.scale for d, part in settings.mix.items()},
    )


def _prompts(
    config: Config, stages: Sequence[Config], task: Task, policy: Policy
) -> tuple[Prompts, list[EncodedPrompt]]:
    """The training prompts, drawn ahead where one could be too long, and the held-out ones: as many
    of every domain, in turn."""
    used = stages if config.train.steps else [config]
    longest = max(c.rollout.max_new_tokens for c in (config, *used))
    room, seed = policy.max_length - longest, config.train.seed
    if room < 1:
        raise ValueError(
            f"rollout.max_new_tokens = {longest} leaves no room for a prompt "
            f"in the model's context of {policy.max_length} tokens"
        )

    def stream(domain: str, split: Split) -> PromptStream:
        found = task.domain(domain, split) if isinstance(task, Mixture) else task.prompts(split)
        if split == "heldout" and len(found) == 0:
            raise ValueError("no held-out prompts to evaluate; eval.prompts = 0 goes without")
        return PromptStream(found, policy.tokenizer, room, seed, domain)

    # As many as can be drawn at all: a step may need every one of its extra rounds.
    most = max(c.rollout.prompts_per_step * (1 + c.rollout.refill_rounds) for c in stages)
    domains = list(config.task.mix) or [""]
    streams: dict[str, PromptStream] = {}
    held: list[list[EncodedPrompt]] = []
    for domain in domains:
        try:
            streams[domain] = stream(domain, "train")
            streams[domain].check(0, config.train.steps * most)
            if config.eval.prompts:
                share = -(-config.eval.prompts // len(domains))
                held.append(stream(domain, "heldout").first(share))
        except ValueError as error:
            name = f"{config.task.name}.{domain}" if domain else config.task.name
            raise ValueError(f"task {name!r}: {error}") from None
    turns = itertools.zip_longest(*held)
    heldout = [prompt for turn in turns for prompt in turn if prompt is not None]
    return Prompts(streams, seed), heldout[: config.eval.prompts]


def _load(config: Config, device: torch.device, *, adapters: bool = True) -> Policy:
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
    low_rank = None
    if settings.lora_rank and adapters:
        low_rank = Adapters(
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
        adapters=low_rank,
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
