"""The gradient norm of every sample's own log-likelihood: what GVM's budgets are made from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pyrl.models import Policy
from pyrl.ops.head_gradient_norm import head_gradient_norms
from pyrl.ops.linear_logprob import linear_logprob
from pyrl.ops.spec import LossSpec
from pyrl.packing import PackedBatch, Sample, pack
from pyrl.packing.tree_attention import TREE_ATTENTION_NAME
from pyrl.trainer.rows import SEGMENT_COST

Parameter = Literal["lm_head", "embed", "all"]
PARAMETERS = ("lm_head", "embed", "all")


def gradient_norms(
    policy: Policy,
    samples: Sequence[Sample],
    spec: LossSpec,
    parameter: Parameter = "lm_head",
    *,
    tokens_per_row: int,
    backend: str | None = None,
) -> list[float]:
    """|∇_parameter sum_t -log p(completion[t] | prompt, completion[:t])| of every sample, in order.

    The sum runs over the tokens that the sample's mask keeps; log p at the spec's temperature,
    softcap and logit scale; advantages, weights and old log-probs play no part. Rows of at most
    `tokens_per_row` computed tokens, wider where a sample is longer.

    - "lm_head": the head's weight, by a forward and `head_gradient_norms`. Samples share prefixes.
    - "embed": the input embedding's weight, by one backward a row, to the embedding's outputs.
    - "all": all that is trained (low-rank adapters, where there are any), by one backward a sample.

    Of a tied weight "embed" is the part that comes through the input and "lm_head" the part through
    the output; only "all" has their sum. No `.grad` is set, and no hook of an optimizer runs.

    ValueError for an unknown parameter, an input embedding that is not a plain or scaled lookup.
    """
    if parameter not in PARAMETERS:
        raise ValueError(f"parameter={parameter!r}: expected one of {', '.join(PARAMETERS)}")
    samples = [dataclasses.replace(s, advantage=0.0, weight=1.0) for s in samples]
    if not samples:
        return []
    sizes = [len(s.prompt) + len(s.completion) for s in samples]
    if parameter == "all":
        pack(samples, max(sizes))  # names a bad sample by its position
        rows = [_rows([s], n, False)[0] for s, n in zip(samples, sizes, strict=True)]
        return [_of_all(policy, row.to(policy.device), spec, backend) for row in rows]
    attention = policy.model.config._attn_implementation
    share = parameter == "lm_head" and attention == TREE_ATTENTION_NAME
    measure = _of_head if parameter == "lm_head" else _of_embedding
    norms = torch.zeros(len(samples), dtype=torch.float64)
    for row in _rows(samples, max(tokens_per_row, *sizes), share):
        norms[row.sequence_ids] = (
            measure(policy, row.to(policy.device), spec, backend).double().cpu()
        )
    return norms.tolist()


def _rows(samples: Sequence[Sample], capacity: int, share: bool) -> list[PackedBatch]:
    cost = SEGMENT_COST if share else 0.0
    return list(pack(samples, capacity, share_prefix=share, aligned=False, segment_cost=cost))


@torch.no_grad()
def _of_head(policy: Policy, row: PackedBatch, spec: LossSpec, backend: str | None) -> Tensor:
    """[S]."""
    hidden = policy.hidden(row.tokens, row.positions, row.plan)
    head = policy.head()
    return head_gradient_norms(
        row.at_targets(hidden),
        head.weight,
        row.target,
        row.cu_seqlens,
        bias=head.bias,
        mask=row.loss_mask,
        temperature=spec.temperature,
        softcap=spec.softcap,
        logit_scale=spec.logit_scale,
        backend=backend,
    )


def _surprise(
    policy: Policy, row: PackedBatch, spec: LossSpec, backend: str | None, *, train_head: bool
) -> Tensor:
    """sum_t -log p(target_t) of the row; without `train_head` as of a head that is a constant."""
    hidden = policy.hidden(row.tokens, row.positions, row.plan)
    head = policy.head()
    weight, bias = head.weight, head.bias
    if not train_head:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    out = linear_logprob(
        row.at_targets(hidden),
        weight,
        row.target,
        bias=bias,
        temperature=spec.temperature,
        softcap=spec.softcap,
        logit_scale=spec.logit_scale,
        mask=row.loss_mask,
        backend=backend,
    )
    return -out.logprob.sum()


@torch.enable_grad()
def _of_all(policy: Policy, row: PackedBatch, spec: LossSpec, backend: str | None) -> float:
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    loss = _surprise(policy, row, spec, backend, train_head=True)
    # Not `backward`: it would run the optimizer's hooks on the parameters.
    grads = torch.autograd.grad(loss, trained, allow_unused=True)
    squares = [_square(g) for g in grads if g is not None]
    return float(torch.stack(squares).sum().sqrt())


def _square(g: Tensor) -> Tensor:
    return torch.linalg.vector_norm(g, dtype=torch.float32).double().square()


@torch.enable_grad()
def _of_embedding(policy: Policy, row: PackedBatch, spec: LossSpec, backend: str | None) -> Tensor:
    """[S]: gradients of the embedding's outputs, added up over equal tokens of a sample."""
    embedding = policy.model.get_input_embeddings()
    factor = _factor(embedding)
    with _leaf(embedding) as leaves:
        loss = _surprise(policy, row, spec, backend, train_head=False)
    (leaf,) = leaves
    (grad,) = torch.autograd.grad(loss, leaf)
    vocab = len(embedding.weight)
    # Without shared prefixes every segment is a sample, and every token is of one segment.
    sample_of = torch.empty(row.num_sequences, dtype=torch.long)
    sample_of[row.sequence_segments] = torch.arange(row.num_sequences)
    owner = sample_of.repeat_interleave(row.segment_starts.diff()).to(grad.device)
    cells, cell = (owner * vocab + row.tokens).unique(return_inverse=True)
    sums = torch.zeros(len(cells), grad.shape[-1], device=grad.device)
    sums.index_add_(0, cell, grad.reshape(len(cell), -1).float())
    if embedding.padding_idx is not None:  # autograd gives that row no gradient
        sums[cells % vocab == embedding.padding_idx] = 0.0
    squares = torch.zeros(row.num_sequences, dtype=torch.float64, device=grad.device)
    squares.index_add_(0, cells // vocab, sums.square().sum(1, dtype=torch.float64))
    return squares.sqrt() * factor


def _factor(embedding: nn.Module) -> float:
    """What the looked-up rows are multiplied with (Gemma 3)."""
    scale = getattr(embedding, "embed_scale", None)
    if type(embedding) is nn.Embedding:
        return 1.0
    if not isinstance(embedding, nn.Embedding) or scale is None:
        raise ValueError(
            f"parameter='embed': {type(embedding).__name__} is not a plain or scaled nn.Embedding; "
            "take 'lm_head' or 'all'"
        )
    return float(torch.as_tensor(scale).to(embedding.weight.dtype))


@contextlib.contextmanager
def _leaf(embedding: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts, what `embedding` returns is a leaf of the graph, kept in the list."""
    leaves: list[Tensor] = []

    def cut(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = embedding.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()
