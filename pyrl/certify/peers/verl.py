"""verl: its registered policy losses, critic loss, KL estimates and advantage estimators."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pyrl
from pyrl import LossSpec
from pyrl.certify.peers.base import Batch, Case, L, Result, batch, objective, options, result
from pyrl.certify.rule import leaves_of

#: verl's loss_mode → (its ActorConfig's fields, our preset and what is changed in it).
LOSSES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "vanilla": ("vanilla", {"clip_ratio_high": 0.28}, "ppo", {"clip_high": 0.28, "dual_clip": 3.0}),
    "vanilla, dual clip binding": (
        "vanilla", {"clip_ratio_c": 1.2}, "ppo", {"dual_clip": 1.2}),
    "gspo": (
        "gspo", {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04}, "gspo_token",
        {"clip_low": 0.03, "clip_high": 0.04, "aggregation": "token_mean"}),
    "cispo": ("cispo", {}, "cispo", {"cispo_low": 0.8, "cispo_high": 1.2}),
    "gpg": ("gpg", {}, "reinforce", {}),
    "sapo": ("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}, "sapo", {}),
    "geo_mean": (
        "geo_mean", {"clip_ratio": 0.3, "clip_ratio_high": 0.4}, "gmpo", {"clip_low": 0.3}),
}  # fmt: skip
#: verl's loss_agg_mode → ours; "constant" divides by L.
MODES: dict[str, dict[str, Any]] = {
    "token-mean": {"aggregation": "token_mean"},
    "seq-mean-token-mean": {"aggregation": "sequence_mean"},
    "seq-mean-token-sum": {"aggregation": "sequence_sum"},
    "seq-mean-token-sum-norm": {"aggregation": "constant", "max_length": L},
}


def cases() -> Iterator[Case]:
    """Everything that both define."""
    with _ray_or_a_stand_in():
        core = importlib.import_module("verl.trainer.ppo.core_algos")
        config = importlib.import_module("verl.workers.config").ActorConfig
    given = batch()
    run = functools.partial(_run, core, config)
    for name, (mode, fields, preset, changes) in LOSSES.items():
        spec = LossSpec.preset(preset, **changes)
        yield Case(
            name=name, theirs=options({"loss_mode": mode, **fields}),
            ours=", ".join(filter(None, [preset, options(changes)])),
            run=functools.partial(run, given, mode, fields),
            oracle=functools.partial(objective, given, spec, "logprob"),
        )  # fmt: skip
    for mode, changes in MODES.items():
        yield Case(
            name=mode, theirs=f"loss_mode=vanilla, loss_agg_mode={mode}",
            ours=options({"objective": "clip", "dual_clip": 3.0, **changes}),
            run=functools.partial(run, given, "vanilla", {}, mode),
            oracle=functools.partial(
                objective, given, LossSpec(dual_clip=3.0, **changes), "logprob"
            ),
        )  # fmt: skip
    yield from _differences(run, given)
    yield from _critic(core, given)
    yield from _estimates(core, given)
    yield from _advantages(core, given)


def _differences(run: Any, given: Batch) -> Iterator[Case]:
    ppo = LossSpec.preset("ppo", dual_clip=3.0)
    empty = given | {"mask": torch.zeros_like(given["mask"])}
    yield Case(
        name="all masked", theirs="loss_mode=vanilla", ours="ppo, dual_clip=3.0",
        run=lambda: run(empty, "vanilla", {}), oracle=lambda: objective(empty, ppo, "logprob"),
        differs="NaN: theirs is 0 / 0 tokens; ours is 0 with a zero gradient",
    )  # fmt: skip
    dirty = batch(behind=torch.nan)
    yield Case(
        name="NaN behind the mask, token-mean", theirs="loss_mode=vanilla",
        ours="ppo, dual_clip=3.0",
        run=lambda: run(dirty, "vanilla", {}), oracle=lambda: objective(dirty, ppo, "logprob"),
    )  # fmt: skip
    mean = LossSpec.preset("ppo", dual_clip=3.0, aggregation="sequence_mean")
    yield Case(
        name="NaN behind the mask, seq-mean-token-mean",
        theirs="loss_mode=vanilla, loss_agg_mode=seq-mean-token-mean",
        ours="ppo, dual_clip=3.0, aggregation=sequence_mean",
        run=lambda: run(dirty, "vanilla", {}, "seq-mean-token-mean"),
        oracle=lambda: objective(dirty, mean, "logprob"),
        differs="NaN: here their mask multiplies (0 · NaN), under token-mean it selects; ours "
        "always selects",
    )  # fmt: skip
    short = given | {"mask": given["mask"].clone()}
    short["mask"][1] = False
    yield Case(
        name="seq-mean-token-mean, one of 4 sequences masked",
        theirs="loss_agg_mode=seq-mean-token-mean", ours="sequence_mean",
        run=lambda: run(short, "vanilla", {}, "seq-mean-token-mean"),
        oracle=lambda: objective(short, mean, "logprob"),
        formula=lambda: objective(short, mean, "logprob", denominator=3.0),
        differs="theirs divides by the 3 sequences that have a kept token; ours, as TRL, by the "
        "batch's 4, known before any mask is, and by denominator=3 if that is what is wanted",
    )  # fmt: skip
    for name, objective_name in (("sapo", "sapo"), ("geo_mean", "gmpo")):
        fields = {"clip_ratio": 0.4} if name == "geo_mean" else {}
        asked = LossSpec.preset(objective_name, aggregation="token_mean")
        named = LossSpec.preset(objective_name)
        yield Case(
            name=f"{name}, token-mean", theirs=f"loss_mode={name}, loss_agg_mode=token-mean",
            ours=f"{objective_name}, aggregation=token_mean",
            run=functools.partial(run, given, name, fields),
            oracle=functools.partial(objective, given, asked, "logprob"),
            formula=functools.partial(objective, given, named, "logprob"),
            differs="theirs ignores loss_agg_mode and takes the mean over sequences; ours "
            "aggregates as asked",
        )  # fmt: skip
    for name, divergence, bound in (("dppo_tv", "tv", 0.05), ("dppo_kl", "kl", 0.005)):
        fixed = {"dppo_divergence": divergence, "dppo_low": bound, "dppo_high": bound}
        spec = LossSpec.preset("dppo", **fixed)
        yield Case(
            name=name, theirs=f"loss_mode={name}, clip_ratio={bound}, clip_ratio_c=1e9",
            ours=f"dppo, dppo_divergence={divergence}, bounds {bound}",
            run=functools.partial(run, given, name, {"clip_ratio": bound, "clip_ratio_c": 1e9}),
            oracle=functools.partial(objective, given, spec, "logprob"),
            formula=functools.partial(_times_logprob, given, spec),
            differs="gradient agrees; their value is -sg[r] A log π, ours -r A, whose value is the "
            "objective's",
        )  # fmt: skip


def _times_logprob(given: Batch, spec: LossSpec) -> Result:
    """Our gradient g_t = -w r_t A of a kept token: theirs is the loss sum of g_t log π_t."""
    _, gradient = objective(given, spec, "logprob")
    return [(gradient.double() * given["logprob"].double()).sum(), gradient]


def _run(
    core: Any, config: Any, given: Batch, mode: str, fields: dict[str, Any],
    aggregation: str | None = None,
) -> Result:  # fmt: skip
    leaves = leaves_of({"logprob": given["logprob"]})
    mask = given["mask"]
    loss, _ = core.get_policy_loss_fn(mode)(
        old_log_prob=given["old_logprob"], log_prob=leaves["logprob"],
        advantages=given["advantages"][:, None].expand(mask.shape), response_mask=mask.float(),
        loss_agg_mode=aggregation or "token-mean",
        config=config(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
                      **{"clip_ratio_low": None, "clip_ratio_high": None, **fields}),
    )  # fmt: skip
    loss.backward()
    return result(loss, leaves)


def _critic(core: Any, given: Batch) -> Iterator[Case]:
    returns, old = given["rollout_logprob"], given["old_logprob"]

    def theirs(mode: str) -> Result:
        leaves = leaves_of({"values": given["logprob"]})
        loss, _ = core.compute_value_loss(
            leaves["values"], returns, old, given["mask"].float(), 0.2, loss_agg_mode=mode
        )
        loss.backward()
        return result(loss, leaves)

    def ours(changes: dict[str, Any]) -> Result:
        leaves = leaves_of({"values": given["logprob"]})
        out = pyrl.value_loss(
            leaves["values"], returns, old_values=old, clip=0.2, mask=given["mask"],
            backend="reference", **changes,
        )  # fmt: skip
        out.loss.backward()
        return result(out.loss, leaves)

    for mode, changes in MODES.items():
        yield Case(
            name=f"value loss, {mode}", theirs=f"cliprange_value=0.2, loss_agg_mode={mode}",
            ours=options({"value_loss: clip": 0.2, **changes}),
            run=functools.partial(theirs, mode), oracle=functools.partial(ours, changes),
        )  # fmt: skip


def _estimates(core: Any, given: Batch) -> Iterator[Case]:
    mask = given["mask"]

    def theirs(kind: str, ref: Tensor) -> Result:
        return [torch.where(mask, core.kl_penalty(given["logprob"], ref, kind), 0.0)]

    def ours(kind: str, ref: Tensor, clamp: float | None = None) -> Result:
        return [pyrl.kl_penalty(given["logprob"], ref, kind=kind, clamp=clamp, mask=mask)]  # type: ignore[arg-type]

    for kind, name in (("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl"), ("abs", "abs")):
        yield Case(
            name=f"KL estimate {kind}", theirs=f"kl_penalty={name}", ours=f"kl_penalty: {kind}",
            run=functools.partial(theirs, name, given["ref_logprob"]),
            oracle=functools.partial(ours, kind, given["ref_logprob"]),
        )  # fmt: skip
    far = given["logprob"] + 4.0
    yield Case(
        name="KL estimate k3, ref 4 nats above", theirs="kl_penalty=low_var_kl",
        ours="kl_penalty: k3",
        run=lambda: theirs("low_var_kl", far), oracle=lambda: ours("k3", far),
        formula=lambda: ours("k3", far, 10.0),
        differs="theirs clamps the estimate to 10, beyond which its gradient is 0; ours clamps "
        "where kl_clamp asks for it",
    )  # fmt: skip


def _advantages(core: Any, given: Batch) -> Iterator[Case]:
    import numpy

    mask = given["mask"].float()
    g = torch.Generator().manual_seed(0)
    rewards, ids = torch.randn(8, generator=g), torch.tensor([3, 3, 1, 3, 1, 2, 3, 1])
    ones = torch.ones(8, 1)

    def theirs(name: str, **more: Any) -> Result:
        found, _ = core.get_adv_estimator_fn(name)(
            rewards[:, None].clone(), ones, index=numpy.array(ids.tolist()), **more
        )
        return [found[:, 0]]

    def ours(method: str) -> Result:
        return [pyrl.group_advantage(rewards, ids, method=method, backend="reference").advantages]

    for name, method, more in (
        ("grpo", "grpo", {}),
        ("grpo", "mean", {"norm_adv_by_std_in_grpo": False}),
        ("rloo", "rloo", {}),
        ("reinforce_plus_plus_baseline", "whiten_baseline", {}),
    ):
        solo = method == "rloo"
        yield Case(
            name=f"advantage {method}", theirs=options({"adv_estimator": name, **more}),
            ours=f"group_advantage: {method}", run=functools.partial(theirs, name, **more),
            oracle=functools.partial(ours, method),
            formula=functools.partial(_solo_rloo, rewards, ids) if solo else None,
            differs="a group of one: theirs keeps its reward as the advantage; ours is 0, for "
            "there is no baseline to take off it" if solo else "",
        )  # fmt: skip

    def gae(whitened: bool) -> Result:
        rewards, values = given["old_logprob"], given["logprob"]
        out = pyrl.gae(rewards, values, gamma=0.99, lam=0.95, mask=given["mask"],
                       backend="reference")  # fmt: skip
        a = out.advantages
        if whitened:
            kept = a[given["mask"]].double()
            a = torch.where(given["mask"], (a - kept.mean()) / (kept.var() + 1e-8).sqrt(), 0.0)
        return [a, out.returns]

    def their_gae() -> Result:
        with torch.no_grad():
            a, returns = core.compute_gae_advantage_return(
                given["old_logprob"], given["logprob"], mask, 0.99, 0.95
            )
        return [torch.where(given["mask"], v, 0.0) for v in (a, returns)]

    yield Case(
        name="gae", theirs="adv_estimator=gae, gamma=0.99, lam=0.95", ours="gae(0.99, 0.95)",
        run=their_gae, oracle=lambda: gae(False), formula=lambda: gae(True),
        differs="returns agree; theirs then whitens the advantages over the batch at hand, ours "
        "are what the paper defines",
    )  # fmt: skip


def _solo_rloo(rewards: Tensor, ids: Tensor) -> Result:
    out = pyrl.group_advantage(rewards, ids, method="rloo", backend="reference").advantages
    alone = (ids[:, None] == ids).sum(1) == 1
    return [torch.where(alone, rewards, out)]


@contextlib.contextmanager
def _ray_or_a_stand_in() -> Iterator[None]:
    """verl's modules name ray's classes when imported; nothing that is called here uses them."""
    if importlib.util.find_spec("ray") is not None:
        yield
        return

    class Ray(types.ModuleType):
        __path__ = []  # noqa: RUF012

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    sys.modules["ray"] = Ray("ray")
    try:
        yield
    finally:
        del sys.modules["ray"]
