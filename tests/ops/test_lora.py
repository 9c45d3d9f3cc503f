"""linear_head: the head of a peft model, read by its attributes; peft itself where installed."""

import importlib.util

import pytest
import torch
from torch import nn

import pyrl
from pyrl.parity import relative

V, D = 23, 8


class Wrapped(nn.Module):
    """The attributes of peft's LoRA layer over a linear head."""

    def __init__(self, ranks, dropout=0.0):
        super().__init__()
        self.base_layer = nn.Linear(D, V)
        self.lora_A = nn.ModuleDict({n: nn.Linear(D, r, bias=False) for n, r in ranks.items()})
        self.lora_B = nn.ModuleDict({n: nn.Linear(r, V, bias=False) for n, r in ranks.items()})
        self.lora_dropout = nn.ModuleDict({n: nn.Dropout(dropout) for n in ranks})
        self.scaling = {n: 2.0 / r for n, r in ranks.items()}
        self.use_dora = dict.fromkeys(ranks, False)
        self.lora_variant = {}
        self.active_adapter = list(ranks)
        self.disable_adapters = False
        self.merged = False

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        out = self.base_layer(x)
        for n in self.active_adapter:
            out = out + self.scaling[n] * self.lora_B[n](self.lora_A[n](x))
        return out


def logits(head, x):
    z = x @ head.weight.T + head.bias
    return z if head.lora is None else z + head.lora.scale * (x @ head.lora.a.T) @ head.lora.b.T


def test_a_plain_head():
    head = pyrl.linear_head(linear := nn.Linear(D, V, bias=False))
    assert head.weight is linear.weight
    assert head.bias is None and head.lora is None


@pytest.mark.parametrize("ranks", [{"default": 3}, {"one": 2, "two": 5}], ids=["one", "two"])
def test_adapters_become_one_low_rank_term(ranks):
    module, x = Wrapped(ranks), torch.randn(6, D)
    head = pyrl.linear_head(module)
    assert head.weight is module.base_layer.weight
    assert relative(logits(head, x), module(x)) <= 1e-6
    target = torch.randint(0, V, (6,))
    pyrl.linear_logprob(
        x, head.weight, target, bias=head.bias, lora=head.lora
    ).logprob.sum().backward()
    ours = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x).log_softmax(1).gather(1, target[:, None]).sum().backward()
    for grad, parameter in zip(ours, module.parameters(), strict=True):
        assert relative(grad, parameter.grad) <= 2e-6  # fp32, two orders of summation


def test_adapters_that_are_off():
    module = Wrapped({"default": 3})
    for attribute in ("disable_adapters", "merged"):
        setattr(module, attribute, True)
        assert pyrl.linear_head(module).lora is None
        setattr(module, attribute, False)
    module.active_adapter = "other"  # a name, in older versions
    assert pyrl.linear_head(module).lora is None
    module.active_adapter = "default"
    assert pyrl.linear_head(module).lora is not None


def test_a_head_that_is_trained_whole():
    module = nn.Module()
    module.original_module = nn.Linear(D, V)
    module.modules_to_save = nn.ModuleDict({"default": nn.Linear(D, V)})
    module.active_adapter, module.disable_adapters = ["default"], False
    assert pyrl.linear_head(module).weight is module.modules_to_save["default"].weight
    module.disable_adapters = True
    assert pyrl.linear_head(module).weight is module.original_module.weight


def test_what_is_not_a_low_rank_sum_is_refused_by_name():
    module = Wrapped({"default": 3}, dropout=0.1)
    with pytest.raises(NotImplementedError, match=r"'default' has lora_dropout=0.1 in training"):
        pyrl.linear_head(module)
    assert pyrl.linear_head(module.eval()).lora is not None
    module.use_dora["default"] = True
    with pytest.raises(NotImplementedError, match="'default' is a LoRA variant"):
        pyrl.linear_head(module)
    module.use_dora["default"] = False
    module.lora_B["default"] = nn.Linear(3, V)
    with pytest.raises(NotImplementedError, match="'default' has a bias"):
        pyrl.linear_head(module)
    quantised = nn.Module()
    quantised.qweight = torch.zeros(V, D, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="Module has no floating weight"):
        pyrl.linear_head(quantised)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is an extra")
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"modules_to_save": True}], ids=str)
def test_real_peft(options):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from pyrl.testing import tiny_config

    model = AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=False))
    whole = "modules_to_save" in options
    options = {} if whole else options
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj"] if whole else ["q_proj", "lm_head"],
        modules_to_save=["lm_head"] if whole else None, init_lora_weights=False, **options,
    )  # fmt: skip
    model = get_peft_model(model, config)
    ids = torch.randint(0, 320, (1, 9))
    target = ids[0, 1:]
    expected = model(ids).logits[0, :-1].log_softmax(1).gather(1, target[:, None])[:, 0]
    expected.sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden = model.get_base_model().model(ids).last_hidden_state[0, :-1]
    head = pyrl.linear_head(model.get_output_embeddings())
    assert (head.lora is None) == whole
    ours = pyrl.linear_logprob(hidden, head.weight, target, bias=head.bias, lora=head.lora).logprob
    ours.sum().backward()
    assert relative(ours, expected) <= 2e-6
    for name, parameter in model.named_parameters():
        if name in grads:
            assert relative(parameter.grad, grads[name]) <= 1e-5, name  # through two layers
    with model.disable_adapter():
        assert pyrl.linear_head(model.get_output_embeddings()).lora is None
