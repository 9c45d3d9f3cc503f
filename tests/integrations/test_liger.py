"""`LigerFusedLinearGRPOLoss` beside Liger's own class, option by option.

B = 4 completions of 6, 3, 1 and 0 of L = 6 tokens (full, ragged, single, empty), V = 37 (no tile's
multiple), D = 8.
"""

import inspect

import pytest
import torch

from pyrl.integrations.liger import LigerFusedLinearGRPOLoss
from pyrl.parity import MARGIN, relative

liger = pytest.importorskip("liger_kernel.chunked_loss")

LENGTHS = (6, 3, 1, 0)
V, D, L = 37, 8, 6
BACKEND = "torch"

NAMES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")


def options_of(name, **more):
    # With use_ref_model Liger wants a reference even where beta is 0.
    base = {"beta": 0.0, "loss_type": name, "max_completion_length": 9}
    base |= {"use_ref_model": more.get("beta", 0.0) != 0}
    return base | ({"epsilon_high": 1.5} if name == "cispo" else {}) | more


#: id → (constructor options, names of the call's optional inputs)
CASES = {}
for name in NAMES:
    if name != "luspo":
        CASES[name] = (options_of(name), ("old",))
        CASES[name + "-kl"] = (options_of(name, beta=0.3), ("old", "ref"))
        CASES[name + "-kl-corrected"] = (
            options_of(name, beta=0.3, use_bias_correction_kl=True),
            ("old", "ref"),
        )
        CASES[name + "-on-policy"] = (options_of(name), ())
        CASES[name + "-ratio-of-sequence"] = (options_of(name), ("old", "ratio_sequence"))
        if name != "vespo":  # whose padding enters Liger's weight: tested apart
            CASES[name + "-ratio"] = (options_of(name, beta=0.3), ("old", "ref", "ratio"))
    if name in (*CLIPPED, "luspo"):
        CASES[name + "-sequence"] = (
            options_of(name, importance_sampling_level="sequence"),
            ("old", "ratio_sequence"),
        )
for name in CLIPPED:
    CASES[name + "-sequence-kl"] = (
        options_of(
            name, importance_sampling_level="sequence", beta=0.3, use_bias_correction_kl=True
        ),
        ("old", "ref", "ratio"),
    )
CASES |= {
    "delta": (options_of("grpo", delta=1.4), ("old",)),
    "wide": (options_of("grpo", epsilon_low=1.7, epsilon_high=0.1), ("old",)),
    "sapo-temperatures": (
        options_of("sapo", sapo_temperature_pos=0.6, sapo_temperature_neg=2.0),
        ("old",),
    ),
    "vespo-gamma": (
        options_of(
            "vespo", vespo_k_pos=1.5, vespo_lambda_pos=2.0, vespo_k_neg=2.5, vespo_lambda_neg=1e-6
        ),
        ("old",),
    ),
    "vespo-on-policy-ratio": (options_of("vespo"), ("ratio_sequence",)),
    "temperature": (options_of("dapo", temperature=0.7, beta=0.3), ("old", "ref", "bias")),
    "items": (options_of("dapo"), ("old", "items")),
    "items-tensor": (options_of("cispo"), ("old", "items_tensor")),
    "few-items": (options_of("vespo"), ("old", "no_items")),
    "reference-head": (options_of("grpo", beta=0.3), ("old", "bias", "ref_head")),
    "no-reference": (options_of("grpo", beta=0.3, use_ref_model=False), ("old", "ref")),
    "chunks": (options_of("bnpo", chunk_size=3, beta=0.3), ("old", "ref")),
    "frozen-head": (options_of("dapo"), ("old", "bias", "frozen")),
}


