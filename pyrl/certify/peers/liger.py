"""Liger-Kernel: `LigerFusedLinearGRPOLoss` on hidden states and head."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pyrl
from pyrl import LossSpec
from pyrl.certify.batches import head, pad
from pyrl.certify.peers.base import (
    FIELDS,
    SHAPE,
    Batch,
    Case,
    L,
    Result,
    options,
    result,
    weight_of,
)
from pyrl.certify.peers.base import batch as log_probs
from pyrl.certify.peers.trl import COMMON
from pyrl.certify.rule import leaves_of


def cases() -> Iterator[Case]:
    """TRL's settings, an all-masked batch, and where Liger's loss is another one."""
    chunked = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    run = functools.partial(_run, chunked)
    given = _batch()
    for s in COMMON:
        yield Case(
            name=s.name, theirs=options(s.theirs), ours=s.ours,
            run=functools.partial(run, given, s.theirs, s.spec),
            oracle=functools.partial(_oracle, given, s.spec),
        )  # fmt: skip
    empty = given | {"mask": torch.zeros_like(given["mask"])}
    grpo, plain = {"loss_type": "grpo"}, LossSpec.preset("grpo")
    yield Case(
        name="all masked", theirs="loss_type=grpo", ours="grpo",
        run=lambda: run(empty, grpo), oracle=lambda: _oracle(empty, plain),
    )  # fmt: skip
    dirty = _batch(behind=torch.nan)
    yield Case(
        name="NaN behind the mask", theirs="loss_type=grpo", ours="grpo",
        run=lambda: run(dirty, grpo), oracle=lambda: _oracle(dirty, plain),
        differs="NaN: their mask multiplies (0 · NaN); ours selects",
    )  # fmt: skip
    luspo = LossSpec.preset("luspo", kl_coef=0.1)
    settings = {"loss_type": "luspo", "beta": 0.1, "importance_sampling_level": "sequence"}
    yield Case(
        name="luspo, KL k3", theirs=options(settings), ours="luspo, kl_coef=0.1",
        run=lambda: run(given, settings), oracle=lambda: _oracle(given, luspo),
        formula=lambda: _unmasked_luspo(given, luspo),
        differs="theirs multiplies an unmasked [B, L] loss by the sequence's length and divides by "
        "L: the KL of padding enters; TRL and ours sum over the kept tokens",
    )  # fmt: skip
    tis = LossSpec.preset("vespo", correction="tis")
    corrected = {"loss_type": "vespo", "correction": True, "behind": 1.5}
    yield Case(
        name="vespo, corrected, ratio 1.5 behind the mask", ours="vespo, correction=tis",
        theirs="loss_type=vespo, vllm_is_ratio=1.5 in padding",
        run=lambda: run(given, corrected, tis), oracle=lambda: _oracle(given, tis),
        formula=lambda: _oracle(_folded(given), LossSpec.preset("vespo", correction="tis",
                                                                correction_high=1e9)),
        differs="theirs sums the log ratio over padding too; ours over kept tokens",
    )  # fmt: skip


def _batch(behind: float = 0.0) -> Batch:
    """Fields around the head's own log-probs, and the head."""
    tensors = head(SHAPE, torch.float32)
    own = pyrl.linear_logprob(
        tensors["hidden"], tensors["weight"], tensors["target"], backend="reference"
    ).logprob
    given = log_probs(behind)
    shift = pad(own, SHAPE, -1.0) - given["logprob"]
    for name in FIELDS[:3]:
        given[name] = given[name] + shift
    given |= {name: pad(tensors[name], SHAPE, 0) for name in ("hidden", "target")}
    return given | {"weight": tensors["weight"]}


def _oracle(given: Batch, spec: LossSpec) -> Result:
    leaves = leaves_of({name: given[name] for name in ("hidden", "weight")})
    fields: dict[str, Any] = {name: given[name] for name in FIELDS}
    out = pyrl.linear_policy_loss(
        leaves["hidden"], leaves["weight"], given["target"], given["advantages"], spec,
        backend="reference", **fields,
    )  # fmt: skip
    out.loss.backward()
    return result(out.loss, leaves)


def _run(
    module: Any, given: Batch, settings: dict[str, Any], spec: LossSpec | None = None
) -> Result:
    leaves = leaves_of({name: given[name] for name in ("hidden", "weight")})
    settings = {"beta": 0.0, "max_completion_length": L, **settings}
    corrected, behind = settings.pop("correction", False), settings.pop("behind", 1.0)
    ratio = None
    if corrected and spec is not None:
        ratio = torch.where(given["mask"], weight_of(given, spec), behind)
    loss, _ = module(compiled=False, use_ref_model=True, **settings)(
        leaves["hidden"], leaves["weight"], given["target"], given["mask"].long(),
        given["advantages"], ref_per_token_logps=given["ref_logprob"],
        old_per_token_logps=given["old_logprob"], vllm_is_ratio=ratio,
        num_items_in_batch=given["mask"].sum(),
    )  # fmt: skip
    loss.backward()
    return result(loss, leaves)


def _unmasked_luspo(given: Batch, spec: LossSpec) -> Result:
    """(1/B) sum over sequences of n_s times the mean over all L columns of -min(...) + KL."""
    leaves = leaves_of({name: given[name] for name in ("hidden", "weight")}, torch.float64)
    logits = leaves["hidden"] @ leaves["weight"].T
    logp = logits.log_softmax(-1).gather(-1, given["target"][..., None])[..., 0]
    mask, a = given["mask"].double(), given["advantages"].double()
    n = mask.sum(1)
    r = (((logp - given["old_logprob"].double()) * mask).sum(1) / n).exp()
    clipped = r.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    d = given["ref_logprob"].double() - logp
    each = -torch.minimum(r * a, clipped * a)[:, None] + spec.kl_coef * (d.exp() - d - 1)
    loss: Tensor = (n * each.mean(1)).mean()
    loss.backward()
    return result(loss, leaves)


def _folded(given: Batch) -> Batch:
    """The batch whose first kept token carries the ratios that Liger reads behind the mask."""
    spec = LossSpec.preset("vespo", correction="tis")
    log_w = weight_of(given, spec).log()
    log_w[:, 0] += (~given["mask"]).sum(1) * torch.log(torch.tensor(1.5))
    return given | {"rollout_logprob": given["old_logprob"] - log_w}
