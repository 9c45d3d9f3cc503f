"""Head weights sharded by FSDP2, HSDP, tensor parallelism and ZeRO-3, gathered with gradients."""

import pytest
import torch
from torch import nn

import pyrl
from pyrl import LossSpec
from pyrl.parity import relative

V, D, N = 31, 8, 6  # V: no number of ranks divides it; N tokens a rank
SPEC = LossSpec(entropy_coef=0.1)

#: How the head is sharded: what the loss meets is a plain tensor, or a DTensor.
LAYOUTS = {
    "in the root, unsharded after forward": False,
    "in the root, resharded": True,
    "its own group": True,
    "tied to the embedding": False,
    "tied, resharded": True,
}


class Model(nn.Module):
    """Hidden states of token ids; the head is left to the loss."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return torch.tanh(self.body(self.embed(ids)))


def batch(world):
    """Token ids, targets and advantages of all ranks, `N` tokens each."""
    g = torch.Generator().manual_seed(1)
    shape = (world * N,)
    ids, target = (torch.randint(0, V, shape, generator=g) for _ in range(2))
    return ids, target, torch.randn(shape, generator=g)


def loss_of(hidden, weight, target, advantages, world):
    return pyrl.linear_policy_loss(
        hidden, weight, target, advantages, SPEC, denominator=world * N, backend="torch"
    ).loss


def whole(tied, world):
    """Gradients of one process with the batch of all ranks."""
    model, (ids, target, advantages) = Model(tied), batch(world)
    loss_of(model(ids), model.lm_head.weight, target, advantages, world).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def fully_sharded(rank, kind, world, hybrid=False):
    """Gradients of one FSDP2 step, made whole, and whether the loss met a DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    shape, names = ((2, world // 2), ("replicate", "shard")) if hybrid else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = Model("tied" in kind)
    fully_shard(model.body, mesh=mesh)
    if kind == "its own group":
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True if "resharded" in kind else None)
    ids, target, advantages = (v[rank * N : (rank + 1) * N] for v in batch(world))
    hidden = model(ids)
    sharded = isinstance(model.lm_head.weight, DTensor)
    with pyrl.full_weight(model.lm_head) as weight:
        # FSDP2 takes the mean over ranks, so a sum over ranks is `world` times that.
        (world * loss_of(hidden, weight, target, advantages, world)).backward()
    return sharded, {name: p.grad.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_fsdp2_has_the_gradients_of_one_process(ranks, kind):
    expected = whole("tied" in kind, 2)
    for sharded, grads in ranks(2).run(fully_sharded, kind, 2):
        assert sharded is LAYOUTS[kind]
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert relative(grad, expected[name]) <= 1e-6, name  # fp32 sums in another order


def test_hybrid_sharding(ranks):
    expected = whole(False, 4)
    for _, grads in ranks(4).run(fully_sharded, "its own group", 4, True):
        for name, grad in grads.items():
            assert relative(grad, expected[name]) <= 1e-6, name


def distributed(rank, world, reduce, dtype):
    """Without FSDP: dweight of a DTensor over ("data", "tensor"), tokens split over "data" only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    model, data = Model(False), rank // (world // 2)
    weight = nn.Parameter(
        distribute_tensor(model.lm_head.weight.detach(), mesh, [Replicate(), Shard(0)])
    )
    ids, target, advantages = (v[data * N : (data + 1) * N] for v in batch(2))
    hidden = model(ids).detach()
    with pyrl.full_weight(weight, reduce=reduce, replicated=("tensor",), dtype=dtype) as full:
        assert full.dtype == (dtype or torch.float32)
        loss_of(hidden, full, target, advantages, 2).backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad.placements == weight.placements
    frozen = weight.detach()
    with pyrl.full_weight(frozen) as full:
        assert torch.equal(full, weight.full_tensor())
        assert not full.requires_grad
    return weight.grad.full_tensor()


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_mean_and_sum_over_the_ranks_with_other_tokens(ranks, reduce, dtype):
    expected = whole(False, 2)["lm_head.weight"] / (2 if reduce == "mean" else 1)
    for grad in ranks(4).run(distributed, 4, reduce, dtype):
        # bf16: the gather, the GEMMs and the reduction each round once (2^-9 relative).
        assert relative(grad, expected) <= (1e-6 if dtype is None else 4 * 2**-9)


def refusals(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    weight = distribute_tensor(torch.randn(V, D), mesh, [Shard(0)])
    hidden, target = torch.randn(3, D), torch.zeros(3, dtype=torch.long)
    said = []
    for attempt in (
        lambda: pyrl.linear_logprob(hidden, weight, target),
        lambda: pyrl.full_weight(weight, replicated=("tensor",)).__enter__(),
    ):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_dtensor_passed_directly_is_refused_with_what_to_do(ranks):
    for direct, unknown in ranks(2).run(refusals):
        assert direct.startswith("weight: expected a plain tensor, got a DTensor (31, 8)")
        assert "Shard(dim=0)" in direct and "pyrl.full_weight(weight)" in direct
        assert unknown == "replicated='tensor': expected names of the mesh, ['data']"


class Partitioned(nn.Parameter):
    """What DeepSpeed's ZeRO-3 makes of a parameter, as far as a loss can see it."""

    def __new__(cls, whole):
        self = super().__new__(cls, torch.empty(0))
        self.ds_id, self.ds_shape, self.whole, self.calls = 7, whole.shape, whole, []
        return self

    def all_gather(self):
        self.calls.append("all_gather")
        self.data = self.whole.clone()

    def partition(self):
        self.calls.append("partition")
        self.data = torch.empty(0)


def test_a_zero3_parameter_is_whole_inside_the_block():
    model, (ids, target, advantages) = Model(False), batch(1)
    hidden = model(ids).detach()
    loss_of(hidden, model.lm_head.weight, target, advantages, 1).backward()
    parameter = Partitioned(model.lm_head.weight.detach())
    seen = []
    parameter.register_hook(seen.append)
    with pyrl.full_weight(parameter) as weight:
        loss_of(hidden, weight, target, advantages, 1).backward()
    assert parameter.calls == ["all_gather", "partition"]
    assert torch.equal(seen[0], model.lm_head.weight.grad)
    with pytest.raises(ZeroDivisionError), pyrl.full_weight(parameter):
        _ = 1 / 0
    assert parameter.calls[2:] == ["all_gather", "partition"]  # given back whatever happens
    parameter.all_gather()
    with pyrl.full_weight(parameter) as weight:  # already gathered by an enclosing block
        assert weight is parameter
    assert parameter.calls[4:] == ["all_gather"]


def test_a_zero3_partition_passed_directly_is_refused_with_what_to_do():
    parameter = Partitioned(torch.randn(V, D))
    hidden, target = torch.randn(3, D), torch.zeros(3, dtype=torch.long)
    message = r"weight: got shape \(0,\): a ZeRO-3 partition of the whole \(31, 8\).*full_weight"
    with pytest.raises(ValueError, match=message):
        pyrl.linear_logprob(hidden, parameter, target)
    with pytest.raises(ValueError, match=message):
        pyrl.linear_policy_loss(hidden, parameter, target, torch.ones(3), LossSpec())
    with pytest.raises(ValueError, match=r"bias: got shape \(0,\)"):
        pyrl.linear_logprob(hidden, torch.randn(V, D), target, bias=torch.empty(0))
    with pytest.raises(ValueError, match="reduce='max': expected 'mean' or 'sum'"):
        pyrl.full_weight(parameter, reduce="max").__enter__()


def test_a_plain_weight_passes_through():
    model = Model(False)
    for source in (model.lm_head, model.lm_head.weight):
        with pyrl.full_weight(source) as weight:
            assert weight is model.lm_head.weight
