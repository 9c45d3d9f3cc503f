"""`linear_logprob` with the rows of the weight spread over the ranks of a process group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyrl.ops.backend import once_differentiable, select
from pyrl.ops.linear_logprob import (
    LogProb,
    _linear_logprob,
    _linear_logprob_backward,
    check_head,
    check_scaling,
    inv_temperature,
    lora_parts,
    token_ids,
)
from pyrl.ops.lora import LoRA
from pyrl.ops.shapes import layout
from pyrl.ops.support import Support, check_support, support_fields


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    support: Support | None = None,
    partial_hidden: bool = False,
    backend: str | None = None,
) -> LogProb:
    """linear_logprob(hidden, weight of all ranks, target); every rank gets the same result.

    This rank holds rows [vocab_start, vocab_start + len(weight)) of the head: weight [V_r, D], bias
    [V_r], lora.b [V_r, r] (a DTensor's `to_local()`). The shards cover the vocabulary once, in any
    order and of any size, 0 included; rows from `vocab_size` (of the whole head) on are padding.
    hidden, lora.a, target and support (ids of the whole vocabulary), mask and temperature are the
    same on every rank of `group` (default: the world).

    Forward: each rank's own log-sum-exp, entropy, target log-prob and number of its support's ids,
    one all-gather of [4, T].
    Backward: dweight, dbias and dlora.b stay on their rank; dhidden and dlora.a are summed over the
    ranks in fp32, one all-reduce each. With `partial_hidden` they are left as this rank's part, for
    a caller that reduce-scatters them (sequence parallelism).

    ValueError as in `linear_logprob`, the same on every rank for a kept target or an id of its
    support that no shard or more than one holds. NotImplementedError for backend="reference",
    which is one process.
    """
    if vocab_start < 0:
        raise ValueError(f"vocab_start={vocab_start}: expected an index >= 0")
    where = layout(target, mask, None)
    check_head(hidden, weight, target, bias, lora)
    rows = weight.shape[0]
    if vocab_size is not None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size}: expected >= 1")
        rows = min(max(vocab_size - vocab_start, 0), rows)
    check_scaling(softcap, logit_scale)
    name = select(backend, hidden.device)
    if name == "reference":
        raise NotImplementedError(
            "vocab_parallel_logprob: backend='reference' runs in one process; compare with its "
            "linear_logprob on the whole weight"
        )
    a, b, scale = lora_parts(lora)
    shard = _Shard(
        vocab_start, rows, scale, softcap or 0.0, logit_scale, name, partial_hidden, group
    )
    out = _VocabParallel.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        a,
        b,
        token_ids(target),
        inv_temperature(temperature, target),
        where.keep,
        *support_fields(support, target),
        shard,
    )
    return LogProb(*(v.reshape(target.shape) for v in out))


class _Shard(NamedTuple):
    start: int
    rows: int  # without padding
    lora_scale: float
    softcap: float
    logit_scale: float
    backend: str
    partial: bool
    group: dist.ProcessGroup | None

    @property
    def numbers(self) -> tuple[float, float, float, int, str]:
        """What the ops of one process take last."""
        return self.lora_scale, self.softcap, self.logit_scale, self.rows, self.backend


def combine(lse_r: Tensor, entropy_r: Tensor, logprob_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logprob, entropy, lse [T] of the whole vocabulary from those of its parts, each [parts, T].

    With the share w_r = exp(lse_r - lse) of part r:

        lse = logsumexp_r(lse_r)    H = sum_r w_r (H_r - log w_r)    logprob = logprob_o + log w_o

    o is the part that holds the target, logprob_r = inf in the others. Every term of H is >= 0:
    nothing cancels. A part without a finite logit (lse_r = -inf) adds nothing.
    """
    lse = lse_r.logsumexp(0)
    dead = lse_r == -torch.inf
    log_w = torch.where(dead, 0.0, lse_r - lse)
    entropy = torch.where(dead, 0.0, log_w.exp() * (entropy_r - log_w)).sum(0)
    logprob = torch.where(logprob_r == torch.inf, 0.0, logprob_r + log_w).sum(0)
    return logprob, entropy, lse


class _Part(NamedTuple):
    """What of the target and its support lies in this rank's rows."""

    target: Tensor  # int64 [T], in this shard's ids; where `used`, a token that softmax runs over
    owned: Tensor  # bool [T]: it is the target itself
    used: Tensor  # bool [T]: kept, with a part of the support here
    indptr: Tensor | None
    ids: Tensor | None
    sizes: Tensor  # fp32 [T]: ids of the token's support here; 0 without one

    @classmethod
    def of(
        cls,
        target: Tensor,
        keep: Tensor,
        indptr: Tensor | None,
        ids: Tensor | None,
        shard: _Shard,
    ) -> _Part:
        local = target - shard.start
        owned = (local >= 0) & (local < shard.rows)
        local = torch.where(owned, local, 0)
        if indptr is None or ids is None:
            return cls(local, owned, keep, None, None, target.new_zeros(target.shape).float())
        ids = ids - shard.start
        inside = (ids >= 0) & (ids < shard.rows)
        running = torch.nn.functional.pad(inside.cumsum(0), (1, 0))
        indptr, ids = running[indptr], ids[inside]
        sizes = indptr.diff().float()
        used = keep & (sizes > 0)
        first = torch.nn.functional.pad(ids, (0, 1))[indptr[:-1]].long()
        return cls(torch.where(owned, local, first), owned, used, indptr, ids, sizes)


class _VocabParallel(torch.autograd.Function):
    """hidden [T, D], weight [V_r, D], bias, a, b, target, inv_temperature, keep [T], a support."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, bias, a, b, target, inv, keep, indptr, ids, shard = inputs
        # The whole support, on every rank alike: a rank that raised alone would leave the others
        # waiting. That its ids lie in some shard is seen below.
        check_support(indptr, ids, target, keep, 1 << 31)
        part = _Part.of(target, keep, indptr, ids, shard)
        rows = (inv, part.used, part.indptr, part.ids)
        if shard.rows:
            logprob, entropy, lse = _linear_logprob(
                hidden, weight, part.target, bias, a, b, *rows, *shard.numbers
            )
        else:
            entropy = torch.zeros(target.shape, dtype=torch.float32, device=hidden.device)
            logprob = lse = torch.full_like(entropy, -torch.inf)
        if part.indptr is not None:
            lse = torch.where(part.used, lse, -torch.inf)
        mine = torch.stack([lse, entropy, torch.where(part.owned, logprob, torch.inf), part.sizes])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(shard.group))]
        dist.all_gather(parts, mine, group=shard.group)
        # [parts, T] each; in double and in rank order, so that every rank gets the same bits.
        lse_r, entropy_r, logprob_r, sizes = torch.stack(parts).double().unbind(1)
        _check_owners(target, keep, (logprob_r != torch.inf).sum(0))
        if indptr is not None:
            _check_sizes(keep, indptr.diff(), sizes.sum(0))
        out = [torch.where(keep, v, 0.0).float() for v in combine(lse_r, entropy_r, logprob_r)]
        ctx.save_for_backward(hidden, weight, part.target, bias, a, b, *rows, *out[1:], part.owned)
        ctx.shard = shard
        return out[0], out[1], out[2]

    @staticmethod
    def backward(ctx: Any, c: Tensor, h: Tensor, g: Tensor) -> Any:
        once_differentiable("vocab_parallel_logprob")
        *saved, owned = ctx.saved_tensors
        hidden, weight, _, bias, a, b, *_ = saved
        shard, leaves = ctx.shard, (hidden, weight, bias, a, b)
        needs = list(ctx.needs_input_grad[:5])
        # dx_v = c (1[v=y] - p_v) + ...: where the target is elsewhere, only -c p_v is left.
        elsewhere = torch.where(owned, g, g - c).contiguous()
        c = torch.where(owned, c, 0.0)
        if shard.rows:
            grads = list(
                _linear_logprob_backward(
                    *saved, c, h.contiguous(), elsewhere, *shard.numbers, needs, True
                )
            )
        else:
            grads = [
                v.new_zeros(v.shape, dtype=torch.float32) if wanted else None
                for v, wanted in zip(leaves, needs, strict=True)
            ]
        for i in (0, 3):  # hidden and a, which every rank has
            if needs[i] and not shard.partial:
                dist.all_reduce(grads[i], group=shard.group)
        gradients = (
            v.to(leaf.dtype) if wanted else None
            for v, leaf, wanted in zip(grads, leaves, needs, strict=True)
        )
        return *gradients, *([None] * 6)


def _check_sizes(keep: Tensor, expected: Tensor, found: Tensor) -> None:
    bad = (keep & (expected != found)).nonzero()
    if bad.numel():
        i = int(bad[0])
        raise ValueError(
            f"support of token {i}: its {int(expected[i])} ids were found {int(found[i])} times in "
            "the group's shards: each must lie in one"
        )


def _check_owners(target: Tensor, keep: Tensor, owners: Tensor) -> None:
    bad = (keep & (owners != 1)).nonzero()
    if bad.numel():
        i = int(bad[0])
        raise ValueError(
            f"target[{i}] = {int(target[i])} lies in {int(owners[i])} of the group's shards: each "
            "token id must lie in one (vocab_start, vocab_size, or an id outside the vocabulary)"
        )