def batch(wanted, dtype=torch.float32, seed=0, lengths=LENGTHS, noise=0.4):
    """Positional inputs, keyword inputs and the leaves that get gradients."""
    g = torch.Generator().manual_seed(seed)
    b = len(lengths)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    hidden = randn(b, L, D)
    weight, bias = randn(V, D), randn(V)
    target = torch.randint(V, (b, L), generator=g)
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    a = torch.tensor([1.3, -0.7, 0.4, -1.1]).repeat(b)[:b]
    logits = hidden @ weight.T + (bias if "bias" in wanted else 0)
    logp = logits.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    ratio = (0.3 * randn(b, L)).exp()
    ratio[0, 1] = 0.0  # masked by the correction
    inputs = {
        "old": {"old_per_token_logps": logp + noise * randn(b, L)},
        "ref": {"ref_per_token_logps": logp + noise * randn(b, L)},
        "ref_head": {
            "ref_input": hidden + 0.1 * randn(b, L, D),
            "ref_weight": weight + 0.1 * randn(V, D),
            "ref_bias": bias + 0.1 * randn(V),
        },
        "ratio": {"vllm_is_ratio": ratio},
        "ratio_sequence": {"vllm_is_ratio": ratio[:, 2:3]},
        "items": {"num_items_in_batch": 23},
        "items_tensor": {"num_items_in_batch": torch.tensor(23)},
        "no_items": {"num_items_in_batch": 0},
        "bias": {},
        "frozen": {},
    }
    call = {k: v for name in wanted for k, v in inputs[name].items()}
    call = {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.dim() > 1 and "logps" not in k else v
        for k, v in call.items()
    }
    hidden = hidden.to(dtype).requires_grad_()
    weight = weight.to(dtype).requires_grad_("frozen" not in wanted)
    leaves = {"hidden": hidden, "weight": weight}
    if "bias" in wanted:
        leaves["bias"] = call["bias"] = bias.to(dtype).requires_grad_("frozen" not in wanted)
    return (hidden, weight, target, mask.long(), a), call, leaves


def run(module, args, call, leaves, scale=1.7):
    """loss, metrics and gradients; `scale` is a loss factor such as 1 / accumulation steps."""
    for leaf in leaves.values():
        leaf.grad = None
    loss, metrics = module(*args, **call)
    (loss * scale).backward()
    return loss.detach(), metrics, {k: v.grad for k, v in leaves.items() if v.requires_grad}


def ours(**options):
    module = LigerFusedLinearGRPOLoss(**options)
    module.backend = BACKEND
    return module


@pytest.mark.parametrize("name", CASES)
def test_equals_liger(name):
    options, wanted = CASES[name]
    args, call, leaves = batch(wanted)
    theirs = liger.LigerFusedLinearGRPOLoss(compiled=False, **options)
    loss, metrics, grads = run(theirs, args, call, leaves)
    loss_ours, metrics_ours, grads_ours = run(ours(**options), args, call, leaves)
    torch.testing.assert_close(loss_ours, loss, rtol=1e-5, atol=1e-6)
    assert len(metrics_ours) == len(metrics)
    for mine, other in zip(metrics_ours, metrics, strict=True):
        torch.testing.assert_close(mine.float(), other.float(), rtol=1e-5, atol=1e-6)
    assert grads_ours.keys() == grads.keys()
    for leaf in grads:
        assert relative(grads_ours[leaf], grads[leaf]) < 1e-5, leaf


def test_signatures_are_ligers():
    for method in ("__init__", "forward"):
        mine = inspect.signature(getattr(LigerFusedLinearGRPOLoss, method)).parameters
        other = inspect.signature(getattr(liger.LigerFusedLinearGRPOLoss, method)).parameters
        assert list(mine) == list(other)
        assert [p.default for p in mine.values()] == [p.default for p in other.values()]


def oracle(args, call, loss_of):
    """float64 loss and gradients of loss_of(logp [B, L], keep [B, L], old [B, L], a [B, 1])."""
    hidden, weight, target, mask, a = args
    x, w = (v.detach().double().requires_grad_() for v in (hidden, weight))
    logp = (x @ w.T).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    old = call["old_per_token_logps"].double()
    loss = loss_of(logp, mask.bool(), old, a.double()[:, None])
    loss.backward()
    return {"loss": loss.detach(), "hidden": x.grad, "weight": w.grad}


def luspo(logp, keep, old, a):
    ratio = (logp - old).exp()
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    return torch.where(keep, loss, 0.0).sum() / len(logp)


