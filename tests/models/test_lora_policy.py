"""Adapters over a frozen model: gradients, merging, saving, switching off, int8, refusals."""

import copy
import importlib.util
import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pyrl import LossSpec, linear_policy_loss
from pyrl.models import Adapters, load_policy
from pyrl.models.int8 import Int8Linear, _FrozenLinear
from pyrl.models.lora import adapted_layers
from pyrl.testing import tiny_model_folder
from pyrl.trainer.config import OptimizerConfig
from pyrl.trainer.optimizer import MasterAdamW

pytest.importorskip("peft", reason="peft is an extra")
AO = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is an extra")
BASES = ["none", pytest.param("int8", marks=AO)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name="llama", **config):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            made[name] = tiny_model_folder(path, architecture=name, **config)
        return made[name]

    return folder


def load(folder, quantize="none", stir=True, **options):
    """A policy with adapters; `stir`: as if trained, since B starts at zero."""
    lora = {k: options.pop(k) for k in ("rank", "alpha", "targets") if k in options}
    policy = load_policy(folder, adapters=Adapters(quantize=quantize, **lora), **options)
    if stir:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in policy.model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return policy


TOKENS = torch.arange(24) * 7 % 300 + 3
POSITIONS = torch.cat([torch.arange(9), torch.arange(15)])
ENDS = torch.tensor([0, 9, 24], dtype=torch.int32)


def hidden(policy):
    return policy.hidden(TOKENS, POSITIONS, ENDS)


def theirs(model):
    """transformers' own forward, one sequence at a time."""
    parts = TOKENS[:9], TOKENS[9:]
    return torch.cat([model.base_model(p[None]).last_hidden_state[0] for p in parts])


def relative(a, b):
    return float((a.double() - b.double()).norm().detach() / b.double().norm().detach())


