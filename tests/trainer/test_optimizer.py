import math

import pytest
import torch
from torch import nn

from pyrl.trainer.config import OptimizerConfig
from pyrl.trainer.optimizer import MasterAdamW, learning_rate


class Tied(nn.Module):
    """An embedding whose matrix is also the head, a norm and a bias."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=True)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


def model(dtype):
    torch.manual_seed(0)
    return Tied().to(dtype)


def loss_of(net, ids):
    return torch.nn.functional.cross_entropy(net(ids).float(), (ids + 1) % 11, reduction="sum")


def test_fp32_is_torch_adamw():
    ours, theirs = model(torch.float32), model(torch.float32)
    config = OptimizerConfig(lr=0.1, weight_decay=0.1, max_grad_norm=0)
    optimizer = MasterAdamW(ours, config)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.1, fused=True)
    for _ in range(3):
        ids = torch.arange(5)
        loss_of(ours, ids).backward()
        optimizer.step(0.1)
        loss_of(theirs, ids).backward()
        adam.step()
        adam.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bf16_accumulates_in_fp32_and_frees_its_own_gradients():
    net = model(torch.bfloat16)
    optimizer = MasterAdamW(net, OptimizerConfig(max_grad_norm=0))
    parts = [torch.tensor([i]) for i in range(5)] * 20
    expected = {name: torch.zeros_like(m) for name, m in optimizer.masters.items()}
    for ids in parts:
        grads = torch.autograd.grad(loss_of(net, ids), list(net.parameters()))
        for total, grad in zip(expected.values(), grads, strict=True):
            total += grad.float()
    for ids in parts:
        loss_of(net, ids).backward()
        assert all(p.grad is None for p in net.parameters())
    for name, master in optimizer.masters.items():
        assert torch.equal(master.grad, expected[name]), name


def test_small_updates_are_not_lost_in_bf16():
    # 1e-5 is far below bf16's spacing near 1 (2^-8), so without masters nothing would ever move.
    net = nn.LayerNorm(4).to(torch.bfloat16)
    optimizer = MasterAdamW(net, OptimizerConfig(max_grad_norm=0))
    for _ in range(300):
        net(torch.randn(2, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(1e-5)
    # Adam with equal gradients moves lr a step: 300 * 1e-5 = 0.003.
    assert torch.allclose(optimizer.masters["bias"], torch.tensor(-0.003), rtol=1e-3)
    assert torch.equal(net.bias, optimizer.masters["bias"].bfloat16())


def test_clipping_scales_to_the_norm():
    def moved(max_norm):
        net = model(torch.float32)
        optimizer = MasterAdamW(net, OptimizerConfig(max_grad_norm=max_norm))
        loss_of(net, torch.arange(11)).backward()
        before = torch.cat([p.grad.flatten() for p in net.parameters()])
        seen = []
        optimizer._adam.step = lambda: seen.extend(p.grad.clone() for p in net.parameters())
        norm = optimizer.step(0.1)
        assert norm == pytest.approx(before.norm().item(), rel=1e-6)
        return norm, before, torch.cat([g.flatten() for g in seen])

    norm, before, after = moved(0.5)
    assert after.norm().item() == pytest.approx(0.5, rel=1e-6)
    assert torch.allclose(after, before * 0.5 / norm, rtol=1e-6, atol=0)
    _, before, after = moved(1e9)
    assert torch.equal(before, after)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    net = model(torch.float32)
    optimizer = MasterAdamW(net, OptimizerConfig())
    before = [p.detach().clone() for p in net.parameters()]
    loss_of(net, torch.arange(3)).backward()
    net.head.bias.grad[2] = bad
    assert not math.isfinite(optimizer.step(0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_is_exact(dtype, tmp_path):
    def steps(net, optimizer, count):
        for i in range(count):
            loss_of(net, torch.arange(2 + i)).backward()
            optimizer.step(0.01)

    config = OptimizerConfig(weight_decay=0.1)
    net = model(dtype)
    optimizer = MasterAdamW(net, config)
    steps(net, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "s.pt")
    steps(net, optimizer, 2)

    other = Tied().to(dtype)  # other weights than `model`
    again = MasterAdamW(other, config)
    again.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    steps(other, again, 2)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_model_is_refused():
    optimizer = MasterAdamW(model(torch.float32), OptimizerConfig())
    state = optimizer.state_dict()
    state["masters"]["head.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"head\.bias: the checkpoint has \(3,\)"):
        optimizer.load_state_dict(state)
    del state["masters"]["head.bias"]
    with pytest.raises(ValueError, match=r"'head\.bias'"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.775, 0.55, 0.325]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 0.55,
                    0.1 + 0.9 * (1 - math.cos(math.pi / 4)) / 2]),
    ],
)  # fmt: skip
def test_learning_rate(schedule, expected):
    config = OptimizerConfig(lr=2.0, warmup_steps=2, schedule=schedule, final_lr_share=0.1)
    rates = [learning_rate(step, 6, config) / 2 for step in range(1, 7)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_exact_shows_the_masters_and_puts_the_parameters_back():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)).to(torch.bfloat16)
    model[1].weight = model[0].weight  # tied
    optimizer = MasterAdamW(model, OptimizerConfig(lr=0.1, warmup_steps=0))
    before = dict(model.named_parameters())
    model(torch.arange(5)).float().square().sum().backward()
    optimizer.step(0.1)
    with optimizer.exact():
        (name, shown), *rest = model.named_parameters()
        assert not rest and shown.dtype == torch.float32 and model[1].weight is shown
        assert torch.equal(shown, optimizer.masters[name])
        assert not torch.equal(shown, shown.bfloat16().float())  # more than the rounded copy
    assert all(p is before[n] for n, p in model.named_parameters())
    assert model[1].weight is model[0].weight
    with optimizer.exact(wanted=False):
        assert model[0].weight.dtype == torch.bfloat16
