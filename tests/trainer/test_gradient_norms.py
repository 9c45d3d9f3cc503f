"""Norms of every sample's gradient against plain autograd of one sample at a time."""

import numpy as np
import pytest
import torch

from pyrl import LossSpec, Sample, load_policy
from pyrl.testing import tiny_model_folder
from pyrl.trainer.config import OptimizerConfig
from pyrl.trainer.gradient_norms import gradient_norms
from pyrl.trainer.optimizer import MasterAdamW

#: Two completions of one prompt (a shared prefix), a masked one, one of nothing, repeated tokens,
#: and the padding token 2, whose embedding autograd gives no gradient.
SAMPLES = [
    Sample([5, 9, 9, 41], [7, 100, 2], advantage=-3.0),
    Sample([5, 9, 9, 41], [7, 33, 200, 9, 9], weight=5.0),
    Sample([300], [17], advantage=1.0),
    Sample([8, 2, 8], []),
    Sample([8, 2, 8], [8, 2, 8, 8, 8, 2], mask=[1, 0, 1, 1, 0, 1]),
]
FAMILIES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False}),
    ("gemma2", {"final_logit_softcapping": 5.0}),
    ("gemma3_text", {}),  # scales inside its embedding module
    ("cohere", {"logit_scale": 0.25}),
]


def spec_of(policy, **options):
    head = policy.head()
    return LossSpec(softcap=head.softcap, logit_scale=head.logit_scale, **options)


def surprise(policy, sample, temperature):
    """-sum of log p of one sample, by transformers' own forward and logits."""
    whole = torch.tensor([[*sample.prompt, *sample.completion]])
    config = policy.model.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        logits = policy.model(whole, use_cache=False).logits[0]
    finally:
        config._attn_implementation = before
    n = len(sample.completion)
    logp = (logits[len(sample.prompt) - 1 : -1] / temperature).log_softmax(-1)
    mask = torch.tensor([True] * n if sample.mask is None else sample.mask, dtype=torch.bool)
    targets = torch.tensor(sample.completion, dtype=torch.long)
    return -logp.gather(1, targets[:, None])[:, 0][mask].sum()


def separate_head(policy):
    """The head as a parameter of its own, so that autograd gives the two parts of a tied weight."""
    head = policy.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return head.weight


