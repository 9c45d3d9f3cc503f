"""References that are reset to the policy: bit-equal then, and unmoved by its training."""

import copy
import io

import pytest
import torch

from pyrl import LossSpec, Sample, linear_policy_loss, pack
from pyrl.models import Adapters, AdapterSnapshot, FrozenCopy, load_policy
from pyrl.ops.linear_logprob import linear_logprob
from pyrl.testing import tiny_model_folder
from pyrl.trainer.config import OptimizerConfig
from pyrl.trainer.optimizer import MasterAdamW

SPEC = LossSpec.preset("reinforce")
KINDS = ["copy", "adapters"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def row():
    samples = [Sample([5, 6, 7, 8], list(range(9 + i, 20)), advantage=1.0 - i) for i in range(3)]
    return pack(samples, 200, aligned=False).row(0)


def build(folder, kind, dtype=torch.float32, **options):
    """A policy, its reference, its optimizer."""
    if kind == "copy":
        policy = load_policy(folder, dtype=dtype, check=False, **options)
        reference = FrozenCopy(load_policy(folder, dtype=dtype, check=False))
    else:
        pytest.importorskip("peft", reason="peft is an extra")
        policy = load_policy(folder, dtype=dtype, check=False, adapters=Adapters(rank=4), **options)
        reference = AdapterSnapshot(policy)
    return policy, reference, MasterAdamW(policy.model, OptimizerConfig(lr=1e-2))


def logprobs(policy, row):
    with torch.no_grad():
        hidden = row.at_targets(policy.hidden(row.tokens, row.positions, row.plan))
        return linear_logprob(hidden, policy.head().weight, row.target, mask=row.loss_mask).logprob


def train(policy, optimizer, row, steps=2):
    for _ in range(steps):
        hidden = row.at_targets(policy.hidden(row.tokens, row.positions, row.plan))
        head = policy.head().weight
        out = linear_policy_loss(hidden, head, row.target, row.advantages, SPEC, mask=row.loss_mask)
        out.loss.backward()
        optimizer.step(1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_a_reset_the_kl_is_exactly_zero(folder, row, kind, dtype):
    policy, reference, optimizer = build(folder, kind, dtype, gradient_checkpointing=True)
    measured = reference.policy
    start = logprobs(policy, row)
    assert logprobs(measured, row).equal(start)
    for _ in range(2):
        before = logprobs(measured, row)
        train(policy, optimizer, row)
        moved = logprobs(policy, row)
        assert not moved.equal(before)
        assert logprobs(measured, row).equal(before)  # training does not move the reference
        reference.reset(policy)
        assert logprobs(measured, row).equal(moved) and logprobs(policy, row).equal(moved)
    assert reference.policy is measured
    assert not measured.hidden(row.tokens, row.positions, row.plan).requires_grad
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    assert trained and all(p.grad is None for p in measured.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_survives_a_checkpoint(folder, row, kind):
    policy, reference, optimizer = build(folder, kind)
    assert reference.state_dict() == {"weights": None}
    start = logprobs(policy, row)
    train(policy, optimizer, row)
    reference.reset(policy)
    expected = logprobs(reference.policy, row)
    file = io.BytesIO()
    torch.save(reference.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    train(policy, optimizer, row)
    fresh_policy, fresh, _ = build(folder, kind)
    fresh.load_state_dict({"weights": None})
    assert logprobs(fresh.policy, row).equal(start)
    fresh.load_state_dict(state)
    assert logprobs(fresh.policy, row).equal(expected)
    for tensor in state["weights"].values():
        tensor.zero_()  # what was loaded is a copy
    assert logprobs(fresh.policy, row).equal(expected)
    assert logprobs(fresh_policy, row).equal(start)


def test_a_graph_made_before_survives_a_snapshots_forward(folder, row):
    policy, reference, optimizer = build(folder, "adapters")
    train(policy, optimizer, row)
    reference.reset(policy)
    train(policy, optimizer, row)
    plan = row.tokens, row.positions, row.plan
    policy.hidden(*plan).square().sum().backward()
    expected = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    names = [name for name, _ in policy.model.named_parameters()]
    optimizer.discard_gradients()
    hidden = policy.hidden(*plan)
    assert not reference.policy.hidden(*plan).equal(hidden)
    hidden.square().sum().backward()
    assert [name for name, _ in policy.model.named_parameters()] == names
    found = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) == 28
    assert all(g.equal(expected[n]) for n, g in found.items())


def test_a_frozen_copy_goes_nowhere_else(folder, row, tmp_path):
    policy, reference, _ = build(folder, "copy")
    assert not any(p.requires_grad for p in reference.policy.model.parameters())
    other = load_policy(tiny_model_folder(tmp_path / "wide", intermediate_size=48), check=False)
    start = logprobs(reference.policy, row)
    with pytest.raises(ValueError, match=r"mlp\.\w+_proj\.weight: torch.float32 \[48, 32\] for"):
        reference.reset(other)
    half = load_policy(folder, dtype=torch.bfloat16, check=False)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 .* for the reference's torch\.float32"):
        reference.reset(half)
    state = copy.copy(dict(policy.model.named_parameters()))
    del state["model.norm.weight"]
    with pytest.raises(ValueError, match=r"only the reference has .* 'model\.norm\.weight'"):
        reference.load_state_dict({"weights": state})
    assert logprobs(reference.policy, row).equal(start) and not policy.has_adapters
    reference.reset(policy)
    with pytest.raises(ValueError, match="its initial weights are gone"):
        reference.load_state_dict({"weights": None})


def test_a_snapshot_is_of_one_models_adapters(folder):
    policy, reference, _ = build(folder, "adapters")
    other, _, _ = build(folder, "adapters")
    with pytest.raises(ValueError, match="another model's adapters"):
        reference.reset(other)
    with pytest.raises(ValueError, match="trains all its weights"):
        AdapterSnapshot(load_policy(folder, check=False))
    reference.reset(policy)
    state = dict(reference.state_dict()["weights"])
    state["more"] = torch.zeros(1)
    with pytest.raises(ValueError, match="only what it is set to has the parameter 'more'"):
        reference.load_state_dict({"weights": state})
    reference.load_state_dict({"weights": None})  # the base model is still there
    assert reference.policy.adapters is None
