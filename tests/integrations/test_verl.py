"""verl's policy losses and pyrl's under the same names, from the same calls.

B = 4 responses of 6, 3, 1 and 0 of L = 6 tokens (full, ragged, single, empty).
"""

import contextlib
import importlib.util
import math
import sys
import types

import pytest
import torch

from pyrl import LossSpec
from pyrl.integrations.verl import LOSSES, policy_loss, register, register_spec, token_weights
from pyrl.parity import relative

LENGTHS, L = (6, 3, 1, 0), 6
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
GLOBAL = {
    "dp_size": 2,
    "batch_num_tokens": 31,
    "global_batch_size": 9,
    "loss_scale_factor": 5,
}
BACKEND = "torch"


@contextlib.contextmanager
def ray_or_a_stand_in():
    """verl's modules name ray's classes when imported; no loss uses them."""
    if importlib.util.find_spec("ray") is not None:
        yield
        return

    class Ray(types.ModuleType):
        __path__: tuple = ()

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    sys.modules["ray"] = Ray("ray")
    try:
        yield
    finally:
        del sys.modules["ray"]


@pytest.fixture(scope="module")
def core():
    """verl.trainer.ppo.core_algos."""
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed")
    with ray_or_a_stand_in():
        from verl.trainer.ppo import core_algos
    return core_algos


class Config(types.SimpleNamespace):
    """The fields of verl's ActorConfig that a policy loss reads."""

    def get(self, name, default=None):
        return getattr(self, name, default)


def config_of(**fields):
    values = {
        "clip_ratio": 0.2,
        "clip_ratio_low": None,
        "clip_ratio_high": 0.28,
        "clip_ratio_c": 3.0,
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "global_batch_info": {},
    }
    return Config(**{**values, **fields})


@pytest.fixture(scope="module")
def actor_config(core):
    """verl's own ActorConfig with these fields."""
    from verl.workers.config import ActorConfig

    def make(global_batch_info=None, **fields):
        values = {"clip_ratio_low": None, "clip_ratio_high": 0.28, **fields}
        config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **values)
        config.global_batch_info.update(global_batch_info or {})
        return config

    return make