def truth(policy, sample, parameter, temperature):
    tied = policy.head().weight is policy.model.get_input_embeddings().weight
    output = policy.model.get_output_embeddings()
    kept = output.weight
    if parameter == "all":
        wanted = list(policy.model.parameters())
    else:
        head = separate_head(policy) if tied else kept
        wanted = [head if parameter == "lm_head" else policy.model.get_input_embeddings().weight]
    try:
        loss = surprise(policy, sample, temperature)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    finally:
        output.weight = kept
    return sum(float(g.double().square().sum()) for g in grads if g is not None) ** 0.5


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    made = {}

    def policy(architecture, **config):
        key = (architecture, *sorted(config.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            made[key] = load_policy(tiny_model_folder(folder, architecture=architecture, **config))
        return made[key]

    return policy


@pytest.mark.parametrize("parameter", ["lm_head", "embed", "all"])
@pytest.mark.parametrize(("architecture", "config"), FAMILIES, ids=str)
def test_norms_are_those_of_plain_autograd(policies, architecture, config, parameter):
    policy = policies(architecture, **config)
    spec = spec_of(policy, temperature=0.7)
    expected = [truth(policy, sample, parameter, 0.7) for sample in SAMPLES]
    assert expected[3] == 0 and min(expected[:3]) > 0
    for budget in (4, 10_000):  # samples on their own, and all in a row
        norms = gradient_norms(policy, SAMPLES, spec, parameter, tokens_per_row=budget)
        # fp32: the same sums in another order.
        assert norms == pytest.approx(expected, rel=1e-5, abs=0)


def test_the_parts_of_an_untied_model_are_parts_of_all(policies):
    policy = policies("llama", tie_word_embeddings=False)
    norms = {
        name: np.array(gradient_norms(policy, SAMPLES, spec_of(policy), name, tokens_per_row=64))
        for name in ("lm_head", "embed", "all")
    }
    assert (norms["lm_head"] ** 2 + norms["embed"] ** 2 <= norms["all"] ** 2).all()


@pytest.mark.parametrize("attention", ["pyrl_varlen", "sdpa"])
@pytest.mark.parametrize("parameter", ["lm_head", "embed"])
def test_without_the_attention_of_trees_nothing_is_shared(tmp_path, attention, parameter):
    folder = tiny_model_folder(tmp_path)
    found = [
        gradient_norms(policy, SAMPLES, LossSpec(), parameter, tokens_per_row=64)
        for policy in (load_policy(folder), load_policy(folder, attention=attention))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=0)


@pytest.mark.parametrize("parameter", ["lm_head", "embed", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_is_left_and_no_hook_runs(tmp_path, dtype, parameter):
    policy = load_policy(tiny_model_folder(tmp_path), dtype=dtype, gradient_checkpointing=True)
    optimizer = MasterAdamW(policy.model, OptimizerConfig(lr=0.1))
    embedding = policy.model.get_input_embeddings()
    hooks = dict(embedding._forward_hooks)
    with torch.no_grad():  # as a caller who samples may be
        norms = gradient_norms(policy, SAMPLES, LossSpec(), parameter, tokens_per_row=16)
    assert all(norm > 0 for i, norm in enumerate(norms) if i != 3) and norms[3] == 0
    assert all(p.grad is None and p.requires_grad for p in policy.model.parameters())
    assert all(master.grad is None for master in optimizer.masters.values())
    assert dict(embedding._forward_hooks) == hooks and not policy.model.training
    # A hook left behind, or a graph cut for good, would show in the next update.
    surprise(policy, SAMPLES[0], 1.0).backward()
    assert optimizer.step(0.1) > 0


def test_adapters_alone_are_all_that_is_trained(tmp_path):
    from pyrl.models.lora import Adapters

    policy = load_policy(tiny_model_folder(tmp_path), adapters=Adapters(rank=2))
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    found = gradient_norms(policy, SAMPLES, LossSpec(), "all", tokens_per_row=64)
    for sample, norm in zip(SAMPLES, found, strict=True):
        if sample.completion:
            grads = torch.autograd.grad(surprise(policy, sample, 1.0), trained)
            expected = sum(float(g.double().square().sum()) for g in grads) ** 0.5
            assert norm == pytest.approx(expected, rel=1e-5)
    for name in ("lm_head", "embed"):  # frozen, and measured all the same
        assert min(gradient_norms(policy, SAMPLES[:3], LossSpec(), name, tokens_per_row=64)) > 0


def test_nothing_and_bad_input(policies):
    policy = policies("llama")
    for name in ("lm_head", "embed", "all"):
        assert gradient_norms(policy, [], LossSpec(), name, tokens_per_row=8) == []
    with pytest.raises(ValueError, match="parameter='head': expected one of lm_head, embed, all"):
        gradient_norms(policy, SAMPLES, LossSpec(), "head", tokens_per_row=8)
    for name in ("lm_head", "embed", "all"):
        with pytest.raises(ValueError, match="sample 1: prompt has 0 tokens"):
            gradient_norms(
                policy, [SAMPLES[0], Sample([], [1])], LossSpec(), name, tokens_per_row=8
            )


def test_an_embedding_that_is_no_lookup_is_refused(tmp_path):
    class Odd(torch.nn.Embedding):
        pass

    policy = load_policy(tiny_model_folder(tmp_path))
    policy.model.set_input_embeddings(Odd(320, 32))
    with pytest.raises(ValueError, match="parameter='embed': Odd is not a plain or scaled"):
        gradient_norms(policy, SAMPLES, LossSpec(), "embed", tokens_per_row=8)