def trained(policy):
    return {n: p for n, p in policy.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("quantize", BASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_merged_model(folders, quantize, checkpointing):
    """dA = s Bᵀ dW and dB = s dW Aᵀ, with dW of a plain model that holds the merged weights."""
    policy = load(folders(), quantize, gradient_checkpointing=checkpointing)
    plain = AutoModelForCausalLM.from_pretrained(folders()).eval()
    plain.load_state_dict(dict(policy.named_weights()), strict=False)
    direction = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    ours, expected = hidden(policy), theirs(plain)
    assert relative(ours, expected) <= 1e-5
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    weights = dict(plain.named_parameters())
    layers = adapted_layers(policy.model)
    assert len(layers) == 14  # seven linear layers in each of two blocks
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        dw = weights[f"{name}.weight"].grad * layer.scaling["default"]
        assert relative(a.grad, b.T @ dw) <= 1e-5, name
        assert relative(b.grad, dw @ a.T) <= 1e-5, name
    assert {n for n, p in policy.model.named_parameters() if p.grad is not None} == {
        *trained(policy)
    }


def test_the_start_is_the_model_itself_and_draws_nothing(folders):
    state = torch.get_rng_state()
    policies = [load(folders(), stir=False, rank=rank) for rank in (1, 4)]
    again = load(folders(), stir=False, rank=4)
    assert torch.get_rng_state().equal(state)
    plain = hidden(load_policy(folders()))
    assert all(hidden(policy).equal(plain) for policy in policies)
    ours, repeat = trained(policies[1]), trained(again)
    assert len(ours) == 28 and all(p.equal(repeat[n]) for n, p in ours.items())
    other = load_policy(folders(), adapters=Adapters(rank=4, seed=1))
    assert not any(p.equal(ours[n]) for n, p in trained(other).items() if "lora_A" in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", BASES)
def test_only_adapters_train_in_the_models_dtype(folders, dtype, quantize):
    policy = load(folders(), quantize, dtype=dtype, rank=3)
    assert policy.dtype == dtype and policy.has_adapters
    assert all(".lora_" in n and p.dtype == dtype for n, p in trained(policy).items())
    optimizer = MasterAdamW(policy.model, OptimizerConfig(lr=1e-2))
    assert optimizer.masters.keys() == trained(policy).keys()
    assert {m.dtype for m in optimizer.masters.values()} == {torch.float32}
    before = copy.deepcopy(policy.model.state_dict())
    head = policy.head()
    row = hidden(policy)
    assert row.dtype == dtype and not head.weight.requires_grad
    advantages, target = torch.linspace(-1, 1, 24), TOKENS.roll(-1)
    out = linear_policy_loss(row, head.weight, target, advantages, LossSpec.preset("bnpo"))
    out.loss.backward()
    assert head.weight.grad is None
    optimizer.step(1e-2)
    for name, value in policy.model.state_dict().items():
        same = torch.equal(
            getattr(value, "qdata", value), getattr(before[name], "qdata", before[name])
        )
        assert same == (".lora_" not in name), name
    ids = TOKENS[:9]
    with torch.no_grad():
        logits = policy.model(ids[None]).logits[0]
        ours = hidden(policy)[:9] @ head.weight.T
    assert relative(ours, logits) <= 16 * torch.finfo(dtype).eps
    assert policy.max_length == 512 and type(policy.model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_named_weights_have_plain_names(folders, architecture):
    more = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 512}
    folder = folders(architecture, **(more if architecture == "gpt2" else {}))
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    whole = load_policy(folder)
    for (name, p), (other, q) in zip(
        whole.named_weights(), whole.model.named_parameters(), strict=True
    ):
        assert name == other and p is q
    policy = load(folder)
    named = dict(policy.named_weights())
    names = {name: p.shape for name, p in plain.named_parameters()}
    assert {name: p.shape for name, p in named.items()} == names
    assert not any(p.requires_grad for p in named.values())
    plain.load_state_dict(named, strict=False)
    assert relative(theirs(plain), hidden(policy)) <= 1e-5


@pytest.mark.parametrize("quantize", BASES)
def test_an_fp32_engine_is_given_the_masters(folders, quantize):
    """Under `exact` a bf16 model's adapters are their fp32 masters, and the sum is not rounded."""
    policy = load(folders(), quantize, dtype=torch.bfloat16)
    optimizer = MasterAdamW(policy.model, OptimizerConfig())
    for master in optimizer.masters.values():
        master.mul_(1.001)
    key = "model.layers.0.mlp.up_proj"
    layer = adapted_layers(policy.model)[key]
    a, b = (optimizer.masters[f"{key}.lora_{x}.default.weight"] for x in "AB")
    base = layer.base_layer.weight
    base = base.dequantize(torch.float32) if quantize == "int8" else base.float()
    with optimizer.exact():
        merged = dict(policy.named_weights())[f"{key}.weight"]
    assert merged.dtype == torch.float32
    assert relative(merged, base + layer.scaling["default"] * b @ a) <= 1e-6
    rounded = dict(policy.named_weights())[f"{key}.weight"]
    assert rounded.dtype == torch.bfloat16 and 1e-4 < relative(rounded, merged) < 1e-2


@pytest.mark.parametrize("quantize", BASES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saves_a_merged_folder_and_the_adapter(folders, quantize, dtype, tmp_path):
    policy = load(folders(), quantize)
    policy.save(tmp_path / "out", dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.dtype == (dtype or torch.float32)
    for name, value in policy.named_weights():
        assert merged.get_parameter(name).equal(value.to(merged.dtype)), name
    assert json.loads((tmp_path / "out/config.json").read_text()).get("quantization_config") is None
    again = load_policy(str(tmp_path / "out"))
    assert not again.has_adapters
    if dtype is None:
        assert relative(hidden(again), hidden(policy)) <= 1e-5
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(folders()).eval()
    if quantize == "int8":  # the adapter belongs to the quantized base
        with policy.without_adapters():
            expected = hidden(policy)
        assert relative(theirs(base), expected) <= 0.05
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out/adapter"))
    ours, names = trained(policy), dict(adapted.named_parameters())
    assert all(names[f"base_model.model.{n}"].equal(p) for n, p in ours.items())
    if quantize == "none":
        assert relative(theirs(adapted.get_base_model()), hidden(policy)) <= 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantize", BASES)
def test_adapters_off_are_the_initial_weights(folders, quantize, checkpointing):
    copy_of_start = load(folders(), quantize, stir=False)
    policy = load(folders(), quantize, gradient_checkpointing=checkpointing)
    moved = hidden(policy)
    reference = policy.initial()
    assert reference.model is policy.model
    start = hidden(copy_of_start).detach()
    assert hidden(reference).equal(start) and not hidden(reference).requires_grad
    with policy.without_adapters():
        assert hidden(policy).equal(start)
    assert not moved.equal(start) and hidden(policy).equal(moved)
    moved.sum().backward()  # a graph that was made before survives both
    assert all(p.requires_grad and p.grad is not None for p in trained(policy).values())
    assert reference.head().weight is policy.head().weight
    with pytest.raises(ValueError, match="trains all its weights"):
        load_policy(folders()).initial()


@AO
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear_has_the_gradient_of_its_dequantized_weight(dtype):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 96, dtype=dtype).requires_grad_(False)
    exact = linear.weight.double()
    quantize_(linear, Int8WeightOnlyConfig())
    layer = Int8Linear(linear)
    weight = layer.weight.dequantize(torch.float32).double()
    step = exact.abs().amax(1, keepdim=True) / 127
    assert ((weight - exact).abs() <= 0.51 * step).all()  # to nearest
    x = torch.randn(3, 7, 48, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 7, 96, dtype=dtype)
    y = layer(x)
    y.backward(dy)
    unit = torch.finfo(dtype).eps
    assert relative(y, x.double() @ weight.T + linear.bias.double()) <= 2 * unit
    assert relative(x.grad, dy.double() @ weight) <= 2 * unit
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert not saved  # torchao's own linear would save the weight cast to x's dtype
    if dtype == torch.float32:
        x = x.detach().double().requires_grad_()
        assert torch.autograd.gradcheck(lambda v: _FrozenLinear.apply(v, layer.weight, None), x)


@AO
def test_int8_covers_all_linear_layers_but_the_head(folders):
    policy = load(folders(), "int8", targets=("q_proj", "self_attn.v_proj"))
    kinds = [type(m) for m in policy.model.modules() if isinstance(m, torch.nn.Linear)]
    assert kinds.count(Int8Linear) == 14 and len(adapted_layers(policy.model)) == 4
    assert type(policy.model.get_output_embeddings()) is torch.nn.Linear
    assert relative(hidden(policy), hidden(load(folders(), targets=("q_proj", "v_proj")))) <= 0.05


REFUSED = {
    "rank": ({"rank": 0}, "lora_rank = 0"),
    "negative": ({"rank": -2}, "lora_rank = -2"),
    "alpha": ({"alpha": 0.0}, "lora_alpha = 0.0"),
    "nan": ({"alpha": float("nan")}, "lora_alpha = nan"),
    "true": ({"rank": True}, "lora_rank = True"),
    "huge": ({"rank": 33}, r"lora_rank = 33: expected at most 32, .*model\.layers\.0\..*q_proj"),
    "narrow": ({"rank": 17, "targets": ("k_proj",)}, r"lora_rank = 17: .* at most 16.*k_proj"),
    "text": ({"alpha": "a"}, "lora_alpha = 'a'"),
    "none": ({"targets": None}, "lora_targets = None"),
    "number": ({"targets": ("q_proj", 3)}, r"lora_targets = \['q_proj', 3\]"),
    "nothing": ({"targets": ()}, r"lora_targets = \[\]"),
    "both": ({"targets": ("all-linear", "q_proj")}, "lora_targets"),
    "quantize": ({"quantize": "int4"}, "quantize = 'int4'"),
    "unknown": ({"targets": ("q_proj", "query")}, r"'query' names no linear layer.* up_proj"),
    "head": ({"targets": ("lm_head",)}, "'lm_head' names no .*head, which stays frozen"),
    "norm": ({"targets": ("input_layernorm",)}, "'input_layernorm' names no"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(folders, name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        load_policy(folders(), adapters=Adapters(**options))


def test_targets_may_be_a_name_or_a_list(folders):
    assert (
        Adapters(targets="q_proj") == Adapters(targets=["q_proj"]) == Adapters(targets=("q_proj",))
    )
    assert len(adapted_layers(load(folders(), targets="q_proj").model)) == 2
    assert len(adapted_layers(load(folders(), targets=["all-linear"], rank=32).model)) == 14


def test_adapters_of_another_type(folders):
    with pytest.raises(ValueError, match=r"adapters=\{'rank': 4\}: expected Adapters"):
        load_policy(folders(), adapters={"rank": 4})


@pytest.mark.parametrize(("package", "quantize"), [("peft", "none"), ("torchao", "int8")])
def test_a_missing_package_is_named_with_its_extra(folders, monkeypatch, package, quantize):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a)
    )
    with pytest.raises(ValueError, match=rf"needs {package}.*pip install 'pyrl\[lora\]'"):
        load_policy(folders(), adapters=Adapters(quantize=quantize))


@AO
def test_nothing_to_quantize(folders):
    folder = folders("gpt2", n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=512)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no frozen nn\.Linear"):
        load_policy(folder, adapters=Adapters(quantize="int8"))


def test_nothing_is_stale_in_vllm(folders):
    """What the vLLM engine demands of a sync: every name, the tied head included."""
    from pyrl.rollout.vllm_weights import complete, weight_names

    policy = load(folders())
    names = {name for name, _ in complete(policy.named_weights(), *weight_names(folders()))}
    assert names == {*AutoModelForCausalLM.from_pretrained(folders()).state_dict()}


def test_sampling_with_unmerged_adapters(folders, tmp_path):
    """The engine that shares the module, and one with the merged weights."""
    from pyrl.rollout import SamplingParams, make_rollout

    policy = load(folders())
    shared = make_rollout(policy=policy)
    own = make_rollout(model_path=folders())
    own.sync(policy.named_weights(), 1)
    params = SamplingParams(n=3, max_new_tokens=8)
    prompts = [[5, 6, 7], [9, 10, 11, 12]]
    a, b = (engine.generate(prompts, params, seed=0) for engine in (shared, own))
    for mine, other in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
        assert list(mine.tokens) == list(other.tokens)
        assert max(abs(x - y) for x, y in zip(mine.logprobs, other.logprobs, strict=True)) < 1e-4
