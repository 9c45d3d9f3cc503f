"""GRPOTrainer's loss, gradients and log entries with and without `patch_grpo`, option by option.

A random two-layer model, B = 4 completions of 7, 4, 1 and 0 tokens; 1e-5 is fp32's rounding through
the two layers.
"""

import copy
import math
import types

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOTrainer

from pyrl.integrations import trl as integration
from pyrl.integrations.trl import check, patch_grpo
from pyrl.parity import relative

TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

#: id → (GRPOConfig fields, switches of the batch, attributes of the built trainer)
CASES = {}
for kind in TYPES:
    base = {"loss_type": kind, "epsilon": 0.2, "epsilon_high": 1.2 if kind == "cispo" else 0.28}
    kl = base | {"beta": 0.3, "use_bias_correction_kl": False}
    entropy = base | {"entropy_coef": 0.05}
    CASES |= {
        kind: (base, {}, {}),
        f"{kind}-on-policy": (base, {"old": False}, {}),
        f"{kind}-kl": (kl, {}, {}),
        f"{kind}-kl-corrected": (kl | {"use_bias_correction_kl": True}, {}, {}),
        f"{kind}-tools": (kl, {"tools": True}, {}),
        f"{kind}-per-token-advantages": (base, {"per_token": True}, {}),
        f"{kind}-off-policy": (kl | {"off_policy_mask_threshold": 0.01}, {}, {}),
        f"{kind}-top-entropy": (kl | {"top_entropy_quantile": 0.4}, {"tools": True}, {}),
        f"{kind}-entropy": (entropy, {}, {}),
        f"{kind}-eval": (kl, {}, {"mode": "eval"}),
        f"{kind}-eval-entropy": (entropy, {}, {"mode": "eval"}),
    }
    if kind != "vespo":
        sequence = {"importance_sampling_level": "sequence"}
        CASES[f"{kind}-sequence"] = (base | sequence, {}, {})
        CASES[f"{kind}-sequence-kl-corrected"] = (
            kl | sequence | {"use_bias_correction_kl": True},
            {"tools": True},
            {},
        )
    for mode in MODES:
        CASES[f"{kind}-{mode}"] = (
            kl | {"vllm_importance_sampling_mode": mode},
            {"correction": mode, "tools": mode.endswith("mask")},
            {"use_vllm": True, "clip": (0.6, 1.6)},
        )
    CASES[f"{kind}-vllm-off-policy"] = (
        base | {"off_policy_mask_threshold": 0.01},
        {"correction": "sequence_mask"},
        {"use_vllm": True, "clip": (None, 1.5)},
    )
CASES |= {
    "vespo-sequence": (
        {
            "loss_type": "vespo",
            "importance_sampling_level": "sequence",
            "beta": 0.3,
            "use_bias_correction_kl": False,
        },
        {},
        {},
    ),
    "vespo-gamma": (
        {
            "loss_type": "vespo",
            "vespo_k_pos": 1.5,
            "vespo_lambda_pos": 2.0,
            "vespo_k_neg": 2.5,
            "vespo_lambda_neg": 1e-6,
        },
        {},
        {},
    ),
    "sapo-temperatures": (
        {"loss_type": "sapo", "sapo_temperature_pos": 0.6, "sapo_temperature_neg": 2.0},
        {},
        {},
    ),
    "delta": ({"loss_type": "grpo", "delta": 1.4}, {"noise": 0.6}, {}),
    "delta-sequence": (
        {"loss_type": "grpo", "delta": 1.1, "importance_sampling_level": "sequence"},
        {"noise": 0.6},
        {},
    ),
    "wide": ({"loss_type": "dapo", "epsilon": 1.5, "epsilon_high": 0.1}, {"noise": 0.6}, {}),
    "temperature": ({"loss_type": "dapo", "temperature": 0.7, "beta": 0.3}, {}, {}),
    "steps-per-generation": ({"loss_type": "dapo", "steps_per_generation": 6}, {}, {}),
    "correction-off": (
        {"loss_type": "grpo", "vllm_importance_sampling_correction": False},
        {"correction": "token_mask"},
        {"use_vllm": True, "clip": (None, 1.5)},
    ),
    "adaptive-first-step": (
        {"loss_type": "grpo", "use_adaptive_entropy": True, "entropy_coef": 0.05},
        {},
        {},
    ),
    "adaptive-low-entropy": (
        {"loss_type": "dapo", "use_adaptive_entropy": True, "entropy_coef": 0.05},
        {},
        {"_last_world_entropy": 0.0},
    ),
    "entropy-of-the-top": (
        {"loss_type": "dapo", "entropy_coef": 0.05, "top_entropy_quantile": 0.4},
        {"tools": True},
        {},
    ),
    "cast-head": ({"loss_type": "dapo", "cast_lm_head_to_fp32": True}, {}, {}),
}