def batch(noise=0.4, lengths=LENGTHS, weights=False, per_token=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    b = len(lengths)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    old = -3 * torch.rand(b, L, generator=g)
    a = torch.tensor([1.3, -0.7, 0.4, -1.1])[:b, None] * (1 + per_token * 0.2 * randn(b, L))
    call = {
        "old_log_prob": old,
        "log_prob": (old + noise * randn(b, L)).clamp(max=-1e-3).requires_grad_(),
        "advantages": a,
        "response_mask": torch.arange(L) < torch.tensor(lengths)[:, None],
    }
    if weights:
        call["rollout_is_weights"] = (0.3 * randn(b, L)).exp()
    return call


def run(loss, call, **more):
    call["log_prob"].grad = None
    value, metrics = loss(**call, **more)
    value.backward()
    return value.detach(), call["log_prob"].grad.clone(), metrics


#: id → (verl's name, ActorConfig fields, switches of the batch)
CASES = {
    "vanilla": ("vanilla", {}, {}),
    "vanilla-dual": ("vanilla", {"clip_ratio_c": 1.3}, {"noise": 0.8}),
    "vanilla-far": ("vanilla", {}, {"noise": 15.0}),
    "gspo": ("gspo", {"clip_ratio_low": 0.03, "clip_ratio_high": 0.04}, {}),
    "gspo-far": ("gspo", {}, {"noise": 15.0}),
    "cispo": ("cispo", {}, {}),
    "cispo-wide": ("cispo", {"clip_ratio_low": 10.0}, {"noise": 0.8}),
    "gpg": ("gpg", {}, {}),
    "dppo_tv": ("dppo_tv", {"clip_ratio": 0.05, "clip_ratio_high": 0.07}, {}),
    "dppo_kl": ("dppo_kl", {"clip_ratio": 0.005, "clip_ratio_high": 0.007}, {}),
    "dppo-cap": ("dppo_tv", {"clip_ratio": 0.9, "clip_ratio_c": 1.2}, {"noise": 0.8}),
}
#: Where verl has one aggregation whatever it is asked for.
OWN_AGGREGATION = {
    "sapo": ("sapo", {"tau_pos": 0.6, "tau_neg": 2.0}, {}),
    "sapo-far": ("sapo", {}, {"noise": 15.0}),
    "geo_mean": (
        "geo_mean",
        {"clip_ratio": 0.3, "clip_ratio_high": 0.4},
        {"noise": 0.8, "per_token": False, "lengths": (6, 3, 1)},
    ),
}


def assert_equal_losses(core, name, config, call, **more):
    theirs = run(core.get_policy_loss_fn(name), call, config=config, **more)
    mine = run(policy_loss(LOSSES[name], backend=BACKEND), call, config=config, **more)
    if not name.startswith("dppo"):  # whose value verl multiplies by log_prob
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert relative(mine[1], theirs[1]) < 1e-5
    for key, value in theirs[2].items():
        if (name, key) not in OTHER_METRICS:
            assert mine[2][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


OTHER_METRICS = {
    ("geo_mean", "actor/pg_clipfrac"),
    ("geo_mean", "actor/pg_clipfrac_lower"),
    ("dppo_tv", "actor/pg_clipfrac_lower"),
    ("dppo_kl", "actor/pg_clipfrac_lower"),
}


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_equals_verl(core, actor_config, name, mode, info):
    loss, fields, switches = CASES[name]
    config = actor_config(info, **fields)
    assert_equal_losses(core, loss, config, batch(**switches), loss_agg_mode=mode)


@pytest.mark.parametrize("name", CASES | OWN_AGGREGATION)
def test_equals_verl_with_rollout_weights(core, actor_config, name):
    loss, fields, switches = (CASES | OWN_AGGREGATION)[name]
    call = batch(weights=True, **switches)
    mode = "seq-mean-token-mean"
    assert_equal_losses(core, loss, actor_config(**fields), call, loss_agg_mode=mode)


@pytest.mark.parametrize("name", OWN_AGGREGATION)
def test_equals_verl_under_its_one_aggregation(core, actor_config, name):
    loss, fields, switches = OWN_AGGREGATION[name]
    mode = "seq-mean-token-mean"
    assert_equal_losses(core, loss, actor_config(**fields), batch(**switches), loss_agg_mode=mode)


def test_dppo_value_is_the_ratio_form(core, actor_config):
    """Same gradient; verl reports min(r, c) A log_prob, the objective is min(r, c) A."""
    call, config = batch(), actor_config(clip_ratio_low=0.99, clip_ratio_high=0.99)
    loss, _, _ = run(policy_loss(LOSSES["dppo_tv"], backend=BACKEND), call, config=config)
    mask, delta = call["response_mask"], (call["log_prob"] - call["old_log_prob"]).detach()
    expected = -(delta.exp().clamp(max=3.0) * call["advantages"])[mask].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_sapo_honours_the_aggregation():
    call, config = batch(), config_of()
    sapo = policy_loss(LOSSES["sapo"], backend=BACKEND)
    values = {mode: run(sapo, call, config=config, loss_agg_mode=mode)[0] for mode in MODES}
    assert len({round(float(v), 6) for v in values.values()}) == len(MODES)


def test_registered_losses_are_found_and_run(core, actor_config):
    before = dict(core.POLICY_LOSS_REGISTRY)
    try:
        names = register(backend=BACKEND)
        assert names == ["pyrl_" + name for name in LOSSES]
        register_spec("mine", LossSpec.preset("dapo", clip_high=0.4), backend=BACKEND)
        call, config = batch(), actor_config(clip_ratio_c=1e9, clip_ratio_high=0.4)
        mine = run(core.get_policy_loss_fn("mine"), call, config=config)
        theirs = run(core.get_policy_loss_fn("pyrl_vanilla"), call, config=config)
        torch.testing.assert_close(mine[:2], theirs[:2])
    finally:
        core.POLICY_LOSS_REGISTRY.clear()
        core.POLICY_LOSS_REGISTRY.update(before)


def test_the_plugin_registers_at_import(core):
    before = dict(core.POLICY_LOSS_REGISTRY)
    try:
        sys.modules.pop("pyrl.integrations.verl_plugin", None)
        importlib.import_module("pyrl.integrations.verl_plugin")
        assert {"pyrl_vanilla", "pyrl_gspo"} <= core.POLICY_LOSS_REGISTRY.keys()
    finally:
        core.POLICY_LOSS_REGISTRY.clear()
        core.POLICY_LOSS_REGISTRY.update(before)


def aggregated(loss, mask, mode, dp_size=1, tokens=None, sequences=None, scale=None):
    """float64: verl's definition, written from its documentation."""
    kept = [row[keep] for row, keep in zip(loss.double(), mask, strict=True) if keep.any()]
    tokens = tokens or sum(len(row) for row in kept)
    sequences = sequences or len(kept)
    if mode == "token-mean":
        return dp_size * sum(row.sum() for row in kept) / tokens
    if mode == "token-sum":
        return dp_size * sum(row.sum() for row in kept)
    if mode == "seq-mean-token-mean":
        return dp_size * sum(row.mean() for row in kept) / sequences
    total = dp_size * sum(row.sum() for row in kept) / sequences
    return total / (scale or loss.shape[1]) if mode.endswith("norm") else total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
def test_aggregation(mode, info):
    mask = batch()["response_mask"]
    loss = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    value = (token_weights(mask, mode, **info) * loss)[mask].sum()
    short = dict(zip(("dp_size", "tokens", "sequences", "scale"), info.values(), strict=False))
    assert relative(value, aggregated(loss, mask, mode, **short)) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_all_masked_and_what_padding_holds(name):
    loss, config = policy_loss(LOSSES[name], backend=BACKEND), config_of()
    call = batch(weights=True)
    value, grad, _ = run(loss, call, config=config)
    mask = call["response_mask"]
    for field in ("old_log_prob", "advantages", "rollout_is_weights"):
        call[field] = torch.where(mask, call[field], torch.nan)
    call["log_prob"] = torch.where(mask, call["log_prob"].detach(), torch.nan).requires_grad_()
    dirty = run(loss, call, config=config)
    assert torch.equal(dirty[0], value) and torch.equal(dirty[1], grad)
    call["response_mask"] = torch.zeros_like(mask)
    nothing = run(loss, call, config=config)
    assert nothing[0] == 0 and nothing[1].abs().sum() == 0
    assert all(math.isfinite(v) and v == 0 for v in nothing[2].values())


def test_refusals_are_named():
    with pytest.raises(ValueError, match="kl_coef"):
        policy_loss(LossSpec(kl_coef=0.1))
    vanilla = policy_loss(LOSSES["vanilla"], backend=BACKEND)
    with pytest.raises(ValueError, match="config"):
        vanilla(**batch())
    with pytest.raises(ValueError, match="loss_agg_mode='mean'"):
        vanilla(**batch(), config=config_of(), loss_agg_mode="mean")
    with pytest.raises(ValueError, match="batch_num_tokens"):
        vanilla(**batch(), config=config_of(global_batch_info={"dp_size": 2}))
    with pytest.raises(ValueError, match="dual_clip"):
        vanilla(**batch(), config=config_of(clip_ratio_c=0.5))
