"""Rows of `group_advantage`, `gae` and the KL in the reward: values without a gradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

import pyrl
from pyrl.certify.batches import MISSING, RAGGED, Shape, laid_out, numbers, pad
from pyrl.certify.rule import Row, Sample, Values, interpreted, judge
from pyrl.ops import reference
from pyrl.ops.group_advantage import FILTERS, METHODS, METRICS
from pyrl.ops.spec import KL
from pyrl.parity import DEVICE

#: Reward batches.
GROUPS = ("ragged", "one sample each", "all equal", "0 and 1", "large mean", "NaN rewards")
#: Options of group_advantage, tried on every method and batch.
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "population std": {"unbiased": False},
    "eps 1e-4": {"eps": 1e-4},
    "reward_map (-1, 1)": {"reward_map": (-1.0, 1.0)},
    **{f"{name}, {mode}": {"filter": name, "filter_mode": mode}
       for name in FILTERS for mode in ("zero", "drop")},
    "all filters, drop, mapped": {
        "filter": FILTERS, "filter_mode": "drop", "reward_map": (-1.0, 1.0),
    },
}  # fmt: skip
#: Options that are tried with CSR offsets too.
_TWICE = ("", "all filters, drop, mapped")


def _rewards(name: str) -> tuple[Tensor, Tensor]:
    """rewards [10] and group ids [10] in no order."""
    g = torch.Generator().manual_seed(3)
    ids = torch.tensor([7, 7, 7, -2, 5, 5, 5, 5, 7, 5])
    rewards = torch.randn(10, generator=g)
    if name == "one sample each":
        ids = torch.arange(10).flip(0)
    elif name == "all equal":
        rewards = torch.full((10,), 0.3)
    elif name == "0 and 1":
        rewards = torch.tensor([1.0, 1, 1, 0, 0, 1, 0, 0, 1, 1])  # one group all right, one wrong
    elif name == "large mean":
        rewards = rewards + 1e4  # fp32 keeps three digits of the spread: sums must not lose them
    elif name == "NaN rewards":
        rewards[::3] = torch.nan
    return rewards.to(DEVICE), ids.to(DEVICE)


def groups(columns: Sequence[str], quick: bool) -> Iterator[Row]:
    """Every method with every option on every batch, groups as ids and as CSR offsets."""
    for method in METHODS:
        for batch in GROUPS:
            for option in ("",) if quick else OPTIONS:
                # Offsets are what the kernels read: ids become them before any option matters.
                for csr in (False, True) if option in _TWICE else (False,):
                    yield _group_row(method, batch, option, csr, columns)


def _group_row(method: str, batch: str, option: str, csr: bool, columns: Sequence[str]) -> Row:
    rewards, ids = _rewards(batch)
    given: dict[str, Any] = {"group_ids": ids}
    if csr:
        order = ids.argsort(stable=True)
        rewards, ids = rewards[order], ids[order]
        sizes = ids.unique_consecutive(return_counts=True)[1]
        given = {"group_offsets": torch.nn.functional.pad(sizes.cumsum(0), (1, 0))}
    options = OPTIONS[option]
    low, high = options.get("reward_map", (0.0, 1.0))
    chosen = options.get("filter", ())
    chosen = (chosen,) if isinstance(chosen, str) else chosen
    advantages, keep, metrics = reference.group_advantage(
        rewards.double(), ids, method, options.get("unbiased", True), options.get("eps", 1e-6),
        sum(1 << FILTERS.index(name) for name in chosen), options.get("filter_mode") == "drop",
        low, high - low,
    )  # fmt: skip

    def compute(backend: str) -> Values:
        out = pyrl.group_advantage(rewards, method=method, backend=backend, **given, **options)
        return {
            "advantages": out.advantages,
            "keep": out.keep,
            "metrics": torch.stack([out.metrics[name] for name in METRICS]),
        }

    row = Row(
        section="group_advantage", case=method, option=option, dtype=torch.float32, plain=None,
        shape=f"{batch}, {'offsets' if csr else 'ids'}",
    )  # fmt: skip
    truth = {"advantages": advantages, "keep": keep, "metrics": metrics}
    return judge(row, columns, [Sample(truth, None, compute)])


def gae(columns: Sequence[str], quick: bool) -> Iterator[Row]:
    """Discounts, ends and layouts; values behind the mask are NaN."""
    slow = interpreted()
    shapes = (
        RAGGED,
        Shape(name="padded = packed", padded=True),
        Shape(name="all masked", kept=0.0),
        Shape(name="no token", lengths=(0, 0)),
        Shape(name="L = 65536", lengths=(65536, 3), kept=1.0, compiled=True),
    )
    for gamma, lam in ((1.0, 0.95), (0.99, 1.0), (0.9, 0.0), (0.0, 0.5)):
        for ends in ("terminated", "truncated, bootstrapped"):
            for shape in shapes[: 2 if quick else None]:
                # A Python loop in the oracle, so once; and one program of an interpreter.
                if shape.compiled and (gamma, ends) != (1.0, "terminated"):
                    continue
                which = [c for c in columns if not shape.compiled or c not in slow]
                yield _gae_row(gamma, lam, ends, shape, which)


def _gae_row(gamma: float, lam: float, ends: str, shape: Shape, columns: Sequence[str]) -> Row:
    batch = numbers(shape, seed=2)
    mask, bounds = batch["mask"], batch["cu_seqlens"]
    rewards, values = batch["old_logprob"], batch["weights"]
    rewards, values = (torch.where(mask, v, torch.nan) for v in (rewards, values))
    last = batch["advantages"] if ends != "terminated" else torch.zeros_like(batch["advantages"])
    exact = reference.gae(rewards.double(), values.double(), mask, bounds, last, gamma, lam)
    truth = {
        name: pad(v, shape, 0.0) if shape.padded else v
        for name, v in zip(("advantages", "returns"), exact, strict=True)
    }

    def compute(backend: str) -> Values:
        given = {"rewards": rewards, "values": values, "mask": mask, "cu_seqlens": bounds}
        given = laid_out(given, shape)
        if ends != "terminated":
            given["bootstrap"] = last
        out = pyrl.gae(**given, gamma=gamma, lam=lam, backend=backend)
        return {"advantages": out.advantages, "returns": out.returns}

    row = Row(
        section="gae", case=f"gamma {gamma:g}, lambda {lam:g}, {ends}", option="",
        shape=shape.name, dtype=torch.float32, plain=None,
    )  # fmt: skip
    return judge(row, columns, [Sample(truth, None, compute)])


def _estimate(logprob: Tensor, ref: Tensor, kind: str, clamp: float | None) -> Tensor:
    d = ref - logprob
    kl = {"k1": -d, "k2": d * d / 2, "abs": d.abs()}.get(kind, d.exp() - d - 1)
    return kl if clamp is None else kl.clamp(-clamp, clamp)


def kl_reward(columns: Sequence[str], quick: bool) -> Iterator[Row]:
    """Every estimator, per token and summed into the reward of its sequence."""
    del columns  # plain torch on every device: it has no backends
    for kind in get_args(KL):
        for clamp in (None, 0.05):
            for shape in (RAGGED, MISSING)[: 1 if quick else None]:
                yield _kl_row(kind, clamp, shape)


def _kl_row(kind: KL, clamp: float | None, shape: Shape) -> Row:
    batch = numbers(shape)
    logprob, ref, mask = batch["logprob"], batch["ref_logprob"], batch["mask"]
    rewards, bounds = batch["advantages"], batch["cu_seqlens"]

    def formula(dtype: torch.dtype) -> Values:
        known = mask & ~ref.isnan()
        kl = torch.zeros_like(logprob, dtype=dtype)
        kl[known] = _estimate(logprob[known].to(dtype), ref[known].to(dtype), kind, clamp)
        ends = bounds.tolist()
        sums = [kl[b:e].sum() for b, e in itertools.pairwise(ends)]
        return {"penalty": kl, "rewards": rewards.to(dtype) - 0.3 * torch.stack(sums)}

    def compute(_: str) -> Values:
        return {
            "penalty": pyrl.kl_penalty(logprob, ref, kind=kind, clamp=clamp, mask=mask),
            "rewards": pyrl.rewards_with_kl(
                rewards, logprob, ref, coef=0.3, kind=kind, clamp=clamp, mask=mask,
                cu_seqlens=bounds,
            ),
        }  # fmt: skip

    row = Row(
        section="kl_penalty, rewards_with_kl", case=kind, shape=shape.name, dtype=torch.float32,
        option="" if clamp is None else f"clamp {clamp:g}", plain=None,
    )  # fmt: skip
    sample = Sample(formula(torch.float64), formula(torch.float32), compute)
    return judge(row, ["torch"], [sample])
