"""Offloading changes no gradient, and little of what is saved stays on the device."""

import pytest
import torch

from pyrl.models import load_policy, offload
from pyrl.testing import tiny_model_folder

TOKENS = torch.arange(400) * 7 % 300 + 3
ARGS = TOKENS, torch.arange(400), torch.tensor([0, 400], dtype=torch.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def as_if_on_a_device(monkeypatch):
    """The CPU is taken for a device, so tensors are copied as on one; no latency to spare."""
    monkeypatch.setattr(offload, "HOST", "elsewhere")
    monkeypatch.setattr(offload, "SMALLEST", 1024)


def gradients(policy):
    direction = torch.randn(400, 32, generator=torch.Generator().manual_seed(1))
    policy.model.zero_grad(set_to_none=True)
    (policy.hidden(*ARGS) * direction).sum().backward()
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_bits(folder, as_if_on_a_device, monkeypatch, checkpointing):
    copies = []
    real = torch.Tensor.copy_
    moving = load_policy(folder, offload_activations=True, gradient_checkpointing=checkpointing)
    expected = gradients(load_policy(folder, gradient_checkpointing=checkpointing))
    monkeypatch.setattr(
        torch.Tensor,
        "copy_",
        lambda self, *a, **k: copies.append(self.shape) or real(self, *a, **k),
    )
    ours = gradients(moving)
    assert ours.keys() == expected.keys() and all(ours[n].equal(expected[n]) for n in ours)
    # With checkpointing the inputs of two layers, of the final norm and of the embedding.
    assert (0 < len(copies) <= 6) if checkpointing else len(copies) > 20


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_stays_on_the_device(folder, monkeypatch, checkpointing):
    monkeypatch.setattr(offload, "SMALLEST", 1024)
    policy = load_policy(folder, gradient_checkpointing=checkpointing)
    moved, kept = offload.saved_bytes(policy.model, lambda: policy.hidden(*ARGS))
    layer_input = 400 * 32 * 4
    assert moved + kept > (2 if checkpointing else 20) * layer_input
    assert kept <= 0.05 * (moved + kept)


def test_parameters_and_repeats_are_not_copied(folder, as_if_on_a_device):
    model = load_policy(folder).model
    hook = offload.Offload(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert hook.stays(weight) and hook.stays(weight.T) and hook.stays(weight[3:].detach())
    x = torch.randn(64, 64)
    assert not hook.stays(x) and hook.stays(x[:1]) and hook.stays(x[:1].expand(640, 64))
    first, second = hook._to_host(x), hook._to_host(x)
    assert first[1] is second[1] and first[1].equal(x)
    x += 1
    assert hook._to_host(x)[1].equal(x) and not first[1].equal(x)
    assert hook._to_host(x.T)[1].equal(x.T)
    assert not offload._to_device(first).equal(x)


def test_nothing_moves_on_a_cpu(folder, monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 0)
    policy = load_policy(folder, offload_activations=True)
    x = torch.randn(4)
    assert offload.Offload(policy.model)._to_host(x) is x
    with torch.no_grad():
        policy.hidden(*ARGS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu(folder, monkeypatch, checkpointing):
    monkeypatch.setattr(offload, "SMALLEST", 1024)
    args = [a.cuda() for a in ARGS]
    held, grads = [], []
    for moving in (False, True):
        policy = load_policy(
            folder, offload_activations=moving, gradient_checkpointing=checkpointing
        )
        policy.model.cuda()
        policy.hidden(*args).sum().backward()  # workspaces
        policy.model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        hidden = policy.hidden(*args)
        held.append(torch.cuda.memory_allocated() - before)
        hidden.sum().backward()
        grads.append({n: p.grad.clone() for n, p in policy.model.named_parameters()})
    assert held[1] < held[0]
    assert all(grads[0][n].equal(grads[1][n]) for n in grads[0])
