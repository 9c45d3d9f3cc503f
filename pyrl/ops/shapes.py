"""From what callers hold, packed `[T]` or padded `[B, L]`, to flat `[T]` vectors and weights."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pyrl.ops.spec import LossSpec


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the sequences of a batch lie in its flat token axis."""

    shape: torch.Size
    """Shape of `target`: [T] or [B, L]."""
    keep: Tensor
    """bool [T], contiguous: true = the token carries loss."""
    cu_seqlens: Tensor | None
    """int64 [B + 1] boundaries, None when packed input came without."""

    @property
    def tokens(self) -> int:
        """T, kept or not."""
        return self.keep.numel()

    @property
    def sequences(self) -> int | None:
        """B, where known."""
        return None if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def sequence_ids(self) -> Tensor:
        """int64 [T]: the sequence of each token."""
        if self.cu_seqlens is None:
            raise ValueError("packed [T] input needs cu_seqlens where sequences matter")
        lengths = self.cu_seqlens.diff()
        ids = torch.arange(lengths.numel(), device=lengths.device)
        return ids.repeat_interleave(lengths, output_size=self.tokens)


def layout(like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Layout:
    """The layout of a tensor shaped like `target`; checks shapes and dtypes of mask and bounds."""
    if like.dim() not in (1, 2):
        raise ValueError(f"expected a packed [T] or padded [B, L] shape, got {tuple(like.shape)}")
    if mask is None:
        keep = torch.ones(like.shape, dtype=torch.bool, device=like.device)
    else:
        check_shape("mask", mask, like.shape, like.device)
        keep = mask.bool()
        if mask.dtype != torch.bool and on_cpu(mask) and not bool((mask == keep).all()):
            i = int((mask != keep).flatten().nonzero()[0])
            raise ValueError(f"mask[{i}] = {float(mask.flatten()[i])}: expected 0 or 1")
    if like.dim() == 2:
        if cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens belongs to packed [T] input, but the input is padded [B, L]"
            )
        b, length = like.shape
        bounds = torch.arange(b + 1, device=like.device) * length
    elif cu_seqlens is None:
        return Layout(like.shape, keep.contiguous(), None)
    else:
        bounds = _check_bounds(cu_seqlens, like)
    return Layout(like.shape, keep.reshape(-1).contiguous(), bounds)


def _check_bounds(cu_seqlens: Tensor, like: Tensor) -> Tensor:
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            "cu_seqlens: expected integers [B + 1], "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    bounds = cu_seqlens.to(like.device, torch.int64).contiguous()
    # Values are checked where that costs no wait for the device and does not break a traced graph.
    if on_cpu(bounds):
        if int(bounds[0]) != 0 or int(bounds[-1]) != like.numel():
            raise ValueError(
                f"cu_seqlens must run from 0 to T={like.numel()}, "
                f"got {int(bounds[0])} … {int(bounds[-1])}"
            )
        falls = (bounds.diff() < 0).nonzero()
        if falls.numel():
            i = int(falls[0])
            raise ValueError(
                f"cu_seqlens falls at {i + 1}: {int(bounds[i])} → {int(bounds[i + 1])}"
            )
    return bounds


def check_shape(
    name: str, value: Tensor, shape: torch.Size | tuple[int, ...], device: torch.device
) -> None:
    """ValueError unless `value` has this shape on this device."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {value.device}")


def flat_float(name: str, value: Tensor | None, where: Layout) -> Tensor | None:
    """fp32 [T] of an optional per-token field shaped like `target`, detached."""
    if value is None:
        return None
    check_shape(name, value, where.shape, where.keep.device)
    if not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {value.dtype}")
    return value.detach().reshape(-1).float().contiguous()


def per_token(name: str, value: Tensor, where: Layout) -> Tensor:
    """fp32 [T] of a per-token (shaped like `target`) or per-sequence `[B]` field."""
    if value.shape == where.shape:
        spread = value.detach().reshape(-1)
    elif value.dim() == 1 and value.numel() == where.sequences:
        spread = value.detach()[where.sequence_ids()]
    else:
        expected = f"{tuple(where.shape)}"
        if where.sequences is not None:
            expected += f" or ({where.sequences},)"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
    if value.device != where.keep.device:
        raise ValueError(f"{name}: expected a tensor on {where.keep.device}, got {value.device}")
    if value.is_complex():
        raise ValueError(f"{name}: expected real numbers, got {value.dtype}")
    spread = spread.float().contiguous()
    check_finite(name, spread, where.keep)
    return spread


def on_cpu(value: Tensor) -> bool:
    """Whether looking at values is free: no wait for a device, no break of a traced graph."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def check_finite(name: str, value: Tensor, keep: Tensor) -> None:
    """ValueError naming the first kept position that is not finite (on the CPU, untraced)."""
    if not on_cpu(value):
        return
    bad = (~value.isfinite() & keep).nonzero()
    if bad.numel():
        i = int(bad[0])
        raise ValueError(f"{name}[{i}] = {float(value[i])} is not finite")


def check_denominator(denominator: float | Tensor, device: torch.device) -> Tensor:
    """float64 0-d; ValueError unless it is one finite number >= 0 (its value on the CPU only)."""
    total = torch.as_tensor(denominator, dtype=torch.float64, device=device)
    if total.dim() != 0:
        raise ValueError(f"denominator: expected one number, got shape {tuple(total.shape)}")
    if on_cpu(total) and not (total.isfinite() and total >= 0):
        raise ValueError(f"denominator={float(total)}: expected a finite number >= 0")
    return total


def token_weights(
    spec: LossSpec, where: Layout, weights: Tensor | None, denominator: float | Tensor | None
) -> Tensor:
    """fp32 [T]: the factor of each kept token's loss, 0 elsewhere.

    token_mean 1/N · sequence_mean 1/(B n_s) · sequence_sum 1/B · constant 1/(B max_length) ·
    weighted w_t/sum(w), with N, B or sum(w) replaced by `denominator` if given: the sum over the
    whole optimizer step, so that micro-batches and ranks add up without division. A count below 1
    is taken as 1, a sum of weights of 0 too.
    """
    keep = where.keep
    device = keep.device
    if denominator is not None:
        total = check_denominator(denominator, device)
        if spec.aggregation == "weighted":
            total = torch.where(total == 0, 1.0, total)
        else:
            total = total.clamp(min=1)
    if spec.aggregation in ("token_mean", "weighted"):
        factor = keep.double()
        if spec.aggregation == "weighted":
            if weights is None:
                raise ValueError("LossSpec.aggregation='weighted' needs weights")
            factor = torch.where(keep, per_token("weights", weights, where).double(), 0.0)
        if denominator is None:
            total = factor.sum()
            total = torch.where(total == 0, 1.0, total)
        return (factor / total).float()
    if where.cu_seqlens is None or where.sequences is None:
        raise ValueError(
            f"LossSpec.aggregation={spec.aggregation!r} on packed [T] needs cu_seqlens"
        )
    if denominator is None:
        total = torch.tensor(max(where.sequences, 1), dtype=torch.float64, device=device)
    if spec.aggregation == "constant":
        if spec.max_length is None:
            raise ValueError("LossSpec.aggregation='constant' needs max_length")
        total = total * spec.max_length
    if spec.aggregation == "sequence_mean":
        ids = where.sequence_ids()
        counts = torch.zeros(where.sequences, dtype=torch.float64, device=device)
        counts = counts.index_add(0, ids, keep.double()).clamp(min=1)
        return torch.where(keep, 1.0 / (counts[ids] * total), 0.0).float()
    return torch.where(keep, 1.0 / total, 0.0).float()
