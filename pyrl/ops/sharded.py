"""Head weights that a trainer keeps sharded: gathering one with its gradient, refusing a shard."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def full_weight(
    source: nn.Module | Tensor,
    *,
    reduce: Literal["mean", "sum"] = "mean",
    replicated: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """The whole [V, D] of a head's weight (or bias, or adapter), whatever shards it:

        with full_weight(model.lm_head) as weight:
            loss = linear_policy_loss(hidden, weight, ...).loss
            loss.backward()  # inside: under ZeRO-3 the weight is gone again after the block

    - a plain tensor, or a module whose weight is one (also FSDP2's while it is unsharded, as the
      root's is after the forward pass): itself;
    - a DTensor (FSDP2, HSDP): all-gathered in `dtype` (default: its own), and the gradient of every
      rank's own tokens is reduce-scattered into the sharded parameter in the same dtype: the mean
      over the ranks as FSDP2 has it for all other parameters, or their sum. `replicated` names the
      dimensions of its mesh whose ranks hold the same tokens (tensor parallel), which adds nothing;
    - a DeepSpeed ZeRO-3 parameter: gathered for the block; its gradient goes through DeepSpeed's
      own hooks, which take the mean; `reduce`, `replicated` and `dtype` do not apply.

    A mean over R ranks with a global `denominator=` makes the gradient R times too small: multiply
    the loss by R there, as for the rest of the model.
    Collective: every rank of the mesh enters and, where the weight is trained, runs its backward.

    ValueError for an unknown `reduce` or mesh dimension.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce={reduce!r}: expected 'mean' or 'sum'")
    value: Any = source.weight if isinstance(source, nn.Module) else source
    if is_dtensor(value):
        yield _gather(value, reduce, replicated, dtype)
    elif _is_zero3(value) and tuple(value.shape) != tuple(value.ds_shape):
        value.all_gather()
        try:
            yield value
        finally:
            value.partition()
    else:
        yield value


def _gather(
    value: Any, reduce: str, replicated: Sequence[str], dtype: torch.dtype | None
) -> Tensor:
    from torch.distributed.tensor import Partial, Replicate

    mesh = value.device_mesh
    names = mesh.mesh_dim_names or ()
    for name in replicated:
        if name not in names:
            raise ValueError(f"replicated={name!r}: expected names of the mesh, {list(names)}")
    same = [i < len(names) and names[i] in replicated for i in range(mesh.ndim)]
    full = (value if dtype is None else value.to(dtype)).full_tensor(
        grad_placements=[Replicate() if s else Partial() for s in same]
    )
    ranks = math.prod(mesh.size(i) for i, s in enumerate(same) if not s)
    if reduce == "mean" and full.requires_grad:
        full.register_hook(lambda gradient: gradient / ranks)
    return full


def check_whole(name: str, value: Tensor) -> None:
    """ValueError, with what to do, for a shard of a weight where the whole is needed."""
    if is_dtensor(value):
        sharded: Any = value
        raise ValueError(
            f"{name}: expected a plain tensor, got a DTensor {tuple(value.shape)} with placements "
            f"{tuple(sharded.placements)}; use `with pyrl.full_weight({name})`, or pass its local "
            "rows to pyrl.vocab_parallel_logprob"
        )
    if value.numel() == 0 and value.dim() == 1:
        whole = ""
        if _is_zero3(value):
            zero: Any = value
            whole = f" of the whole {tuple(zero.ds_shape)}"
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}: a ZeRO-3 partition{whole} (or another freed "
            f"shard); use `with pyrl.full_weight({name})` around the loss and its backward"
        )


def is_dtensor(value: Any) -> bool:
    """Whether `value` is a DTensor; by its attributes, so that nothing is imported."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def _is_zero3(value: Any) -> bool:
    return hasattr(value, "ds_id") and hasattr(value, "ds_shape")
