"""`load_policy`: a causal language model whose backbone reads packed rows; its head is data."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pyrl.models.files import quiet_transformers, whole_folder
from pyrl.models.lora import (
    Adapters,
    adapted_layers,
    adapter_weights,
    attach,
    merged,
    save_adapter,
    swapped_in,
    switched_off,
)
from pyrl.models.named import model_folder
from pyrl.models.offload import Offload
from pyrl.models.probe import check_policy
from pyrl.models.smollm2 import SMOLLM2_135M
from pyrl.packing.attention import ATTENTION_NAME, VarlenPlan, no_mask
from pyrl.packing.tree_attention import TREE_ATTENTION_NAME
from pyrl.packing.tree_plan import TreePlan

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ATTENTIONS = (TREE_ATTENTION_NAME, ATTENTION_NAME, "sdpa", "eager")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """logits = softcap * tanh(u / softcap), u = (hidden @ weight.T + bias) * logit_scale.

    Without a softcap, logits = u. `weight` is the parameter itself (of a tied model, the
    embedding's), so gradients that reach it train the model.
    """

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V], or None."""
    softcap: float | None
    """config.final_logit_softcapping (Gemma)."""
    logit_scale: float
    """config.logit_scale (Cohere), 1 / config.logits_scaling (Granite), else 1."""


@dataclasses.dataclass(eq=False)
class Policy:
    """A Hugging Face causal language model and its tokenizer.

    `model` is kept in eval mode and dropout is off: a policy's log-probs must not be random, and
    generation with a KV cache needs activation checkpointing out of the way. With low-rank adapters
    (`load_policy(adapters=...)`) they are inside `model` and alone require gradients.
    """

    model: Any
    tokenizer: Any
    gradient_checkpointing: bool = False
    offload_activations: bool = False

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and so of the computation."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def max_length(self) -> int:
        """Longest sequence: the smaller limit of the config and the tokenizer."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        limits = (limit, getattr(self.tokenizer, "model_max_length", None))
        return min((int(n) for n in limits if n), default=2**31)

    @functools.cached_property
    def _longrope_from(self) -> int:
        """Length above which `longrope` scaling takes other frequencies, for the whole row."""
        config = self.model.config
        scaling = getattr(config, "rope_parameters", None) or {}
        nested = [v for v in scaling.values() if isinstance(v, dict)] or [scaling]
        limits = [
            s.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", None)
            for s in nested
            if s.get("rope_type") == "longrope"
        ]
        return min((int(n) for n in limits if n), default=2**31)

    def hidden(self, tokens: Tensor, positions: Tensor, plan: TreePlan | Tensor) -> Tensor:
        """backbone(tokens), each token attending to its own sequence only; the head is not applied.

        tokens int64 [T], positions int64 [T] -> [T, D] in `dtype`, after the final norm. `plan`
        says which sequences there are: cu_seqlens int32 [S+1], or the plan of a packed row whose
        samples share prefixes (`pyrl_tree` attention only).

        Raises ValueError for other shapes, a plan that does not cover T, a token outside the
        vocabulary (checked on the CPU), a sequence longer than `max_length`.
        """
        if tokens.dim() != 1 or positions.shape != tokens.shape:
            raise ValueError(
                f"tokens {list(tokens.shape)} and positions {list(positions.shape)}: "
                "expected [T] and [T]"
            )
        found = _checked_plan(plan, positions)
        if found.max_length > self.max_length:
            raise ValueError(
                f"a sequence has {found.max_length} tokens; the model's context holds "
                f"{self.max_length}"
            )
        if found.max_length > self._longrope_from and found.max_length < tokens.shape[0]:
            raise ValueError(
                f"a sequence of {found.max_length} tokens in a row of {tokens.shape[0]}: beyond "
                f"{self._longrope_from} tokens longrope would change the positions of the row's "
                "other sequences; give it a row of its own"
            )
        embedding = self.model.get_input_embeddings()
        if tokens.shape[0] == 0:
            return embedding.weight.new_zeros(0, self.head().weight.shape[1])
        if not tokens.is_cuda and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(
            embedding.weight
        ):
            at = int(((tokens < 0) | (tokens >= len(embedding.weight))).nonzero()[0])
            raise ValueError(
                f"tokens[{at}]={int(tokens[at])}: the vocabulary has {len(embedding.weight)} ids"
            )
        with self._checkpointing():
            return self.model.base_model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                **self._packed(found, tokens.device),
            ).last_hidden_state[0]

    def _packed(self, plan: TreePlan | VarlenPlan, device: torch.device) -> dict[str, Any]:
        """What tells the model's attention who attends to whom."""
        attention = self.model.config._attn_implementation
        if isinstance(plan, TreePlan) and not plan.is_flat and attention != TREE_ATTENTION_NAME:
            raise ValueError(
                f"attention {attention!r} cannot share prefixes: load the policy with "
                f"attention={TREE_ATTENTION_NAME!r}, or pack with share_prefix=False"
            )
        if attention == TREE_ATTENTION_NAME and isinstance(plan, TreePlan):
            return {"attention_mask": no_mask(device), "tree_plan": plan}
        if attention in (ATTENTION_NAME, TREE_ATTENTION_NAME):
            if isinstance(plan, TreePlan):
                plan = plan.varlen
            return {"attention_mask": no_mask(device), "varlen_plan": plan}
        return {}  # transformers finds the restarts of `positions` and builds its own [T, T] mask

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Offloading, and training mode, which transformers demands for checkpointing, for this
        forward alone."""
        with ExitStack() as stack:
            if self.offload_activations and torch.is_grad_enabled():
                stack.enter_context(Offload(self.model))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                self.model.train()
                stack.callback(self.model.eval)
            yield

    def head(self) -> Head:
        """What turns `hidden` into logits."""
        output, config = self.model.get_output_embeddings(), self.model.config
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        divisor = float(getattr(config, "logits_scaling", None) or 1.0)
        return Head(
            weight=output.weight,
            bias=getattr(output, "bias", None),
            softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=scale / divisor,
        )

    @property
    def has_adapters(self) -> bool:
        """Whether low-rank adapters are trained over a frozen model."""
        return bool(adapted_layers(self.model))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What an engine with weights of its own is given: `model.named_parameters()`, with the
        names of the Hugging Face model, adapters merged and int8 weights dequantized."""
        return merged(self.model, self.model.named_parameters())

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The initial weights while it lasts, for forwards without a backward. ValueError for a
        policy that has no adapters to switch off."""
        if not self.has_adapters:
            raise ValueError("without_adapters: this policy trains all its weights")
        with switched_off(self.model):
            yield

    def initial(self) -> Policy:
        """The policy with its adapters off, sharing `model`: a reference that costs no memory."""
        with self.without_adapters():
            return Snapshot(self.model, self.tokenizer)

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a plain Hugging Face folder (safetensors, config, tokenizer), whole or not at all.

        `AutoModelForCausalLM.from_pretrained(folder)` opens it, in `dtype` (default: the
        parameters'). Tied weights are stored once. An existing folder is replaced. Adapters are
        merged, and written in peft's format to `folder`/adapter too.
        """
        target = Path(folder)
        with whole_folder(target) as aside, quiet_transformers():
            self.model.save_pretrained(aside, state_dict=self._state(dtype))
            if dtype is not None:
                path = aside / "config.json"
                config = json.loads(path.read_text())
                config["dtype"] = str(dtype).removeprefix("torch.")
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            self.tokenizer.save_pretrained(aside)
            if self.has_adapters:
                save_adapter(self.model, aside / "adapter")

    def _state(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The state dict in `dtype`; names that share memory share it still."""
        state = dict(merged(self.model, self.model.state_dict().items()))
        if dtype is None:
            return state
        cast: dict[tuple[int, torch.Size], Tensor] = {}
        for tensor in state.values():
            same = cast.get((tensor.data_ptr(), tensor.shape))
            if same is None and tensor.is_floating_point():
                cast[tensor.data_ptr(), tensor.shape] = tensor.to(dtype)
        return {k: cast.get((v.data_ptr(), v.shape), v) for k, v in state.items()}


@dataclasses.dataclass(eq=False)
class Snapshot(Policy):
    """A policy that shares another's model and computes, without gradient, with adapters of its
    own in it, or with none."""

    adapters: dict[str, Tensor] | None = None
    """By name in the model; None: off, the initial weights."""

    @torch.no_grad()  # a checkpoint's recomputation would find the model's own adapters
    def hidden(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Policy.hidden`."""
        own = self.adapters
        with switched_off(self.model) if own is None else swapped_in(self.model, own):
            return super().hidden(*args, **kwargs)

    def refresh(self) -> None:
        """The adapters <- a copy of the model's own. ValueError for a model without adapters."""
        found = adapter_weights(self.model)
        if not found:
            raise ValueError("snapshot: this policy has no adapters, it trains all its weights")
        self.adapters = {name: p.detach().clone() for name, p in found.items()}


def load_policy(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = TREE_ATTENTION_NAME,
    gradient_checkpointing: bool = False,
    offload_activations: bool = False,
    adapters: Adapters | None = None,
    check: bool = True,
) -> Policy:
    """Load a policy from what `model_folder` knows as `name` onto the CPU.

    Parameters, and so the computation, are in `dtype` (float32, bfloat16, float16). `attention` is
    `pyrl_tree`, `pyrl_varlen` (no shared prefixes), or transformers' `sdpa` or `eager`, which build
    [T, T] masks. Dropout is turned off. `adapters` freezes the model and trains low-rank adapters
    instead (docs/memory.md). With `check`, short sequences are run packed, with a shared prefix
    where the attention can, and alone, and the head is compared with the model's own logits: a
    model that mixes packed sequences (state-space or convolution layers, chunked attention, ...) or
    does more to its logits than `Head` says is refused rather than trained wrongly.

    Raises ValueError for a missing or incomplete model (weights missing or of another shape), a
    quantized or multimodal one, one that fails the check, or adapters that do not fit it.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype}: expected one of {[str(d) for d in _DTYPES]}")
    if attention not in _ATTENTIONS:
        raise ValueError(f"attention={attention!r}: expected one of {list(_ATTENTIONS)}")
    if adapters is not None and not isinstance(adapters, Adapters):
        raise ValueError(f"adapters={adapters!r}: expected Adapters")
    folder = model_folder(name)
    model: Any
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder)
            _refuse(name, config)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation=attention, output_loading_info=True
            )
            model, info = loaded
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except OSError as error:
            raise ValueError(
                f"model {name!r} cannot be loaded: {error}. Give a folder that "
                f"`save_pretrained` wrote, a Hugging Face id that can be reached, or "
                f"{SMOLLM2_135M!r}."
            ) from error
    for what in ("missing_keys", "mismatched_keys"):
        if info[what]:
            raise ValueError(f"model {name!r}: {what.replace('_', ' ')} {sorted(info[what])[:5]}")
    ours = attention in (ATTENTION_NAME, TREE_ATTENTION_NAME)
    if ours and not model._supports_attention_backend:
        raise ValueError(
            f"model {name!r}: transformers' {type(model).__name__} takes no attention functions "
            f"from outside, such as {attention}"
        )
    if model.get_output_embeddings() is None:
        raise ValueError(f"model {name!r}: {type(model).__name__} has no output embedding")
    _no_dropout(model)
    model.eval()
    if adapters is not None:
        attach(model, adapters)
    policy = Policy(model, tokenizer, gradient_checkpointing, offload_activations)
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"model {name!r}: {type(model).__name__} has no checkpointing")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if check:
        check_policy(policy, name)
    return policy


def _checked_plan(plan: TreePlan | Tensor, positions: Tensor) -> TreePlan | VarlenPlan:
    count = positions.shape[0]
    if not isinstance(plan, Tensor):
        if plan.num_tokens != count:
            raise ValueError(f"a plan of {plan.num_tokens} tokens for {count}")
        return plan
    found = VarlenPlan.build(plan, count)
    starts = plan[:-1][plan.diff() > 0].long()
    begins = positions.index_select(0, starts)
    if begins.count_nonzero():
        s = int(begins.nonzero()[0])
        raise ValueError(
            f"positions[{int(starts[s])}]={int(begins[s])}: a sequence begins with position 0; "
            "a branch of a shared prefix needs the row's `plan`"
        )
    return found


def _refuse(name: str, config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"model {name!r} is quantized: give its unquantized weights")
    if config.get_text_config() is not config or getattr(config, "vision_config", None):
        raise ValueError(
            f"model {name!r}: {config.model_type} is multimodal; pyrl trains text models"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model {name!r}: {config.model_type} is an encoder-decoder")
    other = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other:
        raise ValueError(
            f"model {name!r}: {config.model_type} has layers of type {sorted(other)}, which do not "
            f"keep packed sequences apart; supported are {sorted(_LAYER_TYPES)}"
        )


def _no_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            # a number, not a module, that the attention function is called with
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - mypy: nn.Module's __setattr__