#: Heads that do more than multiply: a bias, softcap, scales; and a mixture of experts.
HEADS = {
    "untied": ("llama", {"tie_word_embeddings": False}),
    "bias": ("phi", {"tie_word_embeddings": False}),
    "softcap": ("gemma2", {}),
    "logit-scale": ("cohere", {"logit_scale": 0.25}),
    "logits-scaling": ("granite", {"logits_scaling": 4.0}),
    "experts": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


def prepared(trainer, attributes):
    attributes = dict(attributes)
    if "clip" in attributes:
        low, high = attributes.pop("clip")
        trainer.vllm_importance_sampling_clip_min = low
        trainer.vllm_importance_sampling_clip_max = high
    trainer.model.train(attributes.pop("mode", "train") == "train")
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def step(trainer, inputs):
    """loss, gradients by parameter, and what was logged."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._metrics["eval"].clear()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    logged = {mode: dict(values) for mode, values in trainer._metrics.items()}
    return loss.detach(), grads, logged


def assert_equal_steps(mine, theirs, tolerance=1e-5):
    torch.testing.assert_close(mine[0], theirs[0], rtol=tolerance, atol=1e-6)
    assert mine[1].keys() == theirs[1].keys()
    scale = max(g.norm().item() for g in theirs[1].values())
    for name, grad in theirs[1].items():
        # A parameter whose gradient is itself rounding is held to the scale of the others.
        error = (mine[1][name] - grad).norm().item()
        assert error <= tolerance * max(grad.norm().item(), 1e-2 * scale), name
    for mode, entries in theirs[2].items():
        assert mine[2][mode].keys() == entries.keys()
        for name, values in entries.items():
            assert mine[2][mode][name] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True), (
                name
            )


@pytest.mark.parametrize("name", CASES)
def test_equals_trl(build, batch, folder, name):
    options, switches, attributes = CASES[name]
    plain = prepared(build(folder(), False, **options), attributes)
    patched = prepared(build(folder(), True, **options), attributes)
    check(patched)
    inputs = batch(plain, **switches)
    theirs, mine = step(plain, inputs), step(patched, inputs)
    assert_equal_steps(mine, theirs)
    assert any(g.abs().max() > 1e-4 for g in theirs[1].values())
    assert patched.entropy_coef == plain.entropy_coef
    assert patched._last_world_entropy == pytest.approx(plain._last_world_entropy, rel=1e-5)


@pytest.mark.parametrize("kind", ["dapo", "vespo"])
@pytest.mark.parametrize("head", HEADS)
def test_equals_trl_on_other_heads(build, batch, folder, head, kind):
    architecture, config = HEADS[head]
    path = folder(architecture, **config)
    options = {"loss_type": kind, "beta": 0.1, "temperature": 0.8}
    if head == "experts":
        options["router_aux_loss_coef"] = 0.1
    plain, patched = (build(path, is_patched, **options) for is_patched in (False, True))
    inputs = batch(plain)
    theirs, mine = step(plain, inputs), step(patched, inputs)
    assert_equal_steps(mine, theirs)
    assert ("aux_loss" in theirs[2]["train"]) == (head == "experts")
    if head == "bias":
        assert "lm_head.bias" in mine[1]


@pytest.mark.parametrize("kind", ["grpo", "luspo"])
def test_all_masked_batch_gives_zero(build, batch, folder, kind):
    patched = build(folder(), True, loss_type=kind)
    loss, grads, _ = step(patched, batch(patched, lengths=(0, 0)))
    assert loss == 0
    assert all(g.abs().sum() == 0 for g in grads.values())


def test_options_changed_after_building_count(build, batch, folder):
    plain, patched = (build(folder(), p, loss_type="grpo") for p in (False, True))
    for trainer in (plain, patched):
        trainer.epsilon_low, trainer.beta, trainer.temperature = 0.01, 0.2, 1.0
    inputs = batch(plain)
    assert_equal_steps(step(patched, inputs), step(plain, inputs))


def test_one_pass_where_tokens_stand_alone(build, batch, folder, monkeypatch):
    calls = []
    original = integration.linear_policy_loss
    monkeypatch.setattr(
        integration, "linear_policy_loss", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    for kind in TYPES:
        patched = build(folder(), True, loss_type=kind)
        calls.clear()
        step(patched, batch(patched))
        assert len(calls) == (0 if kind == "vespo" else 1), kind


def test_old_log_probs_are_the_policys_own(build, batch, folder):
    """One head scores old and new: on-policy the ratio is 1 to the last bit, in bf16 too."""
    patched = build(folder(), True, loss_type="grpo")
    patched.model.to(torch.bfloat16)
    inputs = batch(patched, noise=0.0)
    logps = []
    original = GRPOTrainer._compute_loss

    def spy(self, model, inputs):
        logps.append(self._get_per_token_logps_and_entropies()[0])
        return original(self, model, inputs)

    GRPOTrainer._compute_loss = spy
    try:
        step(patched, inputs)
    finally:
        GRPOTrainer._compute_loss = original
    assert torch.equal(logps[0], inputs["old_per_token_logps"].where(logps[0] != 0, logps[0]))


def test_autocast_is_no_worse_than_trls(build, batch, folder):
    """bf16 autocast over fp32 parameters, both against fp32."""
    plain, patched = (build(folder(), p, loss_type="dapo", beta=0.1) for p in (False, True))
    inputs = batch(plain)
    truth = step(plain, inputs)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, mine = step(plain, inputs)[1], step(patched, inputs)[1]

    def error(grads):
        squares = [(grads[n] - g).double().square().sum() for n, g in truth.items()]
        return (sum(squares) / sum(g.double().square().sum() for g in truth.values())).sqrt()

    assert mine.keys() == truth.keys()
    assert error(mine) <= error(theirs) + 1e-3
    assert all(g.dtype == torch.float32 for g in mine.values())


def test_the_rest_of_the_model_is_untouched(build, folder):
    plain, patched = (build(folder(), p) for p in (False, True))
    ids = torch.arange(3, 13)[None]
    logits = [t.model(input_ids=ids).logits for t in (plain, patched)]
    assert torch.equal(*logits)
    generated = [
        t.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for t in (plain, patched)
    ]
    assert torch.equal(*generated)


def test_training_steps_agree(build, folder):
    """Three optimizer steps of real generation: the same completions, losses and parameters."""
    logs, states = [], []
    for is_patched in (False, True):
        trainer = build(
            folder(),
            is_patched,
            max_steps=3,
            logging_steps=1,
            learning_rate=0.05,
            optim="sgd",  # Adam divides small gradients by themselves: their rounding with them
            save_strategy="no",
            num_iterations=2,
            beta=0.1,
            seed=7,
        )
        trainer.train()
        logs.append([e for e in trainer.state.log_history if "loss" in e])
        states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    assert len(logs[0]) == 3
    for theirs, mine in zip(*logs, strict=True):
        assert mine.get("completions/mean_length") == theirs.get("completions/mean_length")
        for name in ("loss", "grad_norm", "kl", "entropy", "clip_ratio/region_mean"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-4, abs=1e-6), name
    for name, value in states[0].items():
        assert relative(states[1][name], value) < 1e-5, name


class Overriding(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {
                "loss_type": "vespo",
                "importance_sampling_level": "sequence",
                "beta": 0.1,
                "use_bias_correction_kl": True,
            },
            NotImplementedError,
            "use_bias_correction_kl",
        ),
        (
            {"cls": Overriding},
            NotImplementedError,
            "Overriding overrides GRPOTrainer",
        ),
        ({"torch_compile": True}, NotImplementedError, "torch_compile"),
        ({"loss_type": "ppo"}, ValueError, "loss_type='ppo'"),
        ({"importance_sampling_level": "word"}, ValueError, "importance_sampling_level='word'"),
        ({"beta": -0.1}, ValueError, r"beta=-0\.1"),
        ({"epsilon_high": -0.1}, ValueError, r"epsilon_high=-0\.1"),
        ({"delta": -1.0}, ValueError, r"delta=-1\.0"),
    ],
)
def test_refused_options_are_named_at_construction(build, folder, options, error, message):
    with pytest.raises(error, match=message):
        build(folder(), True, **options)


def test_options_this_machine_cannot_build_are_named(build, folder):
    trainer = build(folder(), True, loss_type="vespo")
    trainer.use_vllm, trainer.vllm_importance_sampling_clip_max = True, 0.5
    with pytest.raises(NotImplementedError, match="vllm_importance_sampling_clip"):
        check(trainer)
    trainer.use_vllm = False
    check(trainer)
    args = trainer.args
    trainer.args = copy.copy(args)
    trainer.args.fp16 = True
    with pytest.raises(NotImplementedError, match="fp16"):
        check(trainer)
    trainer.args = types.SimpleNamespace(**vars(args))
    trainer.args.deepspeed_plugin = types.SimpleNamespace(zero_stage=3)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        check(trainer)
    trainer.args, trainer.is_deepspeed_enabled = args, False
    plugin = types.SimpleNamespace(fsdp_version=1)
    state = types.SimpleNamespace(fsdp_plugin=plugin)
    trainer.accelerator, trainer.is_fsdp_enabled = types.SimpleNamespace(state=state), True
    with pytest.raises(NotImplementedError, match="fsdp"):
        check(trainer)


def test_patch_and_undo(monkeypatch):
    init = GRPOTrainer.__init__
    undo = patch_grpo()
    assert GRPOTrainer.__init__ is not init
    patch_grpo(backend="torch")  # the second replaces the first
    undo()
    assert GRPOTrainer.__init__ is init
    with pytest.raises(ValueError, match="backend='liger'"):
        patch_grpo(backend="liger")
    monkeypatch.setattr(integration.trl, "__version__", "1.17.0")
    with pytest.raises(NotImplementedError, match=r"TRL 1\.16, found 1\.17\.0"):
        patch_grpo()
    assert GRPOTrainer.__init__ is init


def test_token_weights_below_one_token_a_step(build, batch, folder):
    """dapo's normaliser may fall below 1: two tokens over six steps of generation."""
    plain, patched = (
        build(folder(), p, loss_type="dapo", steps_per_generation=6) for p in (False, True)
    )
    inputs = batch(plain) | {"num_items_in_batch": torch.tensor(2)}
    theirs, mine = step(plain, inputs), step(patched, inputs)
    assert_equal_steps(mine, theirs)
    assert math.isfinite(float(mine[0]))