def vespo_with(w):
    def vespo(logp, keep, old, a):
        delta = (logp - old).detach().clamp(-20, 20)
        log_w = w.double().log().clamp(torch.tensor(1e-8).log().item(), 20)
        total = torch.where(keep, delta + log_w, 0.0).sum(1, keepdim=True)
        total = total.clamp(torch.tensor(1e-8).double().log().item(), 20)
        k, rate = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
        phi = (rate + k * total - rate * total.exp()).exp()
        return torch.where(keep, -phi * a * logp, 0.0).sum() / keep.sum()

    return vespo


@pytest.mark.parametrize("name", ["luspo", "vespo"])
def test_padding_stays_out_where_it_enters_ligers_loss(name):
    wanted = ("old",) if name == "luspo" else ("old", "ratio")
    args, call, leaves = batch(wanted)
    truth = oracle(args, call, luspo if name == "luspo" else vespo_with(call["vllm_is_ratio"]))
    loss, _, grads = run(ours(**options_of(name)), args, call, leaves, scale=1.0)
    assert relative(loss, truth["loss"]) < 1e-5
    for leaf in grads:
        assert relative(grads[leaf], truth[leaf]) < 1e-5, leaf
    other = liger.LigerFusedLinearGRPOLoss(compiled=False, **options_of(name))
    loss, _, _ = run(other, args, call, leaves, scale=1.0)
    assert relative(loss, truth["loss"]) > 1e-2  # else this test has nothing to show


def test_luspo_is_ligers_without_padding():
    args, call, leaves = batch(("old",), lengths=(L, L))
    options = options_of("luspo")
    theirs = run(liger.LigerFusedLinearGRPOLoss(compiled=False, **options), args, call, leaves)
    mine = run(ours(**options), args, call, leaves)
    assert relative(mine[0], theirs[0]) < 1e-5
    assert relative(mine[2]["weight"], theirs[2]["weight"]) < 1e-5


def test_bf16_follows_the_parity_rule():
    # 64 completions: Liger adds 64 bf16 parts of dweight in bf16.
    args, call, leaves = batch(("old",), torch.bfloat16, lengths=LENGTHS * 16)

    def dapo(logp, keep, old, a):
        return luspo(logp, keep, old, a) * len(logp) / keep.sum()

    truth = oracle(args, call, dapo)
    hidden, weight, target, mask, a = args
    logits = (hidden @ weight.T).float()
    logp = logits.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    loss = dapo(logp, mask.bool(), call["old_per_token_logps"], a[:, None])
    plain = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    _, _, grads = run(ours(**options_of("dapo")), args, call, leaves, scale=1.0)
    other = liger.LigerFusedLinearGRPOLoss(compiled=False, **options_of("dapo"))
    _, _, theirs = run(other, args, call, leaves, scale=1.0)
    for leaf in grads:
        baseline = relative(plain[leaf], truth[leaf])
        assert relative(grads[leaf], truth[leaf]) <= baseline + MARGIN[torch.bfloat16], leaf
    assert relative(grads["weight"], truth["weight"]) < relative(theirs["weight"], truth["weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type='ppo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word'"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "cispo"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "sapo"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "vespo"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0.0}, "sapo_temperature_pos=0.0"),
        ({"loss_type": "sapo", "sapo_temperature_neg": -1.0}, "sapo_temperature_neg=-1.0"),
        ({"epsilon_high": -0.1}, "epsilon_high=-0.1"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_refused_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)


def test_refused_inputs_are_named():
    args, call, _ = batch(("old", "ratio"))
    with pytest.raises(ValueError, match="needs ref_per_token_logps"):
        ours()(*args)
    with pytest.raises(ValueError, match="vllm_is_ratio"):
        ours(beta=0.0)(*args, vllm_is_ratio=call["vllm_is_ratio"][0])
    with pytest.raises(ValueError, match="advantages"):
        ours(beta=0.0)(*args[:4], args[4][:, None])


def test_all_masked_gives_zero():
    args, call, leaves = batch(("old",), lengths=(0, 0))
    loss, metrics, grads = run(ours(beta=0.0), args, call, leaves)
    assert loss == 0 and all(m == 0 for m in metrics)
    assert all(g.abs().sum() == 0 for g in grads.values())
