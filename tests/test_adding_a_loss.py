"""docs/adding-a-loss.md: what it quotes is in the sources, and its steps add a loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest
import torch

import pyrl
from pyrl import LossSpec
from pyrl.certify.batches import Shape, head, numbers
from pyrl.ops import objective, spec
from pyrl.parity import DEVICE, relative, serving

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "adding-a-loss.md").read_text()
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", GUIDE, re.M | re.S)
#: Where a loss is written.
PLACES = {
    "pyrl/ops/spec.py",
    "pyrl/ops/objective.py",
    "pyrl/certify/cases.py",
    "tests/ops/test_policy_objective.py",
    "csrc/spec.h",
    "csrc/objective.h",
    "kernels/objective_terms.py",
}


@pytest.mark.parametrize(("language", "name", "code"), BLOCKS)
def test_the_guide_quotes_the_sources(language, name, code):
    if language == "sh":
        assert not name
    else:
        assert code in (ROOT / name).read_text()


def test_the_guide_visits_every_place():
    assert {name for _, name, _ in BLOCKS} >= PLACES
    named = re.findall(r"`((?:pyrl|csrc|kernels|tests)/[\w/.]+)`", GUIDE)
    assert named and all((ROOT / name).exists() for name in named)


def test_commands_of_the_guide_name_what_is_there():
    (commands,) = (code for language, _, code in BLOCKS if language == "sh")
    assert all((ROOT / name).is_file() for name in re.findall(r"\S+\.py", commands))
    for target in re.findall(r"^make (\w+)", commands, re.M):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def toy(t: objective.Tokens, spec: LossSpec) -> objective.Policy:
    """-A tanh(delta)."""
    return objective.Policy(-t.advantage * torch.tanh(t.logprob - t.old), t.ratio)


@pytest.fixture
def with_toy(monkeypatch):
    """Step 1 of the guide: a name at the end, a function and its line."""
    names = (*spec.OBJECTIVES, "toy")
    monkeypatch.setattr(spec, "Objective", Literal[names])
    monkeypatch.setattr(spec, "OBJECTIVES", names)
    monkeypatch.setitem(objective.POLICY_TERMS, "toy", toy)


LACKING = [name for name in serving() if name != "torch"]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_toy_loss_is_what_was_written(with_toy, backend):
    batch = numbers(Shape(name="ragged"))
    logprob, advantages = batch.pop("logprob").double().requires_grad_(), batch.pop("advantages")
    out = pyrl.policy_objective(
        logprob, advantages, LossSpec(objective="toy"), backend=backend, **batch
    )
    out.loss.backward()
    delta = logprob.detach() - batch["old_logprob"]
    a = advantages.repeat_interleave(batch["cu_seqlens"].diff())
    share = batch["mask"] / batch["mask"].sum()
    assert out.loss.item() == pytest.approx((-a * delta.tanh() * share).sum().item(), rel=1e-6)
    assert relative(logprob.grad, -a * (1 - delta.tanh() ** 2) * share) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_toy_loss_reaches_the_head_with_every_option(with_toy, backend):
    shape = Shape(name="ragged")
    batch, tensors = numbers(shape), head(shape, torch.float32)
    hidden, weight = (tensors[k].requires_grad_() for k in ("hidden", "weight"))
    rest = {k: v for k, v in batch.items() if k not in ("logprob", "entropy")}
    advantages = rest.pop("advantages")
    loss_spec = LossSpec(objective="toy", kl="k2", kl_coef=0.1, entropy_coef=0.02)
    out = pyrl.linear_policy_loss(
        hidden, weight, tensors["target"], advantages, loss_spec, backend=backend, **rest
    )
    out.loss.backward()

    leaves = [v.detach().double().requires_grad_() for v in (hidden, weight)]
    logp = (leaves[0] @ leaves[1].T).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    logp = logp.gather(1, tensors["target"][:, None])[:, 0]
    a = advantages.repeat_interleave(batch["cu_seqlens"].diff())
    kl = (batch["ref_logprob"] - logp) ** 2 / 2
    terms = -a * torch.tanh(logp - batch["old_logprob"]) + 0.1 * kl - 0.02 * entropy
    expected = terms[batch["mask"]].mean()
    assert relative(out.loss, expected) < 5e-6
    for ours, exact in zip(
        (hidden.grad, weight.grad), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert relative(ours, exact) < 5e-6


@pytest.mark.parametrize("backend", LACKING)
def test_kernels_without_the_loss_refuse_it_by_name(with_toy, backend):
    message = f"backend='{backend}' has no objective 'toy'"
    loss_spec = LossSpec(objective="toy")
    logprob = torch.zeros(4, device=DEVICE)
    with pytest.raises(NotImplementedError, match=message):
        pyrl.policy_objective(logprob, logprob, loss_spec, backend=backend)
    weight, target = torch.zeros(5, 3, device=DEVICE), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=message):
        pyrl.linear_policy_loss(
            torch.zeros(4, 3, device=DEVICE), weight, target.to(DEVICE), logprob, loss_spec,
            backend=backend,
        )  # fmt: skip


@pytest.mark.parametrize("backend", LACKING)
def test_kernels_themselves_refuse_a_number_they_do_not_know(with_toy, backend):
    """Called past the public function, they still never compute another loss."""
    from pyrl.ops.backend import load

    zero, kept = torch.zeros(4, device=DEVICE), torch.ones(4, dtype=torch.bool, device=DEVICE)
    params = LossSpec(objective="toy").params()
    with pytest.raises((RuntimeError, NotImplementedError), match="objective number 7 is none of"):
        load(backend).objective_terms(zero, None, None, None, None, zero, zero, kept, None, params)


def test_a_name_that_was_not_added_is_refused():
    with pytest.raises(ValueError, match="objective='toy'"):
        LossSpec(objective="toy")
