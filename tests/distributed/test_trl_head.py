"""TRL's fused head in pyrl, inside FSDP2 and DDP: the gradients of one process."""

import dataclasses

import pytest
import torch

pytest.importorskip("trl")

import pyrl
from pyrl import LossSpec
from pyrl.parity import relative
from pyrl.testing import tiny_config

V, B, L = 321, 2, 6  # V: no number of ranks divides it; B rows of L tokens a rank
SPEC = LossSpec(aggregation="sequence_mean")


def tiny_model(tied):
    from transformers import AutoModelForCausalLM

    from pyrl.integrations._trl_head import add_head

    torch.manual_seed(0)
    config = tiny_config("llama", V, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).float()
    add_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    return model


def step(model, rows, world, one_pass):
    """Backward of the mean over all ranks' rows, times the ranks whose mean FSDP2 and DDP take."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (world * B, L), generator=g)[rows]
    advantages = torch.randn(world * B, generator=g)[rows]
    target = ids[:, 1:]
    given = {"denominator": world * B, "mask": torch.ones_like(target)}

    def policy_loss(hidden, weight, bias, head):
        spec = dataclasses.replace(SPEC, **head)
        return pyrl.linear_policy_loss(hidden, weight, target, advantages, spec, **given)

    extra = {"policy_loss": policy_loss} if one_pass else {}
    out = model(input_ids=ids, labels=ids, fused_lm_head=True, **extra)
    loss = out.loss
    if not one_pass:
        loss = pyrl.policy_objective(out.log_probs, advantages, SPEC, **given).loss
    (loss * (world if len(ids) == B else 1)).backward()


def sharded(rank, kind, tied, world, one_pass):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_model(tied)
    rows = slice(rank * B, (rank + 1) * B)
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        step(wrapped, rows, world, one_pass)
        return {name: p.grad for name, p in model.named_parameters()}
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if kind == "fsdp2, head apart":
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model, rows, world, one_pass)
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize(
    ("kind", "tied"),
    [("fsdp2", True), ("fsdp2", False), ("fsdp2, head apart", False), ("ddp", True)],
)
def test_gradients_of_one_process(ranks, kind, tied, one_pass):
    world = 2
    model = tiny_model(tied)
    step(model, slice(None), world, one_pass)
    expected = {name: p.grad for name, p in model.named_parameters()}
    for grads in ranks(world).run(sharded, kind, tied, world, one_pass, timeout=240):
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            # fp32 sums in another order, through two layers
            assert relative(grad, expected[name]) <= 1e-5, name
