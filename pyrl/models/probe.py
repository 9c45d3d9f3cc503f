"""Does this model do what packing and `Head` assume? Asked of the model itself, not of its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrl.packing.attention import ATTENTION_NAME
from pyrl.packing.tree_attention import TREE_ATTENTION_NAME
from pyrl.packing.tree_plan import TreePlan

if TYPE_CHECKING:
    from pyrl.models.policy import Policy

#: Relative error between two computations of the same numbers in different batch shapes. float32:
#: reordered sums through tens of layers stay near 1e-6. Half precision: each layer rounds at
#: 2^-8 (bfloat16) or 2^-11, and the roundings of tens of layers add up. A model that mixes
#: sequences, or a head with another factor, is off by far more than these.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


def _error(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def check_model(model: Any) -> None:
    """Raises ValueError unless a transformers causal language model can be trained on packed rows.

    For models loaded with `attn_implementation="pyrl_tree"` or "pyrl_varlen" and not by
    `load_policy`, which asks the same: layers that carry a state along the row are found by what
    they compute, whatever they are called. The mode of the model (train, eval) is left as it is.
    """
    from pyrl.models.policy import Policy

    training = model.training
    model.eval()
    try:
        check_policy(Policy(model, None), type(model).__name__)
    finally:
        model.train(training)


@torch.no_grad()
def check_policy(policy: Policy, name: str, lengths: tuple[int, int] = (5, 7)) -> None:
    """Raises ValueError naming the model unless, for two short sequences A and B,

        hidden([A, B])[B] = hidden([B])   and   Head(hidden([B])) = model(B).logits

    and, with an attention that shares prefixes, hidden(A with branches B and C) = hidden([A, C]) at
    C, all up to rounding. A few forward passes of a dozen tokens; no RNG is touched.
    """
    first, second = lengths
    device = policy.device
    vocab = policy.model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(first + second, device=device) * 7919 + 13) % vocab
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    # Products this small only wait for each other on several threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        both = policy.hidden(tokens, positions, _bounds(device, 0, first, first + second))
        alone = policy.hidden(tokens[first:], positions[first:], _bounds(device, 0, second))
        logits = policy.model(input_ids=tokens[None, first:], use_cache=False).logits[0]
        ours = _logits(policy, alone)
        branch, whole = _branch(policy, tokens, first)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"model {name!r}: {type(policy.model).__name__} cannot run packed rows: {error}"
        ) from error
    finally:
        torch.set_num_threads(threads)

    allowed, model = _TOLERANCE[policy.dtype], type(policy.model).__name__
    mixed = _error(both[first:], alone)
    if not mixed <= allowed:
        raise ValueError(
            f"model {name!r}: {model} does not keep packed sequences apart (a sequence after "
            f"another one and alone differ by {mixed:.1e} of its norm, allowed {allowed:.0e}); "
            "it cannot be trained on packed rows"
        )
    forked = _error(branch, whole)
    if not forked <= allowed:
        raise ValueError(
            f"model {name!r}: {model} cannot share prefixes (a branch and its whole sequence "
            f"differ by {forked:.1e} of their norm, allowed {allowed:.0e}); "
            f"attention={ATTENTION_NAME!r} goes without"
        )
    off = _error(ours, logits)
    if not off <= allowed:
        raise ValueError(
            f"model {name!r}: the logits of {model} are not its output embedding with a scale and "
            f"a softcap (off by {off:.1e} of their norm, allowed {allowed:.0e}); its log-probs "
            "would be wrong"
        )


def _branch(policy: Policy, tokens: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Hidden states of the second branch after a shared prefix, and of the same tokens unshared."""
    device, (total,) = tokens.device, tokens.shape
    own = total - prefix
    if policy.model.config._attn_implementation != TREE_ATTENTION_NAME:
        return tokens.new_ones(1), tokens.new_ones(1)
    other = tokens.flip(0)[:own]  # another branch before this one
    tree = TreePlan.build((0, prefix, total, total + own), (-1, 0, 0), device=device)
    positions = torch.arange(total, device=device)
    forked = policy.hidden(
        torch.cat([tokens[:prefix], other, tokens[prefix:]]),
        torch.cat([positions, positions[prefix:]]),
        tree,
    )
    whole = policy.hidden(tokens, positions, _bounds(device, 0, total))
    return forked[total:], whole[prefix:]


def _bounds(device: torch.device, *ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=device)


def _logits(policy: Policy, hidden: Tensor) -> Tensor:
    head = policy.head()
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
